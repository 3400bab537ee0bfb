// Package filetree reads and changes directory trees that somebody else has filled:
// the filesystem states that file and diff ops work on. It makes, removes, copies and
// unpacks files below a Root, and looks names up there, each with the rules of the
// protocol for such a step, of which it knows nothing else: ops says what to do, on
// which states, and what that is worth as a cache key.
//
// Trees are hostile: an image may hold links to anywhere, devices and pipes, and so
// may an archive. Paths mean what they mean after a chroot: links lead to places
// inside the tree and ".." stops at its root. This takes two steps. Root.resolve
// follows the links in a path, reading each as one below the root; the path that it
// returns has none. All else opens directories by such paths, which the kernel walks
// refusing links (files.OpenBeneath), or works on single names in open directories,
// where a link is itself what is meant. So one that is put in the way between the two
// steps leads to an error, not outside. Of what is there only regular files are opened.
// What is written is always new: what had the name before is removed, not opened, as
// it may be a device, or share its content with a file elsewhere.
//
// Names in errors are paths in the tree; where the tree is on the daemon's disk is
// not for its users.
package filetree

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Root is the open root directory of a tree, or one below it.
type Root struct {
	fd int
	at string // where fd is in the tree, resolved; "" for the root
}

// At is the tree of which fd is the root directory. That stays the caller's to close.
func At(fd int) Root { return Root{fd: fd} }

// Below is the part of a tree that is below its directory at, a clean path without
// links: fd is that directory. All paths that it is used with lead there.
func Below(fd int, at string) Root { return Root{fd, strings.TrimSuffix(at, "/")} }

const maxLinks = 255

var errTooManyLinks = errors.New("too many links")

// pathErr says what was tried on which path of the tree.
func pathErr(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// cause strips the path off err, for messages that name it already.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// resolve follows the links in p, and one at its end if last is set. Elements
// that don't exist are taken as they are.
//
// A resolved path is absolute, clean and without links, "/" being the root. It
// may lead to something that doesn't exist.
func (r Root) resolve(p string, last bool) (string, error) {
	clean := path.Join("/", p)
	if st, err := r.lstat(clean); err == nil && (!last || !files.IsLink(&st)) && !strings.Contains(p, "..") {
		return clean, nil // most paths have no links in them
	}
	at, rest := "/", p
	if r.at != "" {
		at, rest = r.at, strings.TrimPrefix(clean[len(r.at):], "/")
	}
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		rest = strings.TrimLeft(rest, "/")
		next := path.Join(at, name)
		if next == "/" {
			at = next
			continue
		}
		st, err := r.lstat(next)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return "", err
		}
		if err != nil || !files.IsLink(&st) || rest == "" && !last {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", pathErr("open", path.Join("/", p), errTooManyLinks)
		}
		link, err := r.readlink(next)
		if err != nil {
			return "", err
		}
		if !path.IsAbs(link) {
			link = path.Join(at, link)
		}
		at, rest = "/", link+"/"+rest
		if rest = strings.TrimLeft(rest, "/"); rest == "" {
			return "/", nil
		}
	}
	return at, nil
}

// rel is a resolved path relative to what is open.
func (r Root) rel(p string) string {
	if p = strings.TrimPrefix(p[len(r.at):], "/"); p == "" {
		return "."
	}
	return p
}

// open opens the resolved path p without following links.
func (r Root) open(p string, flags uint64) (int, error) {
	return files.OpenBeneath(r.fd, r.rel(p), flags)
}

// openDir opens the directory at the resolved path p.
func (r Root) openDir(p string) (int, error) {
	fd, err := r.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	return fd, pathErr("open", p, err)
}

// openParent opens the directory that the resolved path p, not the root, is in.
func (r Root) openParent(p string) (fd int, name string, err error) {
	fd, err = r.openDir(path.Dir(p))
	return fd, path.Base(p), err
}

// lstat describes what is at p, which may have links only at its end.
func (r Root) lstat(p string) (st unix.Stat_t, err error) {
	fd, err := r.open(p, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
	}
	return st, pathErr("lstat", p, err)
}

func (r Root) readlink(p string) (string, error) {
	dir, name, err := r.openParent(p)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	link, err := files.Readlink(dir, name)
	return link, pathErr("readlink", p, err)
}

// openRegular opens the regular file at the resolved path p for reading. A
// device or pipe that a build put there is not opened.
func (r Root) openRegular(p string) (*os.File, error) {
	fd, err := r.open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_PATH)
	if err != nil {
		return nil, pathErr("open", p, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, pathErr("open", p, err)
	}
	if !files.IsRegular(&st) {
		return nil, pathErr("open", p, errors.New("not a regular file"))
	}
	dir, name, err := r.openParent(p)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	file, err := files.OpenFile(dir, name)
	if err != nil {
		return nil, pathErr("open", p, err)
	}
	return os.NewFile(uintptr(file), p), nil
}
