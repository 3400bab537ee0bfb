package contenthash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
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
	f := os.NewFile(uintptr(fd), files.Path(fd))
	entries, err := f.ReadDir(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("list %s: %w", shown(at), err)
	}
	if s.root.witness != nil {
		if err := s.root.witness.Dir(s.ctx, strings.TrimPrefix(at, "/")); err != nil {
			return err
		}
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
	if n.link, err = files.Readlink(fd, n.name); err != nil {
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
