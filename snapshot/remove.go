package snapshot

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// removeTries is how often a directory is emptied that somebody, such as a process
// that is about to end, still writes to.
const removeTries = 5

// removeTree removes the file or directory tree name in the directory at. A
// missing one is fine. Snapshots are small and go by the thousand: this makes half
// the system calls of os.RemoveAll.
func removeTree(at int, name string) error {
	err := unlinkAt(at, name, 0)
	if err != unix.EISDIR {
		return missingIsFine(name, err)
	}
	for range removeTries {
		err = unlinkAt(at, name, unix.AT_REMOVEDIR)
		if err != unix.ENOTEMPTY && err != unix.EEXIST {
			return missingIsFine(name, err)
		}
		if err := clearDir(at, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return missingIsFine(name, unlinkAt(at, name, unix.AT_REMOVEDIR))
}

// clearDir removes all that is in the directory name in at.
func clearDir(at int, name string) error {
	fd, err := openDir(at, name)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	buf := namesBuffers.Get().(*namesBuffer)
	names, err := readNames(fd, buf[:])
	namesBuffers.Put(buf)
	if err == unix.ENOENT { // removed meanwhile
		return nil
	}
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	for _, name := range names {
		if err := removeTree(fd, name); err != nil {
			return err
		}
	}
	return nil
}

func unlinkAt(at int, name string, flags int) error {
	for {
		if err := unix.Unlinkat(at, name, flags); err != unix.EINTR {
			return err
		}
	}
}

func missingIsFine(name string, err error) error {
	if err == nil || err == unix.ENOENT {
		return nil
	}
	return fmt.Errorf("remove %s: %w", name, err)
}
