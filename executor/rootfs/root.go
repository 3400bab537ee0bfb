// Package rootfs looks into the root file system of a process and prepares it
// from outside: users and groups, working directory, mount points.
//
// All paths are as the process will see them. They are resolved by the kernel
// with RESOLVE_IN_ROOT, so that no symbolic link leads out of the root.
package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Root is an open root directory. Nothing else may change the file system
// while it is being prepared; what another process could do then is fail
// the preparation, not lead it out of the root.
type Root struct{ fd int }

// New makes a Root from an open directory, which stays the caller's.
func New(fd int) Root { return Root{fd} }

// maxLinks is how many symbolic links a path may have, as in the kernel.
const maxLinks = 40

// open opens name below the root.
func (r Root) open(name string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(r.fd, name, &how)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
}

// Resolve returns name, which is absolute, with all symbolic links resolved,
// and whether it exists. What doesn't exist is taken as it is written.
func (r Root) Resolve(name string) (resolved string, exists bool, err error) {
	return r.ResolveBeside(name, nil)
}

// ResolveBeside is Resolve where other file systems are mounted, at resolved
// names: what the root has there can't be seen, and names in them are taken as
// they are written.
func (r Root) ResolveBeside(name string, mounted []string) (resolved string, exists bool, err error) {
	todo := strings.Split(name, "/")
	at, links := "/", 0
	exists = true
	for len(todo) > 0 {
		next := path.Join(at, todo[0])
		if todo[0] == ".." {
			next = path.Dir(at)
		}
		todo = todo[1:]
		if next == at || !exists || Below(next, mounted) {
			at = next
			continue
		}
		target, err := r.readlink(next)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			exists, at = false, next
		case err != nil:
			return "", false, err
		case target == "":
			at = next
		default:
			if links++; links > maxLinks {
				return "", false, &os.PathError{Op: "resolve", Path: name, Err: unix.ELOOP}
			}
			if path.IsAbs(target) {
				at = "/"
			}
			todo = append(strings.Split(target, "/"), todo...)
		}
	}
	return at, exists, nil
}

// readlink returns the target of the symbolic link at name, "" if it is
// something else.
func (r Root) readlink(name string) (string, error) {
	fd, err := r.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return "", nil
	}
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(buf[:n]), nil
}

// OpenDir opens the directory at the resolved name; -1 if there is none.
func (r Root) OpenDir(name string) (int, error) {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return -1, nil
	}
	return fd, err
}

// Mode returns the permissions of the directory at the resolved name, 0 if
// there is none.
func (r Root) Mode(name string) (uint32, error) {
	fd, err := r.OpenDir(name)
	if err != nil || fd < 0 {
		return 0, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return st.Mode & 0o7777, nil
}

// Stat looks at what is at the resolved name. If there is nothing, the error is
// unix.ENOENT.
func (r Root) Stat(name string) (st unix.Stat_t, err error) {
	fd, err := r.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		err = &os.PathError{Op: "stat", Path: name, Err: err}
		return st, errors.Join(err, unix.Close(fd))
	}
	return st, unix.Close(fd)
}

// owner is whom new directories belong to.
type owner struct{ uid, gid int }

// mkdirAll makes the resolved directory name and its parents. Times of the
// directory that gets a new entry are kept.
func (r Root) mkdirAll(name string, own owner) error {
	fd, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		return unix.Close(fd)
	}
	if !errors.Is(err, unix.ENOENT) || name == "/" {
		return err
	}
	if err := r.mkdirAll(path.Dir(name), own); err != nil {
		return err
	}
	return r.inParent(name, func(parent int, base string) error {
		if err := unix.Mkdirat(parent, base, 0o755); err != nil {
			return &os.PathError{Op: "mkdir", Path: name, Err: err}
		}
		fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: name, Err: err}
		}
		// Whatever the umask is.
		return errors.Join(unix.Fchmod(fd, 0o755), unix.Fchown(fd, own.uid, own.gid), unix.Close(fd))
	})
}

// create makes the resolved name an empty file, with parents.
func (r Root) create(name string) error {
	if err := r.mkdirAll(path.Dir(name), owner{}); err != nil {
		return err
	}
	return r.inParent(name, func(parent int, base string) error {
		fd, err := unix.Openat(parent, base, unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o755)
		if err != nil {
			return &os.PathError{Op: "create", Path: name, Err: err}
		}
		return unix.Close(fd)
	})
}

// inParent calls fn with the open parent directory of the resolved name, and
// sets its times back to what they were.
func (r Root) inParent(name string, fn func(parent int, base string) error) error {
	parent, err := r.open(path.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	var st unix.Stat_t
	if err := unix.Fstat(parent, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path.Dir(name), Err: err}
	}
	if err := fn(parent, path.Base(name)); err != nil {
		return err
	}
	if err := files.SetTimes(parent, st.Atim, st.Mtim); err != nil {
		return fmt.Errorf("set times of %s back: %w", path.Dir(name), err)
	}
	return nil
}

// MakeCwd makes the working directory if it is missing.
func (r Root) MakeCwd(name string, uid, gid uint32) error {
	resolved, exists, err := r.Resolve(name)
	if err != nil {
		return fmt.Errorf("working dir %s points to invalid target: %w", name, err)
	}
	if exists {
		return nil
	}
	if err := r.mkdirAll(resolved, owner{int(uid), int(gid)}); err != nil {
		return fmt.Errorf("create working directory %s: %w", name, err)
	}
	return nil
}
