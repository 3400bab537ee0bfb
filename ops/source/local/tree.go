package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"
)

// tree changes what is under a directory. Every path is resolved without
// following any symbolic link: the parent is opened with openat2, which
// refuses them, and the last name is used only with calls that don't follow
// it. A tree is for one goroutine; several may work on one root.
type tree struct {
	root   int // the caller's
	umask  uint32
	parent string // that fd is open for
	fd     int    // -1 for none
}

func newTree(root int, umask uint32) *tree { return &tree{root: root, umask: umask, fd: -1} }

// close closes what the tree opened.
func (t *tree) close() {
	if t.fd >= 0 {
		unix.Close(t.fd)
		t.fd = -1
	}
}

// at returns the open parent directory of path and the name in it. The
// descriptor is good until the next call.
func (t *tree) at(path string) (int, string, error) {
	parent, name := split(path)
	if parent == "" {
		return t.root, name, nil
	}
	if t.fd >= 0 && t.parent == parent {
		return t.fd, name, nil
	}
	fd, err := files.OpenBeneath(t.root, parent, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, "", pathError("open directory", parent, err)
	}
	t.close()
	t.fd, t.parent = fd, parent
	return fd, name, nil
}

// treeError: the copy could not be changed.
type treeError struct {
	act, path string
	err       error
}

func (e *treeError) Error() string {
	return fmt.Sprintf("%s %q in the local copy: %v", e.act, e.path, e.err)
}

func (e *treeError) Unwrap() error { return e.err }

func pathError(act, path string, err error) error { return &treeError{act, path, err} }

// create makes the new file of st for writing.
func (t *tree) create(st *types.Stat) (int, error) {
	dir, name, err := t.at(st.Path)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, st.Mode&0o777)
	if err != nil {
		return -1, pathError("create", st.Path, err)
	}
	return fd, nil
}

// finish gives an open new file its owner, mode, xattrs and mtime. In a
// directory with the set-group-ID bit its group isn't ours, but the
// directory's.
func (t *tree) finish(fd int, st *types.Stat, inherits bool) error {
	chown := st.Uid != ownUID || st.Gid != ownGID || inherits
	if chown {
		if err := unix.Fchown(fd, int(st.Uid), int(st.Gid)); err != nil {
			return pathError("chown", st.Path, rootless.Here().Explain(err, int(st.Uid), int(st.Gid)))
		}
	}
	if mode := files.Perm(fs.FileMode(st.Mode)); mode&(t.umask|0o7000) != 0 {
		if err := unix.Fchmod(fd, mode); err != nil {
			return pathError("chmod", st.Path, err)
		}
	}
	for name, value := range st.Xattrs {
		if err := unix.Fsetxattr(fd, name, value, 0); err != nil && !xattrUnsupported(err) {
			return pathError("set xattr "+name, st.Path, err)
		}
	}
	mtime := unix.NsecToTimespec(st.ModTime)
	if err := files.SetTimes(fd, mtime, mtime); err != nil {
		return pathError("set mtime", st.Path, err)
	}
	return nil
}

var ownUID, ownGID = uint32(os.Geteuid()), uint32(os.Getegid())

// mkdir makes a directory that only we can use; setDir gives it its owner and
// mode.
func (t *tree) mkdir(st *types.Stat) error {
	dir, name, err := t.at(st.Path)
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return pathError("mkdir", st.Path, err)
	}
	return nil
}

// setDir sets owner, mode and xattrs of a directory. old are xattrs it may
// have.
func (t *tree) setDir(st *types.Stat, old map[string][]byte) error {
	fd, err := files.OpenBeneath(t.root, st.Path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return pathError("open directory", st.Path, err)
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, int(st.Uid), int(st.Gid)); err != nil {
		return pathError("chown", st.Path, err)
	}
	if err := unix.Fchmod(fd, files.Perm(fs.FileMode(st.Mode))); err != nil {
		return pathError("chmod", st.Path, err)
	}
	for name := range old {
		if _, ok := st.Xattrs[name]; ok {
			continue
		}
		if err := unix.Fremovexattr(fd, name); err != nil && err != unix.ENODATA && !xattrUnsupported(err) {
			return pathError("remove xattr "+name, st.Path, err)
		}
	}
	for name, value := range st.Xattrs {
		if err := unix.Fsetxattr(fd, name, value, 0); err != nil && !xattrUnsupported(err) {
			return pathError("set xattr "+name, st.Path, err)
		}
	}
	return nil
}

// touch sets the mtime of what is at path, a link itself included.
func (t *tree) touch(path string, mtime int64) error {
	dir, name, err := t.at(path)
	if err != nil {
		return err
	}
	ts := []unix.Timespec{unix.NsecToTimespec(mtime), unix.NsecToTimespec(mtime)}
	if err := unix.UtimesNanoAt(dir, name, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("set mtime", path, err)
	}
	return nil
}

// symlink and mknod make the entry of st, complete.
func (t *tree) symlink(st *types.Stat) error {
	dir, name, err := t.at(st.Path)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(st.Linkname, dir, name); err != nil {
		return pathError("symlink", st.Path, err)
	}
	return t.complete(dir, name, st)
}

func (t *tree) mknod(st *types.Stat) error {
	dir, name, err := t.at(st.Path)
	if err != nil {
		return err
	}
	mode := files.Perm(fs.FileMode(st.Mode))
	switch m := fs.FileMode(st.Mode); {
	case m&fs.ModeCharDevice != 0:
		mode |= unix.S_IFCHR
	case m&fs.ModeNamedPipe != 0:
		mode |= unix.S_IFIFO
	default:
		mode |= unix.S_IFBLK
	}
	dev := unix.Mkdev(uint32(st.Devmajor), uint32(st.Devminor))
	if err := unix.Mknodat(dir, name, mode, int(dev)); err != nil {
		return pathError("mknod", st.Path, err)
	}
	// Nobody but us changes the tree: this can't follow a link.
	if err := unix.Fchmodat(dir, name, mode&0o7777, 0); err != nil {
		return pathError("chmod", st.Path, err)
	}
	return t.complete(dir, name, st)
}

func (t *tree) complete(dir int, name string, st *types.Stat) error {
	if err := unix.Fchownat(dir, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return pathError("chown", st.Path, rootless.Here().Explain(err, int(st.Uid), int(st.Gid)))
	}
	return t.touch(st.Path, st.ModTime)
}

// link makes path a further name of the file target.
func (t *tree) link(target, path string) error {
	from, base := t.root, target
	if parent, name := split(target); parent != "" {
		fd, err := files.OpenBeneath(t.root, parent, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return pathError("open directory", parent, err)
		}
		defer unix.Close(fd)
		from, base = fd, name
	}
	dir, name, err := t.at(path)
	if err != nil {
		return err
	}
	if err := unix.Linkat(from, base, dir, name, 0); err != nil {
		return pathError("link", path, err)
	}
	return nil
}

// remove removes what is at path, with all that is below it.
func (t *tree) remove(path string) error {
	dir, name, err := t.at(path)
	if err != nil {
		return err
	}
	if err := files.RemoveAll(dir, name); err != nil {
		return pathError("remove", path, err)
	}
	if t.parent == path || below(t.parent, path) {
		t.close()
	}
	return nil
}

// xattrUnsupported: the file system, or our lack of rights, rules an attribute
// out. Trees are carried without it, as they always were.
func xattrUnsupported(err error) bool {
	return errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM)
}
