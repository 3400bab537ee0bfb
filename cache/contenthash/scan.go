package contenthash

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// scanner fills a tree from the record's files, for one call that holds it.
type scanner struct {
	ctx  context.Context
	rec  record
	tree *tree

	root    rootDir // opened when first needed
	opened  bool
	changed bool // the tree knows more than what is stored
}

func (s *scanner) close() error {
	if !s.opened {
		return nil
	}
	return s.root.close()
}

// openDir opens the directory at, none of whose elements may be a symlink.
func (s *scanner) openDir(at string) (int, error) {
	if !s.opened {
		root, err := s.rec.openRoot(s.ctx)
		if err != nil {
			return -1, err
		}
		s.root, s.opened = root, true
	}
	return openBelow(s.root.fd, at)
}

// openBelow opens the directory at below root. Longer paths than the kernel
// takes at once are walked in pieces.
func openBelow(root int, at string) (int, error) {
	const most = 4000 // below PATH_MAX
	how := &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	}
	from, rest := root, strings.TrimPrefix(at, "/")
	for {
		piece := rest
		if len(piece) > most {
			piece = rest[:strings.LastIndexByte(rest[:most], '/')]
		}
		rest = strings.TrimPrefix(rest[len(piece):], "/")
		if piece == "" {
			piece = "."
		}
		fd, err := unix.Openat2(from, piece, how)
		if from != root {
			unix.Close(from)
		}
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: shown(at), Err: err}
		}
		if rest == "" {
			return fd, nil
		}
		from = fd
	}
}

// shown is the form in which errors name a path.
func shown(at string) string {
	if at == "" {
		return "/"
	}
	return at
}

// list makes the children of the directory n known.
func (s *scanner) list(n *node, at string) error {
	if n.listed {
		return nil
	}
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	fd, err := s.openDir(at)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), procPath(fd))
	entries, err := f.ReadDir(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("list %s: %w", shown(at), err)
	}
	slab := make([]node, len(entries))
	children := make([]*node, len(entries))
	for i, e := range entries {
		c := &slab[i]
		c.name = e.Name()
		switch {
		case e.IsDir():
			c.kind, c.dirNode = dir, &dirNode{}
		case e.Type()&fs.ModeSymlink != 0:
			c.kind = symlink
		}
		if known := n.child(c.name); known != nil && known.kind == c.kind {
			c = known
		}
		children[i] = c
	}
	slices.SortFunc(children, func(a, b *node) int { return strings.Compare(a.name, b.name) })
	n.children, n.listed = children, true
	s.changed = true
	return nil
}

// lookup returns the node at a clean path, nil if there is no such file. It
// follows no links.
func (s *scanner) lookup(at string) (*node, error) {
	n, here, rest := s.tree.root, "", strings.TrimPrefix(at, "/")
	for rest != "" {
		if n.kind != dir {
			return nil, nil
		}
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		c := n.child(name)
		if c == nil {
			if err := s.list(n, here); err != nil {
				return nil, err
			}
			if c = n.child(name); c == nil {
				return nil, nil
			}
		}
		n, here = c, here+"/"+name
	}
	return n, nil
}

const maxLinks = 255

var errTooManyLinks = errors.New("too many links")

// resolve follows the links in p, and one at its end if follow is set, inside
// the record. It returns where that leads and the node there, nil if there is
// nothing. Elements that don't exist are taken as they are written, so that
// ".." undoes them.
func (s *scanner) resolve(p string, follow bool) (*node, string, error) {
	n, at, rest := s.tree.root, "", strings.TrimPrefix(p, "/")
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		next := keyPath(path.Join("/", at, name))
		var err error
		if n, err = s.lookup(next); err != nil {
			return nil, "", err
		}
		if n == nil || n.kind != symlink || !follow && rest == "" {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return nil, "", errTooManyLinks
		}
		link, err := s.readlink(n, next)
		if err != nil {
			return nil, "", err
		}
		rest = link + "/" + rest
		if path.IsAbs(link) {
			at = ""
		}
	}
	return n, at, nil
}

func (s *scanner) readlink(n *node, at string) (string, error) {
	if n.linked {
		return n.link, nil
	}
	fd, err := s.openDir(path.Dir(at))
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if n.link, err = readlinkat(fd, n.name); err != nil {
		return "", &fs.PathError{Op: "readlink", Path: at, Err: err}
	}
	n.linked, s.changed = true, true
	return n.link, nil
}

// fill makes the digest of n known, for a directory the recursive one.
func (s *scanner) fill(n *node, at string) error {
	if n.kind == dir && n.folded || n.kind != dir && n.hashed {
		return nil
	}
	var todo work
	if n.kind != dir {
		todo.add(path.Dir(at), n)
	} else if err := s.collect(n, at, &todo); err != nil {
		return err
	}
	if err := s.hash(todo); err != nil {
		return err
	}
	if n.kind == dir {
		n.fold()
		s.changed = true
	}
	return nil
}

// collect adds to todo what below the directory n isn't hashed yet.
func (s *scanner) collect(n *node, at string, todo *work) error {
	if n.folded {
		return nil
	}
	if err := s.list(n, at); err != nil {
		return err
	}
	todo.addDir(at, n)
	for _, c := range n.children {
		if c.kind != dir {
			todo.add(at, c)
		}
	}
	for _, c := range n.children {
		if c.kind == dir {
			if err := s.collect(c, at+"/"+c.name, todo); err != nil {
				return err
			}
		}
	}
	return nil
}

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
		if err := h.batch(ctx, s.root.fd, todo[i]); err != nil {
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

func (h *hasher) batch(ctx context.Context, root int, b batch) error {
	fd, err := openBelow(root, b.at)
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
		if err := h.file(ctx, fd, n); err != nil {
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
	xattrs, err := readXattrs(openXattrs(fd))
	if err != nil {
		return err
	}
	return h.finish(b.self, entryOf(&st, "", xattrs))
}

// file hashes the file, link or special file n in the directory dirfd.
func (h *hasher) file(ctx context.Context, dirfd int, n *node) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, n.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	xattrsOf := pathXattrs(procPath(dirfd) + "/" + n.name)
	fd := -1
	if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 {
		var err error
		if fd, err = openFile(dirfd, n.name); err != nil {
			return err
		}
		defer unix.Close(fd)
		xattrsOf = openXattrs(fd)
	}
	xattrs, err := readXattrs(xattrsOf)
	if err != nil {
		return err
	}
	if n.kind == symlink && !n.linked {
		if n.link, err = readlinkat(dirfd, n.name); err != nil {
			return err
		}
		n.linked = true
	}
	h.sha.Reset()
	if err := h.write(entryOf(&st, n.link, xattrs)); err != nil {
		return err
	}
	if fd >= 0 {
		if err := h.content(ctx, fd); err != nil {
			return err
		}
	}
	h.take(n)
	return nil
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
	e := Entry{Mode: fs.FileMode(st.Mode & 0o777), UID: st.Uid, GID: st.Gid, Size: st.Size, Linkname: link, Xattrs: xattrs}
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
	if st.Mode&unix.S_ISUID != 0 {
		e.Mode |= fs.ModeSetuid
	}
	if st.Mode&unix.S_ISGID != 0 {
		e.Mode |= fs.ModeSetgid
	}
	if st.Mode&unix.S_ISVTX != 0 {
		e.Mode |= fs.ModeSticky
	}
	return e
}

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// openFile opens a regular file for reading, without a write to its access
// time where we may ask for that.
func openFile(dirfd int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(dirfd, name, flags|unix.O_NOATIME, 0)
	if err == unix.EPERM {
		fd, err = unix.Openat(dirfd, name, flags, 0)
	}
	return fd, err
}

func readlinkat(dirfd int, name string) (string, error) {
	for size := 256; ; size *= 2 {
		b := make([]byte, size)
		n, err := unix.Readlinkat(dirfd, name, b)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(b[:n]), nil
		}
	}
}
