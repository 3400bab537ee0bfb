package contenthash

import (
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/opencontainers/go-digest"
)

// Entry is a file, directory or link as it arrived.
type Entry struct {
	Path     string
	Mode     fs.FileMode // Go's mode bits, as fsutil sends them
	UID, GID uint32
	Size     int64
	// ModTime, in nanoseconds, is kept so that a receiver can compare what it
	// has with what is offered; it never enters a digest.
	ModTime  int64
	Linkname string // of a symlink, or the path a hard link points to
	DevMajor int64
	DevMinor int64
	Xattrs   map[string][]byte
	// Digest is sha256 over the tarsum header of the entry followed by the
	// file's bytes; see Header. That of a hard link is taken from the file it
	// points to, if that is recorded.
	Digest digest.Digest
}

// Header returns the bytes that a file's digest starts with: the fields of a
// tar header without name and mtime, each as its name directly followed by its
// value, in the order below (the tarsum format, version 1). Extended
// attributes follow in byte order, without security.* and system.* except for
// file capabilities.
func Header(e Entry) ([]byte, error) {
	typeflag, size, linkname := byte('0'), int64(0), ""
	switch t := e.Mode.Type() &^ (fs.ModeSocket | fs.ModeIrregular); {
	case t == 0:
		size = e.Size // a socket, too, is hashed as a file
	case t&fs.ModeDir != 0:
		typeflag = '5'
	case t&fs.ModeSymlink != 0:
		typeflag, linkname = '2', e.Linkname
	case t&fs.ModeCharDevice != 0 && t&fs.ModeDevice != 0:
		typeflag = '3'
	case t&fs.ModeDevice != 0:
		typeflag = '4'
	case t&fs.ModeNamedPipe != 0:
		typeflag = '6'
	default:
		return nil, fmt.Errorf("content digest of %q: unknown file type %s", e.Path, e.Mode)
	}

	b := make([]byte, 0, 128)
	str := func(key, value string) { b = append(append(b, key...), value...) }
	num := func(key string, value int64) { b = strconv.AppendInt(append(b, key...), value, 10) }
	str("name", "")
	num("mode", int64(files.Perm(e.Mode)))
	num("uid", int64(e.UID))
	num("gid", int64(e.GID))
	num("size", size)
	str("typeflag", string(rune(typeflag)))
	str("linkname", linkname)
	str("uname", "")
	str("gname", "")
	num("devmajor", e.DevMajor)
	num("devminor", e.DevMinor)
	for _, k := range hashedXattrs(e.Xattrs) {
		str(k, string(e.Xattrs[k]))
	}
	return b, nil
}

func hashedXattrs(xattrs map[string][]byte) []string {
	if len(xattrs) == 0 {
		return nil
	}
	keys := make([]string, 0, len(xattrs))
	for k := range xattrs {
		if xattrHashed(k) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

func xattrHashed(key string) bool {
	return key == "security.capability" || !strings.HasPrefix(key, "security.") && !strings.HasPrefix(key, "system.")
}
