package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// changeWalk finds what a layer changes in its parent. What it finds means the
// same on top of anything else: overlay's opaque directories, which hide
// whatever happens to be below them, come as deletions of what the parent has
// there, and what is in the layer although nothing changed (overlay copies up
// what is only touched) doesn't come at all.
type changeWalk struct {
	ctx   context.Context
	layer layerInfo
	xattr string // prefix of overlay's own xattrs
	sink  changeSink
	// sockets are wanted. They can't be in a tar.
	sockets bool
}

// changeSink is told of changes in the order of their names, directories before
// what is in them. A directory that didn't change itself comes if something in it
// did.
type changeSink interface {
	dir(d *changeDir) error
	leave(d *changeDir) error // after dir, when all in it was told of
	file(in *changeDir, name string, st *unix.Stat_t) error
	whiteout(in *changeDir, name string) error
	// foreign is told of what has no meaning of its own: an opaque mark, or
	// something that is in the layer although nothing changed.
	foreign()
}

// changeDir is a directory of the layer.
type changeDir struct {
	fd    int
	lower int // the same directory in the parent, -1 for none
	name  string
	path  string // "" for the root, else with a slash at the end
	st    unix.Stat_t
	told  bool // the sink knows it
	// alone: the parent's directory doesn't show through, and what is in it is
	// gone if the layer doesn't have it.
	alone bool
	// xwhiteouts: deletions in it may be empty files with an xattr, the form
	// for where devices can't be made.
	xwhiteouts bool
	parent     *changeDir
	copy       *layerDir // the sink's
}

// walkChanges tells sink what layer changes in parent, which may be nil.
func walkChanges(ctx context.Context, layer layerInfo, parent *View, sink changeSink, sockets bool) error {
	w := &changeWalk{ctx: ctx, layer: layer, xattr: layer.xattr, sink: sink, sockets: sockets}
	fd, err := files.OpenDir(unix.AT_FDCWD, layer.dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", layer.dir, gone(err))
	}
	defer unix.Close(fd)
	root := &changeDir{fd: fd, lower: -1}
	if err := unix.Fstat(fd, &root.st); err != nil {
		return fmt.Errorf("stat %s: %w", layer.dir, err)
	}
	if parent != nil {
		if root.lower, err = files.OpenDir(parent.FD(), "."); err != nil {
			return fmt.Errorf("open the parent: %w", err)
		}
		defer unix.Close(root.lower)
	}
	mark, err := w.opaqueMark(root)
	if err != nil {
		return err
	}
	root.xwhiteouts = mark == "x"
	if err := w.tell(root); err != nil {
		return err
	}
	if err := w.children(root); err != nil {
		return err
	}
	return sink.leave(root)
}

// tell tells the sink of dir, unless it knows.
func (w *changeWalk) tell(dir *changeDir) error {
	if dir.told {
		return nil
	}
	dir.told = true
	if dir.parent != nil {
		if err := w.tell(dir.parent); err != nil {
			return err
		}
	}
	return w.sink.dir(dir)
}

// children goes through what is in dir, and what was.
func (w *changeWalk) children(dir *changeDir) error {
	names, err := files.Names(dir.fd)
	if err != nil {
		return fmt.Errorf("read directory /%s: %w", dir.path, err)
	}
	if err := w.unchanged(&dir.st, dir.path); err != nil {
		return err
	}
	var missing []string
	if dir.alone && dir.lower >= 0 {
		lower, err := files.Names(dir.lower)
		if err != nil {
			return fmt.Errorf("read directory /%s of the parent: %w", dir.path, err)
		}
		missing = slices.DeleteFunc(lower, func(name string) bool {
			_, have := slices.BinarySearch(names, name)
			return have
		})
	}
	for _, name := range names {
		if err := context.Cause(w.ctx); err != nil {
			return err
		}
		for len(missing) > 0 && missing[0] < name {
			if err := w.whiteout(dir, missing[0]); err != nil {
				return err
			}
			missing = missing[1:]
		}
		if err := w.child(dir, name); err != nil {
			return err
		}
	}
	for _, name := range missing {
		if err := w.whiteout(dir, name); err != nil {
			return err
		}
	}
	return nil
}

// unchanged returns an error if the file isn't what was committed: what is
// found here is stored under its name for good.
func (w *changeWalk) unchanged(st *unix.Stat_t, path string) error {
	if changedSince(st, w.layer.since) {
		return &ChangedError{w.layer.id, path}
	}
	return nil
}

func (w *changeWalk) whiteout(dir *changeDir, name string) error {
	if err := w.tell(dir); err != nil {
		return err
	}
	return w.sink.whiteout(dir, name)
}

// child looks at one entry of dir, and all below it.
func (w *changeWalk) child(dir *changeDir, name string) error {
	var st, lower unix.Stat_t
	if err := files.Lstat(dir.fd, name, &st); err != nil {
		return fmt.Errorf("stat /%s%s: %w", dir.path, name, err)
	}
	below := false
	if dir.lower >= 0 {
		switch err := files.Lstat(dir.lower, name, &lower); {
		case err == nil:
			below = true
		case !errors.Is(err, unix.ENOENT):
			return fmt.Errorf("stat /%s%s in the parent: %w", dir.path, name, err)
		}
	}
	deleted, err := w.isDeletion(dir, name, &st)
	switch {
	case err != nil:
		return err
	case deleted && below:
		return w.whiteout(dir, name)
	case deleted:
		w.sink.foreign()
		return nil
	case files.IsDir(&st):
		return w.dir(dir, name, &st, &lower, below)
	case st.Mode&unix.S_IFMT == unix.S_IFSOCK && !w.sockets:
		return nil
	}
	if err := w.unchanged(&st, dir.path+name); err != nil {
		return err
	}
	// A file that got a second name is told of under both.
	if below && st.Nlink == 1 {
		same, err := w.sameFile(dir, name, &st, &lower)
		if err != nil {
			return err
		}
		if same {
			w.sink.foreign()
			return nil
		}
	}
	if err := w.tell(dir); err != nil {
		return err
	}
	return w.sink.file(dir, name, &st)
}

// isDeletion says whether name is a whiteout, in either form.
func (w *changeWalk) isDeletion(dir *changeDir, name string, st *unix.Stat_t) (bool, error) {
	if isWhiteout(st) {
		return true, nil
	}
	if !dir.xwhiteouts || st.Size != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false, nil
	}
	_, ok, err := files.XattrsAt(dir.fd, name).Get(w.xattr + "whiteout")
	if err != nil {
		return false, fmt.Errorf("xattrs of /%s%s: %w", dir.path, name, err)
	}
	return ok, nil
}

// opaqueMark returns overlay's mark of a directory: y hides the directory below,
// x says that deletions may be files with an xattr.
func (w *changeWalk) opaqueMark(dir *changeDir) (string, error) {
	v, _, err := files.XattrsOf(dir.fd).Get(w.xattr + "opaque")
	if err != nil {
		return "", fmt.Errorf("xattrs of /%s: %w", dir.path, err)
	}
	return string(v), nil
}

// dir looks at the directory name and what is in it.
func (w *changeWalk) dir(in *changeDir, name string, st, lower *unix.Stat_t, below bool) (err error) {
	dir := &changeDir{lower: -1, name: name, path: in.path + name + "/", st: *st, alone: in.alone, parent: in}
	if dir.fd, err = files.OpenDir(in.fd, name); err != nil {
		return fmt.Errorf("open /%s: %w", dir.path, err)
	}
	defer unix.Close(dir.fd)
	own := files.XattrsOf(dir.fd)
	if v, ok, err := own.Get(w.xattr + "redirect"); err != nil {
		return fmt.Errorf("xattrs of /%s: %w", dir.path, err)
	} else if ok {
		return fmt.Errorf("/%s is a redirect to %q: the layer was mounted with redirect_dir", dir.path, v)
	}
	mark, err := w.opaqueMark(dir)
	if err != nil {
		return err
	}
	dir.xwhiteouts = mark == "x"
	if mark == "y" {
		dir.alone = true
		w.sink.foreign()
	}
	same := false
	if below && files.IsDir(lower) {
		if dir.lower, err = files.OpenDir(in.lower, name); err != nil {
			return fmt.Errorf("open /%s in the parent: %w", dir.path, err)
		}
		defer unix.Close(dir.lower)
		what, err := differentMeta(st, lower, own, files.XattrsOf(dir.lower))
		if err != nil {
			return fmt.Errorf("compare /%s with the parent's: %w", dir.path, err)
		}
		same = what == ""
	}
	if !same {
		if err := w.tell(dir); err != nil {
			return err
		}
	}
	if err := w.children(dir); err != nil {
		return err
	}
	if !dir.told {
		w.sink.foreign()
		return nil
	}
	return w.sink.leave(dir)
}

// sameFile says whether name is in the layer although nothing changed: it was
// opened for writing, or moved away and back. Size and time don't make it the same:
// times from a tar may be whole seconds, and before Linux 6.13 what is written within
// a tick of the kernel's clock, up to 10 ms, has one time. The content decides.
//
// How many names the parent's file has plays no part: files of layers get more
// of them when others share them.
func (w *changeWalk) sameFile(dir *changeDir, name string, st, lower *unix.Stat_t) (same bool, err error) {
	if st.Size != lower.Size || st.Mtim != lower.Mtim || st.Mode != lower.Mode {
		return false, nil
	}
	what, err := differentMeta(st, lower, files.XattrsAt(dir.fd, name), files.XattrsAt(dir.lower, name))
	same = what == ""
	if err == nil && same {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			same, err = files.SameLink(dir.fd, dir.lower, name)
		case unix.S_IFREG:
			same, err = files.SameContent(dir.fd, dir.lower, name)
		}
	}
	if err != nil {
		err = fmt.Errorf("compare /%s%s with the parent's: %w", dir.path, name, err)
	}
	return same, err
}
