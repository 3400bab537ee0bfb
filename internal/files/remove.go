package files

import (
	"encoding/binary"
	"io/fs"

	"golang.org/x/sys/unix"
)

// removeTries is how often a directory is gone through that somebody, such as a
// process that is about to end, still writes to.
const removeTries = 5

// RemoveAll removes the file or directory tree name in the directory dir. A
// missing one is fine. An error about something in the tree is an *fs.PathError.
//
// Trees are small and go by the thousand: this makes a third of the system calls
// of os.RemoveAll.
func RemoveAll(dir int, name string) error {
	err := unlink(dir, name, 0)
	if err == unix.EISDIR {
		return removeDir(dir, name)
	}
	return missingIsFine(err)
}

// removeDir is RemoveAll of what is most likely a directory.
func removeDir(dir int, name string) error {
	fd, err := OpenDir(dir, name)
	if err == unix.ENOTDIR || err == unix.ELOOP { // it has become something else
		return missingIsFine(unlink(dir, name, 0))
	}
	if err != nil {
		return missingIsFine(err)
	}
	defer unix.Close(fd)
	buf := namesBuffers.Get().(*namesBuffer)
	defer namesBuffers.Put(buf)
	for ends := 0; ; {
		n, err := Retry(func() (int, error) { return unix.ReadDirent(fd, buf[:]) })
		if err != nil {
			return missingIsFine(err) // removed meanwhile
		}
		if err := clearEntries(fd, buf[:n]); err != nil {
			return err
		}
		if n > len(buf)/2 {
			continue // there are more, most likely
		}
		err = unlink(dir, name, unix.AT_REMOVEDIR)
		if err != unix.ENOTEMPTY && err != unix.EEXIST || ends == removeTries {
			return missingIsFine(err)
		}
		if n == 0 {
			ends++
			if _, err := unix.Seek(fd, 0, 0); err != nil {
				return err
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
		remove := RemoveAll
		if entry[kind] == unix.DT_DIR {
			remove = removeDir
		}
		if err := remove(fd, name); err != nil {
			return &fs.PathError{Op: "remove", Path: name, Err: err}
		}
	}
	return nil
}

func unlink(dir int, name string, flags int) error {
	for {
		if err := unix.Unlinkat(dir, name, flags); err != unix.EINTR {
			return err
		}
	}
}

func missingIsFine(err error) error {
	if err == unix.ENOENT {
		return nil
	}
	return err
}
