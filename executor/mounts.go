package executor

import (
	"errors"
	"fmt"
	"path"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// view is what executor needs of a snapshot.View.
type view interface {
	FD() int
	Close() error
}

// openView is snapshot.Open; tests replace it.
type openView func([]mount.Mount) (view, error)

func openSnapshot(mounts []mount.Mount) (view, error) { return snapshot.Open(mounts) }

// openTree is unix.OpenTree; a test makes it that of an older kernel.
var openTree = unix.OpenTree

// detach returns a detached mount of what fd is open on, a part of it if
// selector says so, for a child to attach in its own mount namespace. The
// caller closes it. It is private: systemd makes all mounts shared, and what is
// mounted in the clone of one would appear in the original, too, nor could a
// process pivot to it. rest is a selector that only the child can apply, since
// kernels before 6.15 don't clone from a mount that is itself detached.
func detach(fd int, selector string, attrs uint64) (tree int, rest string, err error) {
	const flags = unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH | unix.AT_RECURSIVE
	part, closePart, err := openPart(fd, selector)
	if err != nil {
		return -1, "", err
	}
	defer closePart()
	tree, err = openTree(part, "", flags)
	if errors.Is(err, unix.EINVAL) {
		if !isAll(selector) {
			rest = selector
		}
		tree, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	}
	if err != nil {
		return -1, "", fmt.Errorf("clone mount: %w", err)
	}
	attr := unix.MountAttr{Attr_set: attrs, Propagation: unix.MS_PRIVATE}
	if err := mountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return -1, "", errors.Join(fmt.Errorf("set mount attributes: %w", err), unix.Close(tree))
	}
	return tree, rest, nil
}

// isAll says that selector doesn't select a part.
func isAll(selector string) bool { return path.Join("/", selector) == "/" }

// openPart opens selector below fd, without following links out of it.
func openPart(fd int, selector string) (part int, closePart func(), err error) {
	if isAll(selector) {
		return fd, func() {}, nil
	}
	part, err = unix.Openat2(fd, selector, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return -1, nil, fmt.Errorf("open %s: %w", selector, err)
	}
	return part, func() { unix.Close(part) }, nil
}

func isFile(fd int) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, fmt.Errorf("stat mount: %w", err)
	}
	return st.Mode&unix.S_IFMT != unix.S_IFDIR, nil
}

// source is a mount made visible: as a directory or file open in fd.
type source struct {
	dest     string // absolute and clean
	fd       int
	selector string // part of fd that is meant
	file     bool
	attrs    uint64 // MOUNT_ATTR_*
}

// openSources makes the sources of mounts visible, parents before children.
func openSources(open openView, mounts []Mount, undo *cleanup.Stack) ([]source, error) {
	var sources []source
	for _, m := range mounts {
		s := source{dest: path.Join("/", m.Dest), selector: m.Selector}
		if s.dest == "/" {
			return nil, errors.New("mount at /: that is the root's place")
		}
		v, err := open(m.Source)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Dest, err)
		}
		undo.Add(v.Close)
		s.fd = v.FD()
		part, closePart, err := openPart(s.fd, s.selector)
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Dest, err)
		}
		s.file, err = isFile(part)
		closePart()
		if err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.Dest, err)
		}
		if m.Readonly {
			s.attrs = unix.MOUNT_ATTR_RDONLY
		}
		sources = append(sources, s)
	}
	slices.SortStableFunc(sources, func(a, b source) int { return depth(a.dest) - depth(b.dest) })
	return sources, nil
}

func depth(p string) (n int) {
	for _, c := range p {
		if c == '/' {
			n++
		}
	}
	return n
}

// bind makes s what the built-in runtime mounts.
func (s source) bind() (native.Bind, error) {
	fd, rest, err := detach(s.fd, s.selector, s.attrs)
	if err != nil {
		return native.Bind{}, fmt.Errorf("mount %s: %w", s.dest, err)
	}
	return native.Bind{Dest: s.dest, FD: fd, File: s.file, Selector: rest, Readonly: s.attrs&unix.MOUNT_ATTR_RDONLY != 0}, nil
}
