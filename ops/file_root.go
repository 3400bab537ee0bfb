package ops

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// fileRoot is the open root directory of a filesystem state. Paths below it
// mean what they mean after a chroot: links lead to places inside it and ".."
// stops at it. Between resolving a path and using it nobody can put a link in
// the way that is followed, since all other calls refuse links.
//
// A resolved path is absolute, clean and without links, "/" being the root. It
// may lead to something that doesn't exist.
type fileRoot struct{ fd int }

const fileMaxLinks = 255

var errFileTooManyLinks = errors.New("too many links")

// fileErr says what was tried on which path of the state.
func fileErr(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// resolve follows the links in p, and one at its end if last is set. Elements
// that don't exist are taken as they are.
func (r fileRoot) resolve(p string, last bool) (string, error) {
	clean := path.Join("/", p)
	if st, err := r.lstat(clean); err == nil && (!last || st.Mode&unix.S_IFMT != unix.S_IFLNK) && !strings.Contains(p, "..") {
		return clean, nil // most paths have no links in them
	}
	at, rest := "/", p
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
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFLNK || rest == "" && !last {
			at = next
			continue
		}
		if links++; links > fileMaxLinks {
			return "", fileErr("open", path.Join("/", p), errFileTooManyLinks)
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

// fileRel is a resolved path relative to the root.
func fileRel(p string) string {
	if p == "/" {
		return "."
	}
	return p[1:]
}

// open opens the resolved path p without following links.
func (r fileRoot) open(p string, flags uint64) (int, error) {
	return files.OpenBeneath(r.fd, fileRel(p), flags)
}

// openDir opens the directory at the resolved path p.
func (r fileRoot) openDir(p string) (int, error) {
	fd, err := r.open(p, unix.O_RDONLY|unix.O_DIRECTORY)
	return fd, fileErr("open", p, err)
}

// openParent opens the directory that the resolved path p, not the root, is in.
func (r fileRoot) openParent(p string) (fd int, name string, err error) {
	fd, err = r.openDir(path.Dir(p))
	return fd, path.Base(p), err
}

// lstat describes what is at p, which may have links only at its end.
func (r fileRoot) lstat(p string) (st unix.Stat_t, err error) {
	fd, err := r.open(p, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		err = unix.Fstat(fd, &st)
		unix.Close(fd)
	}
	return st, fileErr("lstat", p, err)
}

func (r fileRoot) readlink(p string) (string, error) {
	dir, name, err := r.openParent(p)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	link, err := files.Readlink(dir, name)
	return link, fileErr("readlink", p, err)
}

// openRegular opens the regular file at the resolved path p for reading. A
// device or pipe that a build put there is not opened.
func (r fileRoot) openRegular(p string) (*os.File, error) {
	fd, err := r.open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_PATH)
	if err != nil {
		return nil, fileErr("open", p, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fileErr("open", p, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fileErr("open", p, errors.New("not a regular file"))
	}
	dir, name, err := r.openParent(p)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	file, err := files.OpenFile(dir, name)
	if err != nil {
		return nil, fileErr("open", p, err)
	}
	return os.NewFile(uintptr(file), p), nil
}

// fileReadDir opens the directory dir anew, for listing. dir stays open.
func fileReadDir(dir int) (*os.File, error) {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), files.Path(fd)), nil
}
