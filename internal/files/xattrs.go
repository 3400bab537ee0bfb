package files

import (
	"bytes"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Xattrs are the extended attributes of one file.
type Xattrs struct {
	fd   int
	path string // if not empty, used instead of fd
}

// XattrsOf returns those of an open file.
func XattrsOf(fd int) Xattrs { return Xattrs{fd: fd} }

// XattrsAt returns those of name in dir, which may be a link or a device, which
// can't be opened.
func XattrsAt(dir int, name string) Xattrs { return Xattrs{path: Path(dir) + "/" + name} }

func (x Xattrs) list(buf []byte) (int, error) {
	if x.path != "" {
		return unix.Llistxattr(x.path, buf)
	}
	return unix.Flistxattr(x.fd, buf)
}

func (x Xattrs) get(name string, buf []byte) (int, error) {
	if x.path != "" {
		return unix.Lgetxattr(x.path, name, buf)
	}
	return unix.Fgetxattr(x.fd, name, buf)
}

// Set sets one of them.
func (x Xattrs) Set(name string, value []byte) error {
	if x.path != "" {
		return unix.Lsetxattr(x.path, name, value, 0)
	}
	return unix.Fsetxattr(x.fd, name, value, 0)
}

// Names returns the names of all, in order. A file system without has none.
func (x Xattrs) Names() ([]string, error) {
	all, err := grow(x.list)
	if err == unix.ENOTSUP || err == nil && len(all) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	names := strings.Split(strings.TrimSuffix(string(all), "\x00"), "\x00")
	slices.Sort(names)
	return names, nil
}

// Get returns one of them; ok is false if there is none of that name.
func (x Xattrs) Get(name string) (value []byte, ok bool, err error) {
	value, err = grow(func(buf []byte) (int, error) { return x.get(name, buf) })
	if err == unix.ENODATA || err == unix.ENOTSUP {
		return nil, false, nil
	}
	return value, err == nil, err
}

// grow calls read with a buffer that is large enough.
func grow(read func(buf []byte) (int, error)) ([]byte, error) {
	var small [256]byte
	buf := small[:]
	for {
		n, err := read(buf)
		if err == nil {
			return bytes.Clone(buf[:n]), nil
		}
		if err != unix.ERANGE {
			return nil, err
		}
		if n, err = read(nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n+64)
	}
}
