package files

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// SameLink says whether the link name leads to the same place in both directories.
func SameLink(a, b int, name string) (bool, error) {
	at, err := Readlink(a, name)
	if err != nil {
		return false, err
	}
	bt, err := Readlink(b, name)
	return at == bt, err
}

// SameContent says whether the regular file name has the same bytes in both
// directories.
func SameContent(a, b int, name string) (bool, error) {
	af, err := OpenFile(a, name)
	if err != nil {
		return false, err
	}
	defer unix.Close(af)
	bf, err := OpenFile(b, name)
	if err != nil {
		return false, err
	}
	defer unix.Close(bf)
	abuf, bbuf := buffers.Get().(*buffer), buffers.Get().(*buffer)
	defer buffers.Put(abuf)
	defer buffers.Put(bbuf)
	for off := int64(0); ; {
		an, err := unix.Pread(af, abuf[:], off)
		if err != nil {
			return false, err
		}
		bn, err := unix.Pread(bf, bbuf[:], off)
		if err != nil {
			return false, err
		}
		n := min(an, bn)
		if n == 0 || !bytes.Equal(abuf[:n], bbuf[:n]) {
			return an == 0 && bn == 0, nil
		}
		off += int64(n)
	}
}
