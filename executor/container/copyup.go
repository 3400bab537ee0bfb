//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// copyTree copies what is in the directory from to the directory to: files,
// links, devices, with their owners, modes, times and extended attributes. It
// follows no link. Hard links become files of their own.
func copyTree(from, to int) error {
	// The caller's may be for paths only.
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	src, err := unix.Openat(from, ".", flags, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(src), ".")
	dst, err := unix.Openat(to, ".", flags, 0)
	if err != nil {
		return errors.Join(err, dir.Close())
	}
	names, err := dir.Readdirnames(-1)
	for _, name := range names {
		if err = errors.Join(err, copyEntry(src, dst, name)); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			break
		}
	}
	if err == nil {
		err = copyAttributes(src, dst)
	}
	return errors.Join(err, unix.Close(dst), dir.Close())
}

// copyEntry copies one entry of a directory.
func copyEntry(src, dst int, name string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(src, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	const noFollow = unix.O_NOFOLLOW | unix.O_CLOEXEC
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dst, name, 0o700); err != nil {
			return err
		}
		return withBoth(src, dst, name, unix.O_RDONLY|unix.O_DIRECTORY|noFollow, unix.O_RDONLY|unix.O_DIRECTORY|noFollow, copyTree)
	case unix.S_IFREG:
		return withBoth(src, dst, name, unix.O_RDONLY|noFollow, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|noFollow, copyFile)
	case unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(src, name, target)
		if err == nil {
			err = unix.Symlinkat(string(target[:n]), dst, name)
		}
		return errors.Join(err, setOwner(dst, name, st))
	case unix.S_IFSOCK:
		return nil // of a process that isn't in the container
	}
	if err := unix.Mknodat(dst, name, st.Mode&unix.S_IFMT, int(st.Rdev)); err != nil {
		return err
	}
	return errors.Join(setOwner(dst, name, st), unix.Fchmodat(dst, name, st.Mode&0o7777, 0))
}

func setOwner(dst int, name string, st unix.Stat_t) error {
	err := unix.Fchownat(dst, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW)
	return errors.Join(err, unix.UtimesNanoAt(dst, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
}

// withBoth opens an entry in both directories.
func withBoth(src, dst int, name string, readFlags, writeFlags int, do func(from, to int) error) error {
	from, err := unix.Openat(src, name, readFlags, 0)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := unix.Openat(dst, name, writeFlags, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(do(from, to), unix.Close(to))
}

func copyFile(from, to int) error {
	if _, err := io.Copy(fdWriter(to), fdReader(from)); err != nil {
		return err
	}
	return copyAttributes(from, to)
}

// fdReader and fdWriter are files that somebody else closes.
type (
	fdReader int
	fdWriter int
)

func (fd fdReader) Read(b []byte) (int, error) {
	n, err := unix.Read(int(fd), b)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (fd fdWriter) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		n, err := unix.Write(int(fd), b[done:])
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(b), nil
}

// copyAttributes makes to have from's owner, mode, extended attributes and
// times. Attributes that a tmpfs doesn't have are left out.
func copyAttributes(from, to int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	return unix.UtimesNanoAt(to, "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
}

func copyXattrs(from, to int) error {
	list := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			break // there are none
		}
		size, err := unix.Fgetxattr(from, name, value)
		if err == nil {
			err = unix.Fsetxattr(to, name, value[:size], 0)
		}
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}
