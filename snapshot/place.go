package snapshot

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Place is a directory in the own layer of an active snapshot, where something new
// can be made without a mount: what is made there hides nothing. A mount costs more
// than all else that a small step of a build does.
type Place struct {
	fd   int
	path string
}

// FD is the directory. It stays the Place's.
func (p *Place) FD() int { return p.fd }

// Path is where the directory is in the snapshot: clean, and without links in it.
func (p *Place) Path() string { return p.path }

// Close lets go of the directory. It must be called exactly once.
func (p *Place) Close() error {
	if err := unix.Close(p.fd); err != nil {
		return fmt.Errorf("close the directory %s of a snapshot: %w", p.path, err)
	}
	return nil
}

// Place returns where the active snapshot id, which nobody has mounted, can get
// something new at path, with directories above it that are missing; what is
// elsewhere isn't to be looked at. A snapshot on nothing has one Place for
// everything. It is nil if it takes a mount: something is at path, or has been
// there in this snapshot, or the way there isn't one of directories alone.
//
// Directories on that way are copied into the snapshot's layer, as overlay does it.
func (o *Overlay) Place(ctx context.Context, id, path string) (_ *Place, err error) {
	o.mu.Lock()
	s, err := o.getLocked(id)
	var layers []string
	alone := false
	switch {
	case err != nil:
	case s.Committed:
		err = fmt.Errorf("snapshot %q: %w", id, ErrNotActive)
	default:
		layers, err = o.layersLocked(id)
		alone = len(layers) == 1 && o.aloneLocked(s)
	}
	o.mu.Unlock()
	if err != nil {
		return nil, err
	}
	names := splitPath(path)
	if !alone && (len(layers) == 1 || len(names) == 0 || slices.Contains(names, "..")) {
		return nil, nil
	}
	slices.Reverse(layers)
	own, err := files.OpenDir(unix.AT_FDCWD, layers[0])
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", layers[0], gone(err))
	}
	if alone {
		return &Place{fd: own, path: "/"}, nil
	}
	w := &wayDown{xattr: o.xattr, open: []int{own}}
	defer func() {
		for _, fd := range w.open {
			unix.Close(fd)
		}
	}()
	depth, err := w.walk(layers, names)
	if err != nil || depth < 0 {
		return nil, err
	}
	own, err = w.copyUp(names)
	if err != nil {
		return nil, fmt.Errorf("copy the directory /%s into the layer of snapshot %s: %w", strings.Join(names[:depth], "/"), id, err)
	}
	w.open = slices.DeleteFunc(w.open, func(fd int) bool { return fd == own })
	return &Place{fd: own, path: "/" + strings.Join(names[:depth], "/")}, nil
}

// wayDown is a path into an overlay, found in its layers.
type wayDown struct {
	xattr string
	dirs  [][]dirPart // from the root down
	open  []int       // to be closed
}

// dirPart is what one layer has of a directory. Those that overlay merges are
// listed topmost first.
type dirPart struct {
	depth int // of the layer: 0 is the snapshot's own
	fd    int
	root  string // the directory, if it is a layer's root, which isn't opened
}

// path is what is called name there, relative to fd.
func (p *dirPart) path(name string) string {
	if p.root == "" {
		return name
	}
	return p.root + "/" + name
}

// walk goes along names, the layers being topmost first and the first open, up to
// what nothing has. It returns how many of names are there, all directories; -1 if
// it isn't as plain.
func (w *wayDown) walk(layers, names []string) (int, error) {
	if opaque, plain, err := w.marks(w.open[0]); err != nil || opaque || !plain {
		return -1, err
	}
	root := make([]dirPart, len(layers))
	for i, layer := range layers {
		root[i] = dirPart{depth: i, fd: unix.AT_FDCWD, root: layer}
	}
	root[0] = dirPart{fd: w.open[0]}
	w.dirs = append(w.dirs, root)
	for depth, name := range names {
		child, plain, err := w.child(w.dirs[depth], name)
		switch {
		case err != nil || !plain:
			return -1, err
		case len(child) == 0:
			return depth, nil
		}
		w.dirs = append(w.dirs, child)
	}
	return -1, nil // all of it is there
}

// child looks up name in a directory: nothing has it, or it is a directory, or it
// isn't as plain. An error of the kernel's is none here: a mount will tell.
func (w *wayDown) child(dir []dirPart, name string) (child []dirPart, plain bool, err error) {
	for _, p := range dir {
		var st unix.Stat_t
		err := files.Lstat(p.fd, p.path(name), &st)
		switch {
		case err == unix.ENOENT && p.root == "":
			continue
		case err == unix.ENOENT: // is the layer there?
			if err := files.Lstat(p.fd, p.root, &st); err != nil {
				return nil, false, fmt.Errorf("look at layer %s: %w", p.root, gone(err))
			}
			continue
		case err != nil, isWhiteout(&st) && p.depth == 0, !isWhiteout(&st) && !files.IsDir(&st) && len(child) == 0:
			return nil, false, nil
		case !files.IsDir(&st): // hides what is below
			return child, true, nil
		}
		fd, err := files.OpenDir(p.fd, p.path(name))
		if err != nil {
			return nil, false, nil
		}
		w.open = append(w.open, fd)
		child = append(child, dirPart{depth: p.depth, fd: fd})
		opaque, plain, err := w.marks(fd)
		if err != nil || opaque || !plain {
			return child, plain, err
		}
	}
	return child, true, nil
}

// marks says whether a directory hides what is below, and whether it is plain:
// nothing that was moved here, and without an ACL for what is made in it.
func (w *wayDown) marks(fd int) (opaque, plain bool, err error) {
	xattrs := files.XattrsOf(fd)
	names, err := xattrs.Names()
	if err != nil {
		return false, false, fmt.Errorf("list xattrs: %w", err)
	}
	plain = true
	for _, name := range names {
		switch name {
		case w.xattr + "opaque":
			value, _, err := xattrs.Get(name)
			if err != nil {
				return false, false, fmt.Errorf("get xattr %s: %w", name, err)
			}
			opaque = string(value) == "y"
			plain = plain && opaque
		case w.xattr + "redirect", "system.posix_acl_default":
			plain = false
		}
	}
	return opaque, plain, nil
}

// copyUp makes the directories that the snapshot's own layer doesn't have, and
// returns the last one there.
func (w *wayDown) copyUp(names []string) (own int, err error) {
	for i, dir := range w.dirs {
		if dir[0].depth == 0 {
			own = dir[0].fd
		} else if own, err = w.copyDir(own, names[i-1], dir[0].fd); err != nil {
			return -1, err
		}
	}
	return own, nil
}

// copyDir makes the directory name in own with the metadata of lower. That leaves
// the times of own as they are.
func (w *wayDown) copyDir(own int, name string, lower int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(own, &st); err != nil {
		return -1, err
	}
	if err := unix.Mkdirat(own, name, 0o700); err != nil {
		return -1, err
	}
	fd, err := files.OpenDir(own, name)
	if err != nil {
		return -1, err
	}
	w.open = append(w.open, fd)
	if err := copyMeta(lower, fd); err != nil {
		return -1, err
	}
	// Where the file system has no such xattrs, overlay's copies have no mark either.
	if err := unix.Fsetxattr(fd, w.xattr+"origin", nil, 0); err != nil && err != unix.ENOTSUP {
		return -1, fmt.Errorf("mark it as copied up: %w", err)
	}
	return fd, files.SetTimes(own, st.Atim, st.Mtim)
}
