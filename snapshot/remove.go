package snapshot

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// removeTries is how often a directory is gone through that somebody, such as a
// process that is about to end, still writes to.
const removeTries = 5

// removeTree removes the file or directory tree name in the directory at. A
// missing one is fine. Snapshots are small and go by the thousand: this makes a
// third of the system calls of os.RemoveAll.
func removeTree(at int, name string) error {
	err := unlinkAt(at, name, 0)
	if err == unix.EISDIR {
		return removeDir(at, name)
	}
	return missingIsFine(name, err)
}

// removeDir is removeTree of what is most likely a directory.
func removeDir(at int, name string) error {
	fd, err := openDir(at, name)
	if err == unix.ENOTDIR || err == unix.ELOOP { // it has become something else
		return missingIsFine(name, unlinkAt(at, name, 0))
	}
	if err != nil {
		return missingIsFine(name, err)
	}
	defer unix.Close(fd)
	buf := namesBuffers.Get().(*namesBuffer)
	defer namesBuffers.Put(buf)
	for ends := 0; ; {
		n, err := retry(func() (int, error) { return unix.ReadDirent(fd, buf[:]) })
		if err == unix.ENOENT { // removed meanwhile
			return nil
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", name, err)
		}
		if err := clearEntries(fd, buf[:n]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if n > len(buf)/2 {
			continue // there are more, most likely
		}
		err = unlinkAt(at, name, unix.AT_REMOVEDIR)
		if err != unix.ENOTEMPTY && err != unix.EEXIST || ends == removeTries {
			return missingIsFine(name, err)
		}
		if n == 0 {
			ends++
			if _, err := unix.Seek(fd, 0, 0); err != nil {
				return fmt.Errorf("list %s: %w", name, err)
			}
		}
	}
}

// clearEntries removes what the directory fd has by the entries in data, which
// were read from it.
func clearEntries(fd int, data []byte) error {
	const length, kind, text = 16, 18, 19 // where an entry has its parts
	for len(data) > 0 {
		entry := data[:binary.NativeEndian.Uint16(data[length:])]
		data = data[len(entry):]
		name := unix.ByteSliceToString(entry[text:])
		if name == "." || name == ".." {
			continue
		}
		remove := removeTree
		if entry[kind] == unix.DT_DIR {
			remove = removeDir
		}
		if err := remove(fd, name); err != nil {
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
