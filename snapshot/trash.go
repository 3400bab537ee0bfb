package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// trash deletes files and directory trees in the background. Before anything of a
// tree is deleted it gets another name, in the trash's directory, so that half a
// tree is never taken for a whole one; a crash leaves it there, for the next
// sweep. To rename a directory costs half as much within its own directory as to
// another, so that the trash of snapshots is theirs.
type trash struct {
	dir  string
	next atomic.Int64 // makes names

	mu    sync.Mutex // guards the fields below
	queue []string
	// pending are the trees that aren't gone yet, in the queue or at work, by each
	// name that they have or may get.
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
	aside := t.name()
	if err := moveAside(path, aside); err != nil {
		t.failed(err)
		return
	}
	t.delete(aside)
}

// name returns one that nothing has.
func (t *trash) name() string {
	return filepath.Join(t.dir, trashPrefix+strconv.FormatInt(t.next.Add(1), 36))
}

// moveAside renames path without os.Rename's look at what it would replace, which
// would be a third of the cost. A missing path is fine.
func moveAside(path, aside string) error {
	_, err := files.Retry(func() (int, error) { return 0, unix.Rename(path, aside) })
	if err != nil && err != unix.ENOENT {
		return fmt.Errorf("move %s to trash: %w", path, err)
	}
	return nil
}

// delete has path deleted, which nobody uses, and whose name nobody takes before
// it is gone.
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
	var path, aside string
	for {
		t.mu.Lock()
		delete(t.pending, path)
		delete(t.pending, aside)
		if len(t.queue) == 0 {
			close(t.idle)
			t.idle, t.queue = nil, nil
			t.mu.Unlock()
			return
		}
		path, t.queue = t.queue[0], t.queue[1:]
		aside = path
		if !strings.HasPrefix(filepath.Base(path), trashPrefix) {
			aside = t.name()
			t.pending[aside] = true
		}
		t.mu.Unlock()
		if err := empty(path, aside); err != nil {
			t.failed(err)
		}
	}
}

// empty deletes path, under the name aside.
func empty(path, aside string) error {
	if path != aside {
		if err := moveAside(path, aside); err != nil {
			return err
		}
	}
	if err := files.RemoveAll(unix.AT_FDCWD, aside); err != nil {
		return fmt.Errorf("empty the trash: %w", err)
	}
	return nil
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
