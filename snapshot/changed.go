package snapshot

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// ChangedError is the find of files of a committed snapshot that are no longer
// what was committed: somebody has removed, added or written some.
type ChangedError struct {
	ID   string // of the snapshot whose layer it is
	Path string // of the file, or of the directory that it is or was in
}

func (e *ChangedError) Error() string {
	return fmt.Sprintf("files of snapshot %s were changed after it was committed: /%s", e.ID, e.Path)
}

// changedSince tells whether a file was written, or a directory's entries
// changed, after a time in nanoseconds since 1970; 0 is not known.
//
// Both times of the file must be later. The one of its content alone may be
// what a build has set it to, also one in the future; the one of its metadata
// alone is that of a hard link that was made or removed, which leaves the file
// what it is, or that of a copy of the whole state directory.
func changedSince(st *unix.Stat_t, since int64) bool {
	if since == 0 || st.Ctim.Nano() <= since {
		return false
	}
	written := st.Mtim.Nano()
	return written > since && written <= time.Now().UnixNano()
}

// Witness tells whether what is read of a committed snapshot is what was
// committed. It knows what files look like, not what is in them: what a disk
// does by itself it doesn't see, nor a change whose time was set back. Its methods
// but Close may run at once.
type Witness struct {
	id     string
	layers []witnessed // lowest first
	// oldest and newest are since when layers are committed, as far as known.
	oldest, newest int64

	// Most that is read is as it should be by its times alone, and the layers are
	// opened by who looks closer.
	open    sync.Once
	openErr error
}

// witnessed is a layer, open.
type witnessed struct {
	id, path string
	since    int64
	dir      *os.File
}

// OpenWitness returns the witness of id. It has nothing to tell of snapshotters
// other than Overlay.
func OpenWitness(s Snapshotter, id string) (*Witness, error) {
	o, ok := s.(*Overlay)
	if !ok {
		return &Witness{}, nil
	}
	o.mu.Lock()
	ids, err := o.flatLocked(id)
	w := &Witness{id: id, layers: make([]witnessed, len(ids))}
	for i, id := range ids {
		w.layers[i] = witnessed{id: id, path: o.fsPath(id)}
		if s := o.snaps[id]; s.Committed {
			w.layers[i].since = s.At
			if w.oldest == 0 || s.At != 0 && s.At < w.oldest {
				w.oldest = s.At
			}
			w.newest = max(w.newest, s.At)
		}
	}
	o.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("look at the layers of %s: %w", id, gone(err))
	}
	return w, nil
}

// opened opens the layers, once.
func (w *Witness) opened() error {
	w.open.Do(func() {
		for i := range w.layers {
			l := &w.layers[i]
			dir, err := os.OpenFile(l.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
			if err != nil {
				w.openErr = fmt.Errorf("look at the layers of %s: %w", w.id, gone(err))
				return
			}
			l.dir = dir
		}
	})
	return w.openErr
}

// Close lets go of the layers.
func (w *Witness) Close() error {
	var errs []error
	for _, l := range w.layers {
		if l.dir != nil {
			errs = append(errs, l.dir.Close())
		}
	}
	return errors.Join(errs...)
}

// Dir returns a *ChangedError if entries of the directory path, relative to the
// root, were changed in any layer.
func (w *Witness) Dir(path string) error {
	if err := w.opened(); err != nil {
		return err
	}
	for _, l := range w.layers {
		if st, ok := l.stat(path); ok && files.IsDir(&st) && changedSince(&st, l.since) {
			return &ChangedError{l.id, path}
		}
	}
	return nil
}

// File returns a *ChangedError if the file path, which st describes, was written
// since its layer was committed.
func (w *Witness) File(path string, st *unix.Stat_t) error {
	if !changedSince(st, w.oldest) {
		return nil // most files
	}
	if err := w.opened(); err != nil {
		return err
	}
	for _, l := range slices.Backward(w.layers) {
		if own, ok := l.stat(path); ok {
			if changedSince(&own, l.since) {
				return &ChangedError{l.id, path}
			}
			return nil
		}
	}
	return nil
}

// Read is Dir or File, whichever st describes, for who reads what was looked at
// before and has st anyway: it costs nothing more unless path was changed since
// the last of the layers was committed. A directory that several layers have goes
// by the uppermost one.
func (w *Witness) Read(path string, st *unix.Stat_t) error {
	switch {
	case !changedSince(st, w.newest):
		return nil
	case files.IsDir(st):
		return w.Dir(path)
	}
	return w.File(path, st)
}

// stat describes the file path of the layer, if it is there.
func (l *witnessed) stat(path string) (st unix.Stat_t, ok bool) {
	if path == "" {
		path = "."
	}
	fd, err := files.OpenBeneath(int(l.dir.Fd()), path, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return st, false // not in this layer
	}
	defer unix.Close(fd)
	return st, unix.Fstat(fd, &st) == nil
}
