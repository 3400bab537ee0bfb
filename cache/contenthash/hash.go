package contenthash

import (
	"context"
	"crypto/sha256"
	"hash"
	"io/fs"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// batch is a few files of one directory, or its own header.
type batch struct {
	at    string
	self  *node
	files []*node
}

const batchSize = 64

// work is what is to be hashed.
type work []batch

func (w *work) add(at string, n *node) {
	if n.hashed {
		return
	}
	if l := len(*w) - 1; l >= 0 && (*w)[l].at == at && len((*w)[l].files) < batchSize {
		(*w)[l].files = append((*w)[l].files, n)
		return
	}
	*w = append(*w, batch{at: at, files: []*node{n}})
}

func (w *work) addDir(at string, n *node) {
	if !n.hashed {
		*w = append(*w, batch{at: at, self: n})
	}
}

// hash computes the heads of all of todo, on several goroutines.
func (s *scanner) hash(todo work) error {
	if len(todo) == 0 {
		return nil
	}
	s.changed = true // even if some fail, others won't
	if !s.opened {
		fd, err := s.openDir("")
		if err != nil {
			return err
		}
		unix.Close(fd)
	}
	workers := min(len(todo), runtime.GOMAXPROCS(0), 8)
	if workers == 1 {
		return s.hashAll(s.ctx, todo, new(atomic.Int64))
	}
	eg, ctx := errgroup.WithContext(s.ctx)
	var next atomic.Int64
	for range workers {
		eg.Go(func() error { return s.hashAll(ctx, todo, &next) })
	}
	return eg.Wait()
}

// hashAll takes batches until there are none.
func (s *scanner) hashAll(ctx context.Context, todo work, next *atomic.Int64) error {
	h := hashers.Get().(*hasher)
	defer hashers.Put(h)
	for {
		i := int(next.Add(1)) - 1
		if i >= len(todo) {
			return nil
		}
		if err := h.batch(ctx, s.root, todo[i]); err != nil {
			return err
		}
	}
}

// hasher is what one goroutine hashes with.
type hasher struct {
	sha hash.Hash
	buf []byte
	sum []byte
}

var hashers = sync.Pool{New: func() any {
	return &hasher{sha: sha256.New(), buf: make([]byte, 128<<10), sum: make([]byte, 0, sha256.Size)}
}}

func (h *hasher) batch(ctx context.Context, root rootDir, b batch) error {
	fd, err := openBelow(root.fd, b.at)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if b.self != nil {
		if err := h.header(fd, b); err != nil {
			return &fs.PathError{Op: "hash", Path: shown(b.at), Err: err}
		}
	}
	for _, n := range b.files {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		st, err := h.file(ctx, fd, n)
		if err == nil && root.witness != nil {
			if err = root.witness.File(ctx, strings.TrimPrefix(b.at+"/"+n.name, "/"), &st); err != nil {
				n.hashed = false
			}
		}
		if err != nil {
			return &fs.PathError{Op: "hash", Path: b.at + "/" + n.name, Err: err}
		}
	}
	return nil
}

// header hashes the open directory fd.
func (h *hasher) header(fd int, b batch) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	xattrs, err := readXattrs(files.XattrsOf(fd))
	if err != nil {
		return err
	}
	return h.finish(b.self, entryOf(&st, "", xattrs))
}

// file hashes the file, link or special file n in the directory dirfd, and
// returns what it looked like before.
func (h *hasher) file(ctx context.Context, dirfd int, n *node) (st unix.Stat_t, err error) {
	if err := unix.Fstatat(dirfd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return st, err
	}
	xattrsOf := files.XattrsAt(dirfd, n.name)
	fd := -1
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 {
		if fd, err = files.OpenFile(dirfd, n.name); err != nil {
			return st, err
		}
		defer unix.Close(fd)
		xattrsOf = files.XattrsOf(fd)
	}
	xattrs, err := readXattrs(xattrsOf)
	if err != nil {
		return st, err
	}
	if n.kind == symlink && !n.linked {
		if n.link, err = files.Readlink(dirfd, n.name); err != nil {
			return st, err
		}
		n.linked = true
	}
	h.sha.Reset()
	if err := h.write(entryOf(&st, n.link, xattrs)); err != nil {
		return st, err
	}
	if fd >= 0 {
		if err := h.content(ctx, fd); err != nil {
			return st, err
		}
	}
	h.take(n)
	return st, nil
}

func (h *hasher) finish(n *node, e Entry) error {
	h.sha.Reset()
	if err := h.write(e); err != nil {
		return err
	}
	h.take(n)
	return nil
}

func (h *hasher) write(e Entry) error {
	b, err := Header(e)
	if err != nil {
		return err
	}
	h.sha.Write(b)
	return nil
}

func (h *hasher) take(n *node) {
	h.sum = h.sha.Sum(h.sum[:0])
	n.head, n.hashed = sum(h.sum), true
}

func (h *hasher) content(ctx context.Context, fd int) error {
	for {
		n, err := unix.Read(fd, h.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		h.sha.Write(h.buf[:n])
		if err := context.Cause(ctx); err != nil {
			return err
		}
	}
}

// entryOf is what of a file on disk enters its digest. Device numbers don't:
// upstream leaves them out of a scan, though not of what is received.
func entryOf(st *unix.Stat_t, link string, xattrs map[string][]byte) Entry {
	e := Entry{Mode: files.GoPerm(st.Mode), UID: st.Uid, GID: st.Gid, Size: st.Size, Linkname: link, Xattrs: xattrs}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Mode |= fs.ModeDir
	case unix.S_IFLNK:
		e.Mode |= fs.ModeSymlink | 0o777
	case unix.S_IFBLK:
		e.Mode |= fs.ModeDevice
	case unix.S_IFCHR:
		e.Mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFIFO:
		e.Mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		e.Mode |= fs.ModeSocket
	}
	return e
}
