package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// trash deletes directory trees in the background. What is renamed into it is
// gone for everyone else at once; what a crash leaves there goes at the next
// sweep.
type trash struct {
	dir  string
	next atomic.Int64 // makes names

	mu      sync.Mutex // guards the fields below
	queue   []string
	running bool
	wg      sync.WaitGroup // the goroutine that deletes, while there is one
	errs    []error        // of deletions and renames, for Close
}

func openTrash(dir string) (*trash, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	t := &trash{dir: dir}
	t.next.Store(time.Now().UnixNano()) // no name of an earlier life
	return t, nil
}

// discard renames path into the trash and has it deleted. A missing path is
// fine.
func (t *trash) discard(path string) {
	name := filepath.Join(t.dir, strconv.FormatInt(t.next.Add(1), 36))
	if err := os.Rename(path, name); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			t.failed(fmt.Errorf("move to trash: %w", err))
		}
		return
	}
	t.delete(name)
}

// sweep has everything in the trash deleted.
func (t *trash) sweep() error {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return fmt.Errorf("sweep the trash: %w", err)
	}
	for _, e := range entries {
		t.delete(filepath.Join(t.dir, e.Name()))
	}
	return nil
}

func (t *trash) delete(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.queue = append(t.queue, name)
	if !t.running {
		t.running = true
		t.wg.Go(t.work)
	}
}

// work deletes until the queue is empty.
func (t *trash) work() {
	for {
		t.mu.Lock()
		if len(t.queue) == 0 {
			t.running, t.queue = false, nil
			t.mu.Unlock()
			return
		}
		name := t.queue[0]
		t.queue = t.queue[1:]
		t.mu.Unlock()
		if err := os.RemoveAll(name); err != nil {
			t.failed(fmt.Errorf("empty the trash: %w", err))
		}
	}
}

// failed remembers an error for Close. The files are tried again by the next
// sweep.
func (t *trash) failed(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.errs) < 10 {
		t.errs = append(t.errs, err)
	}
}

// Close waits for what is being deleted.
func (t *trash) Close() error {
	t.wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.errs...)
}
