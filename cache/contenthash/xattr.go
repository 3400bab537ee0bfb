package contenthash

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// xattrCalls are the two system calls on one file.
type xattrCalls struct {
	list func(dst []byte) (int, error)
	get  func(key string, dst []byte) (int, error)
}

func openXattrs(fd int) xattrCalls {
	return xattrCalls{
		list: func(dst []byte) (int, error) { return unix.Flistxattr(fd, dst) },
		get:  func(key string, dst []byte) (int, error) { return unix.Fgetxattr(fd, key, dst) },
	}
}

// pathXattrs is for what can't be opened: links and special files. The path
// starts with that of an open directory.
func pathXattrs(path string) xattrCalls {
	return xattrCalls{
		list: func(dst []byte) (int, error) { return unix.Llistxattr(path, dst) },
		get:  func(key string, dst []byte) (int, error) { return unix.Lgetxattr(path, key, dst) },
	}
}

// readXattrs returns the attributes that enter a digest. Those in which overlay
// keeps its books are no content: a mount hides them, a plain layer doesn't.
func readXattrs(calls xattrCalls) (map[string][]byte, error) {
	names, err := grow(calls.list)
	if err == unix.EOPNOTSUPP || len(names) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	xattrs := map[string][]byte{}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !xattrHashed(key) || strings.HasPrefix(key, "trusted.overlay.") {
			continue
		}
		value, err := grow(func(dst []byte) (int, error) { return calls.get(key, dst) })
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", key, err)
		}
		xattrs[key] = value
	}
	return xattrs, nil
}

// grow calls read with a buffer that is large enough.
func grow(read func(dst []byte) (int, error)) ([]byte, error) {
	var small [256]byte
	b := small[:]
	for {
		n, err := read(b)
		if err == nil {
			return append([]byte(nil), b[:n]...), nil
		}
		if err != unix.ERANGE {
			return nil, err
		}
		if n, err = read(nil); err != nil {
			return nil, err
		}
		b = make([]byte, n+64)
	}
}
