package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// trash deletes files and directory trees in the background. What is given to
// it gets another name at once, in the trash's directory; a crash leaves it
// there, for the next sweep. To rename a directory costs half as much within
// its own directory as to another, so that the trash of snapshots is theirs.
type trash struct {
	dir  string
	next atomic.Int64 // makes names

	mu    sync.Mutex // guards the fields below
	queue []string
	// pending are the trees that aren't gone yet, in the queue or at work.
	pending map[string]bool
	idle    chan struct{}  // closed when pending is empty; nil as long as it is
	wg      sync.WaitGroup // the goroutine that deletes, while there is one
	errs    []error        // of deletions and renames, for Close
}

// trashPrefix begins the names of what is being deleted. No snapshot, blob or
// ingest has such a name.
const trashPrefix = ".gone-"

func newTrash(dir string) *trash {
	t := &trash{dir: dir, pending: map[string]bool{}}
	t.next.Store(time.Now().UnixNano()) // no name of an earlier life
	return t
}

// discard moves path out of the way, so that its name is free at once, and has
// it deleted. A missing path is fine.
func (t *trash) discard(path string) {
	name := filepath.Join(t.dir, trashPrefix+strconv.FormatInt(t.next.Add(1), 36))
	if err := os.Rename(path, name); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			t.failed(fmt.Errorf("move to trash: %w", err))
		}
		return
	}
	t.delete(name)
}

// delete has path, which nobody uses, deleted under its name.
func (t *trash) delete(path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pending[path] {
		return
	}
	t.pending[path] = true
	t.queue = append(t.queue, path)
	if t.idle == nil {
		t.idle = make(chan struct{})
		t.wg.Go(t.work)
	}
}

// work deletes until the queue is empty.
func (t *trash) work() {
	var done string
	for {
		t.mu.Lock()
		delete(t.pending, done)
		if len(t.queue) == 0 {
			close(t.idle)
			t.idle, t.queue = nil, nil
			t.mu.Unlock()
			return
		}
		done, t.queue = t.queue[0], t.queue[1:]
		t.mu.Unlock()
		if err := removeTree(unix.AT_FDCWD, done); err != nil {
			t.failed(fmt.Errorf("empty the trash: %w", err))
		}
	}
}

// has reports whether path is being deleted.
func (t *trash) has(path string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pending[path]
}

// size measures what isn't gone yet.
func (t *trash) size(ctx context.Context) (int64, error) {
	t.mu.Lock()
	paths := slices.Collect(maps.Keys(t.pending))
	t.mu.Unlock()
	u := newUsageWalk(ctx)
	for _, path := range paths {
		if err := u.path(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return 0, fmt.Errorf("measure what is being deleted: %w", err)
		}
	}
	u.shareLinks()
	return u.Size, nil
}

// settle waits until what was discarded is gone.
func (t *trash) settle(ctx context.Context) error {
	t.mu.Lock()
	idle := t.idle
	t.mu.Unlock()
	if idle == nil {
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
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
