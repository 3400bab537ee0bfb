package filetree

import (
	"context"
	"fmt"
	"io/fs"
	"path"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// file copies what is called name in d's source, and is no directory, to the
// name as in d's copy.
func (t *treeCopy) file(d *pair, name, as string, kind fs.FileMode) error {
	var err error
	switch {
	case kind.IsRegular():
		err = t.regular(d, name, as)
	case kind&fs.ModeSymlink != 0:
		err = t.symlink(d, name, as)
	default:
		err = t.special(d, name, as)
	}
	return pathErr("copy", path.Join(d.from, name), err)
}

// place makes a new file. If something has that name, it goes first: make is
// then called again.
func (t *treeCopy) place(d *pair, name string, make func() error) error {
	err := make()
	if err != unix.EEXIST {
		return err
	}
	var st unix.Stat_t
	if err := files.Lstat(d.dst, name, &st); err != nil {
		return err
	}
	if files.IsDir(&st) && !t.Replace {
		return fmt.Errorf("cannot replace directory %s with file", path.Join(d.at, name))
	}
	if err := files.RemoveAll(d.dst, name); err != nil {
		return err
	}
	return make()
}

func (t *treeCopy) regular(d *pair, name, as string) error {
	src, err := files.OpenFile(d.srcFD, name)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	if err := t.read(t.ctx, path.Join(d.from, name), &st); err != nil {
		return err
	}
	if st.Nlink <= 1 {
		return t.data(d, src, &st, as)
	}
	first, ours := t.first(&st, path.Join(d.at, as))
	if ours {
		defer close(first.done)
		return t.data(d, src, &st, as)
	}
	select {
	case <-first.done:
	case <-t.ctx.Done():
		return context.Cause(t.ctx)
	}
	if err := t.link(d, first.at, as); err != unix.EMLINK {
		return err
	}
	return t.data(d, src, &st, as) // it has as many names as it can
}

// first returns the first copy of a file with several names, and whether that
// is the caller's to make, at at.
func (t *treeCopy) first(st *unix.Stat_t, at string) (f *firstCopy, ours bool) {
	id := inode{st.Dev, st.Ino}
	t.mu.Lock()
	defer t.mu.Unlock()
	if f, ok := t.links[id]; ok {
		return f, false
	}
	f = &firstCopy{at: at, done: make(chan struct{})}
	t.links[id] = f
	return f, true
}

// link gives the copy at at the further name as.
func (t *treeCopy) link(d *pair, at, as string) error {
	dir, name, err := t.dst.openParent(at)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return t.place(d, as, func() error { return unix.Linkat(dir, name, d.dst, as, 0) })
}

// data copies the open file src with its metadata to the new file as. What the
// new file has from the start isn't set again.
func (t *treeCopy) data(d *pair, src int, st *unix.Stat_t, as string) (err error) {
	perm := t.Chmod.of(st.Mode)
	dst := -1
	err = t.place(d, as, func() (err error) {
		dst, err = unix.Openat(d.dst, as, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, perm&0o777)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if cerr := unix.Close(dst); err == nil {
			err = cerr
		}
	}()
	if err := t.copier.Copy(t.ctx, dst, src, st); err != nil {
		return err
	}
	owner := t.owner(st)
	if d.inherits || owner.UID != t.uid || owner.GID != t.gid {
		if err := unix.Fchown(dst, owner.UID, owner.GID); err != nil {
			return owner.explain(err)
		}
	}
	if d.inherits || perm&0o7000 != 0 || perm&t.umask != 0 {
		if err := unix.Fchmod(dst, perm); err != nil {
			return err
		}
	}
	copyXattrs(files.XattrsOf(dst), files.XattrsOf(src))
	return unix.UtimesNanoAt(d.dst, as, t.times(st), unix.AT_SYMLINK_NOFOLLOW)
}

func (t *treeCopy) symlink(d *pair, name, as string) error {
	link, err := files.Readlink(d.srcFD, name)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := files.Lstat(d.srcFD, name, &st); err != nil {
		return err
	}
	if err := t.place(d, as, func() error { return unix.Symlinkat(link, d.dst, as) }); err != nil {
		return err
	}
	return t.describe(d, name, as, &st)
}

// special copies a device, pipe or socket. A socket is nothing without who
// listens on it; its copy is an empty file.
func (t *treeCopy) special(d *pair, name, as string) error {
	var st unix.Stat_t
	if err := files.Lstat(d.srcFD, name, &st); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFSOCK {
		kind = unix.S_IFREG
	}
	dev := 0
	if kind == unix.S_IFCHR || kind == unix.S_IFBLK {
		dev = int(st.Rdev)
	}
	if err := t.place(d, as, func() error { return unix.Mknodat(d.dst, as, kind|0o600, dev) }); err != nil {
		return err
	}
	return t.describe(d, name, as, &st)
}

// describe gives the link or special file as the metadata of name.
func (t *treeCopy) describe(d *pair, name, as string, st *unix.Stat_t) error {
	owner := t.owner(st)
	if err := unix.Fchownat(d.dst, as, owner.UID, owner.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return owner.explain(err)
	}
	if !files.IsLink(st) {
		if err := unix.Fchmodat(d.dst, as, t.Chmod.of(st.Mode), 0); err != nil {
			return err
		}
	}
	copyXattrs(files.XattrsAt(d.dst, as), files.XattrsAt(d.srcFD, name))
	return unix.UtimesNanoAt(d.dst, as, t.times(st), unix.AT_SYMLINK_NOFOLLOW)
}
