package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Difference is a path that two trees don't agree in.
type Difference struct {
	Path string // "/" is the root; of what only one of them has, the topmost
	What string // such as "content" or "only in the first"
}

func (d Difference) String() string { return d.Path + " (" + d.What + ")" }

// What a Difference can be, beside the two that name a side.
const (
	OnlyInFirst  = "only in the first"
	OnlyInSecond = "only in the second"
)

// Compare calls found for every path that a and b don't agree in, in order: its
// kind, mode, owner, capabilities, device, link target or content. What doesn't
// survive as a layer doesn't count: sockets and other attributes; nor do times,
// and which names are one file. The files themselves are read, whatever their
// sizes and times say, but one that both have is not.
func Compare(ctx context.Context, a, b *View, found func(Difference)) error {
	c := &comparison{ctx: ctx, found: found}
	if err := c.dir(a.fd, b.fd, ".", "/"); err != nil {
		return fmt.Errorf("compare: %w", err)
	}
	return nil
}

type comparison struct {
	ctx   context.Context
	found func(Difference)
}

// dir compares the directories name in a and b, which are at path, and all
// below them.
func (c *comparison) dir(a, b int, name, path string) error {
	afd, err := files.OpenDir(a, name)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(afd)
	bfd, err := files.OpenDir(b, name)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(bfd)
	if path == "/" {
		if err := c.root(afd, bfd); err != nil {
			return err
		}
	}
	as, err := files.Names(afd)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", path, err)
	}
	bs, err := files.Names(bfd)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", path, err)
	}
	below := strings.TrimSuffix(path, "/") + "/"
	for len(as) > 0 || len(bs) > 0 {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		switch {
		case len(bs) == 0 || len(as) > 0 && as[0] < bs[0]:
			err = c.alone(afd, as[0], Difference{below + as[0], OnlyInFirst})
			as = as[1:]
		case len(as) == 0 || bs[0] < as[0]:
			err = c.alone(bfd, bs[0], Difference{below + bs[0], OnlyInSecond})
			bs = bs[1:]
		default:
			err = c.entry(afd, bfd, as[0], below+as[0])
			as, bs = as[1:], bs[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// alone reports a name that only dir has, unless it is a socket's.
func (c *comparison) alone(dir int, name string, d Difference) error {
	var st unix.Stat_t
	if err := files.Lstat(dir, name, &st); err != nil {
		return fmt.Errorf("stat %s: %w", d.Path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		c.found(d)
	}
	return nil
}

// root compares the metadata of the roots, which no directory has an entry of.
func (c *comparison) root(a, b int) error {
	var as, bs unix.Stat_t
	if err := unix.Fstat(a, &as); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	if err := unix.Fstat(b, &bs); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	what, err := differentMeta(&as, &bs, files.XattrsOf(a), files.XattrsOf(b))
	return c.outcome("/", what, err)
}

// entry compares a name that both directories have.
func (c *comparison) entry(a, b int, name, path string) error {
	var as, bs unix.Stat_t
	if err := files.Lstat(a, name, &as); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if err := files.Lstat(b, name, &bs); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if !files.IsDir(&as) && sameInode(&as, &bs) {
		return nil
	}
	what, err := differentMeta(&as, &bs, files.XattrsAt(a, name), files.XattrsAt(b, name))
	if err == nil && what == "" {
		what, err = differentData(&as, &bs, a, b, name)
	}
	if err := c.outcome(path, what, err); err != nil {
		return err
	}
	if files.IsDir(&as) && files.IsDir(&bs) {
		return c.dir(a, b, name, path)
	}
	return nil
}

func (c *comparison) outcome(path, what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if what != "" {
		c.found(Difference{path, what})
	}
	return nil
}

// sameInode tells a file that both trees have from a shared layer. Devices
// aren't compared, as each mount has one of its own; the time of the last change
// makes up for it.
func sameInode(a, b *unix.Stat_t) bool {
	return a.Ino == b.Ino && a.Ctim == b.Ctim && a.Size == b.Size && a.Mode == b.Mode
}

// capability is the xattr that is part of a layer: file capabilities, as in
// upstream's layers. What users and hosts set stays where it was set.
const capability = "security.capability"

// differentMeta names the first thing about two files, beside their data, that
// isn't the same; "" for none.
func differentMeta(a, b *unix.Stat_t, ax, bx files.Xattrs) (string, error) {
	switch {
	case a.Mode&unix.S_IFMT != b.Mode&unix.S_IFMT:
		return "type", nil
	case a.Mode != b.Mode:
		return "mode", nil
	case a.Uid != b.Uid || a.Gid != b.Gid:
		return "owner", nil
	case a.Rdev != b.Rdev:
		return "device", nil
	}
	ac, aok, err := ax.Get(capability)
	if err != nil {
		return "", err
	}
	bc, bok, err := bx.Get(capability)
	if err == nil && (aok != bok || !bytes.Equal(ac, bc)) {
		return "capabilities", nil
	}
	return "", err
}

// differentData compares what two files of the same kind hold.
func differentData(as, bs *unix.Stat_t, a, b int, name string) (string, error) {
	switch as.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if same, err := files.SameLink(a, b, name); err != nil || !same {
			return "link target", err
		}
	case unix.S_IFREG:
		if as.Size != bs.Size {
			return "size", nil
		}
		if same, err := files.SameContent(a, b, name); err != nil || !same {
			return "content", err
		}
	}
	return "", nil
}
