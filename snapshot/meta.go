package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// overlayXattrs are the prefixes of xattrs that overlay keeps for itself.
var overlayXattrs = []string{"trusted.overlay.", "user.overlay."}

func isOverlayXattr(name string) bool {
	return slices.ContainsFunc(overlayXattrs, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// dirFlags open a directory to work in, never through a symlink.
const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// openDir opens the directory name in dir.
func openDir(dir int, name string) (int, error) {
	return retry(func() (int, error) { return unix.Openat(dir, name, dirFlags, 0) })
}

// retry repeats a call that a signal interrupted.
func retry(fn func() (int, error)) (int, error) {
	for {
		n, err := fn()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// lstatAt describes name in dir; a symlink itself.
func lstatAt(dir int, name string, st *unix.Stat_t) error {
	for {
		if err := unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW); err != unix.EINTR {
			return err
		}
	}
}

func isDir(st *unix.Stat_t) bool     { return st.Mode&unix.S_IFMT == unix.S_IFDIR }
func isSymlink(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFLNK }

// isWhiteout says whether st is what overlay marks a deletion with.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// readNames returns the names in the directory fd, in order. fd is read from
// the start.
func readNames(fd int, buf []byte) ([]string, error) {
	if _, err := unix.Seek(fd, 0, 0); err != nil {
		return nil, err
	}
	var names []string
	for {
		n, err := retry(func() (int, error) { return unix.ReadDirent(fd, buf) })
		if err != nil {
			return nil, err
		}
		if n == 0 {
			slices.Sort(names)
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// xattrFile is a file whose xattrs are wanted: an open one, or a name in a
// directory, which may be a symlink or a device that can't be opened.
type xattrFile struct {
	fd   int
	path string // if not empty, used instead of fd
}

func (f xattrFile) list(buf []byte) (int, error) {
	if f.path != "" {
		return unix.Llistxattr(f.path, buf)
	}
	return unix.Flistxattr(f.fd, buf)
}

func (f xattrFile) get(name string, buf []byte) (int, error) {
	if f.path != "" {
		return unix.Lgetxattr(f.path, name, buf)
	}
	return unix.Fgetxattr(f.fd, name, buf)
}

func (f xattrFile) set(name string, value []byte) error {
	if f.path != "" {
		return unix.Lsetxattr(f.path, name, value, 0)
	}
	return unix.Fsetxattr(f.fd, name, value, 0)
}

// names returns the names of all xattrs, in order. A file system without has
// none.
func (f xattrFile) names() ([]string, error) {
	var small [256]byte
	buf := small[:]
	for {
		n, err := f.list(buf)
		switch {
		case err == unix.ENOTSUP:
			return nil, nil
		case err == unix.ERANGE:
			if n, err = f.list(nil); err != nil {
				return nil, err
			}
			buf = make([]byte, n+256)
		case err != nil:
			return nil, err
		case n == 0:
			return nil, nil
		default:
			names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
			slices.Sort(names)
			return names, nil
		}
	}
}

// value returns an xattr; ok is false if there is none.
func (f xattrFile) value(name string) (value []byte, ok bool, err error) {
	var small [256]byte
	buf := small[:]
	for {
		n, err := f.get(name, buf)
		switch {
		case err == unix.ENODATA, err == unix.ENOTSUP:
			return nil, false, nil
		case err == unix.ERANGE:
			if n, err = f.get(name, nil); err != nil {
				return nil, false, err
			}
			buf = make([]byte, n+64)
		case err != nil:
			return nil, false, err
		default:
			return bytes.Clone(buf[:n]), true, nil
		}
	}
}

// copyMeta gives the file to the owner, xattrs, mode and times of from.
func copyMeta(from, to int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if _, err := copyXattrs(xattrFile{fd: from}, xattrFile{fd: to}); err != nil {
		return err
	}
	// After the owner, whose change takes the set-id bits.
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	return futimens(to, st.Atim, st.Mtim)
}

// copyXattrs copies all xattrs but overlay's own, and returns their names.
func copyXattrs(from, to xattrFile) (copied []string, err error) {
	names, err := from.names()
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	for _, name := range names {
		if isOverlayXattr(name) {
			continue
		}
		value, ok, err := from.value(name)
		if err != nil {
			return nil, fmt.Errorf("get xattr %s: %w", name, err)
		}
		if !ok {
			continue
		}
		err = to.set(name, value)
		if errors.Is(err, unix.ENOTSUP) {
			continue // a label that the file system makes up, the same on both
		}
		if err != nil {
			return nil, fmt.Errorf("set xattr %s: %w", name, err)
		}
		copied = append(copied, name)
	}
	return copied, nil
}

// futimens sets the times of an open file.
func futimens(fd int, atime, mtime unix.Timespec) error {
	ts := [2]unix.Timespec{atime, mtime}
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&ts)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("set times: %w", errno)
	}
	return nil
}
