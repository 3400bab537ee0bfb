// Package files has what the standard library lacks for trees that somebody else
// has filled, such as snapshots: calls on names in open directories, which no link
// leads elsewhere, extended attributes, and copies of data in the kernel.
//
// Descriptors are plain numbers and stay the caller's. Errors are the kernel's
// own, comparable with ==, where nothing else is said.
package files

import (
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// dirFlags open a directory to work in, never through a link.
const dirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// OpenDir opens the directory name in dir.
func OpenDir(dir int, name string) (int, error) {
	return Retry(func() (int, error) { return unix.Openat(dir, name, dirFlags, 0) })
}

// OpenFile opens the regular file name in dir for reading, without a write to its
// access time where we may ask for that.
func OpenFile(dir int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := Retry(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_NOATIME, 0) })
	if err == unix.EPERM {
		fd, err = Retry(func() (int, error) { return unix.Openat(dir, name, flags, 0) })
	}
	return fd, err
}

// OpenBeneath opens path below dir. None of its elements may be a link.
func OpenBeneath(dir int, path string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		// EAGAIN: something was renamed meanwhile, so that the kernel couldn't
		// tell whether the path is still below.
		fd, err := unix.Openat2(dir, path, &how)
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// Retry repeats a call that a signal interrupted.
func Retry(fn func() (int, error)) (int, error) {
	for {
		n, err := fn()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Path is a path of an open file, for the few calls that can't be told a
// descriptor.
func Path(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Lstat describes name in dir; a link itself.
func Lstat(dir int, name string, st *unix.Stat_t) error {
	for {
		if err := unix.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW); err != unix.EINTR {
			return err
		}
	}
}

// IsDir says whether st describes a directory.
func IsDir(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

// IsLink says whether st describes a symbolic link.
func IsLink(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFLNK }

// IsRegular says whether st describes a regular file.
func IsRegular(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFREG }

// Readlink returns where the link name in dir leads.
func Readlink(dir int, name string) (string, error) {
	for size := 256; ; size *= 2 {
		b := make([]byte, size)
		n, err := unix.Readlinkat(dir, name, b)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(b[:n]), nil
		}
	}
}

// namesBuffer is for reading a directory. Trees are small and gone through by the
// thousand: with a buffer for each, these would be half of what a prune allocates.
type namesBuffer [16 << 10]byte

var namesBuffers = sync.Pool{New: func() any { return new(namesBuffer) }}

// Names returns the names in the open directory dir, in order. It reads dir from
// the start.
func Names(dir int) ([]string, error) {
	if _, err := unix.Seek(dir, 0, 0); err != nil {
		return nil, err
	}
	buf := namesBuffers.Get().(*namesBuffer)
	defer namesBuffers.Put(buf)
	var names []string
	for {
		n, err := Retry(func() (int, error) { return unix.ReadDirent(dir, buf[:]) })
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

// SetTimes sets the times of the open file fd.
func SetTimes(fd int, atime, mtime unix.Timespec) error {
	return unix.UtimesNanoAt(fd, "", []unix.Timespec{atime, mtime}, unix.AT_EMPTY_PATH)
}
