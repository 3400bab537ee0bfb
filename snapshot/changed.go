package snapshot

import (
	"errors"
	"fmt"
	"os"
	"slices"
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
// does by itself it doesn't see, nor a change whose time was set back.
type Witness struct {
	layers []witnessed // lowest first
	oldest int64       // since when one of the layers is committed, as far as known
}

// witnessed is a layer, open.
type witnessed struct {
	id    string
	since int64
	dir   *os.File
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
	w := &Witness{layers: make([]witnessed, len(ids))}
	for i, id := range ids {
		w.layers[i] = witnessed{id: id}
		if s := o.snaps[id]; s.Committed {
			w.layers[i].since = s.At
			if w.oldest == 0 || s.At != 0 && s.At < w.oldest {
				w.oldest = s.At
			}
		}
	}
	o.mu.Unlock()
	for i := range w.layers {
		l := &w.layers[i]
		if err != nil {
			break
		}
		l.dir, err = os.OpenFile(o.fsPath(l.id), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look at the layers of %s: %w", id, gone(err)), w.Close())
	}
	return w, nil
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
