package ops

import (
	"errors"
	"os"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// mkdirAction makes a directory (LLB-063). Without makeParents, whatever is at
// the path already is left alone and fine.
func (r fileRoot) mkdirAction(a *pb.FileActionMkDir, owner *fileIDs) error {
	p, err := r.resolve(a.Path, true)
	if err != nil {
		return err
	}
	stamp := fileStamp{owner, fileTime(a.Timestamp)}
	perm := uint32(a.Mode) & 0o777
	if !a.MakeParents {
		if p == "/" {
			return nil
		}
		if err := r.mkdir(p, perm, stamp); !errors.Is(err, unix.EEXIST) {
			return err
		}
		return nil
	}
	made, err := r.mkdirAll(p, perm, stamp)
	if err != nil {
		return err
	}
	return r.touchAll(made, stamp)
}

// mkfileAction writes a file, in place of whatever but a directory is there
// (LLB-064). That is never opened: it may be a device, or a hard link.
func (r fileRoot) mkfileAction(a *pb.FileActionMkFile, owner *fileIDs) error {
	p, err := r.resolve(a.Path, true)
	if err != nil {
		return err
	}
	if p == "/" {
		return fileErr("mkfile", p, unix.EISDIR)
	}
	dir, name, err := r.openParent(p)
	if err != nil {
		return fileErr("mkfile", p, fileCause(err))
	}
	defer unix.Close(dir)
	if err := unix.Unlinkat(dir, name, 0); err != nil && err != unix.ENOENT {
		return fileErr("mkfile", p, err)
	}
	perm := uint32(a.Mode) & 0o777
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, perm)
	if err != nil {
		return fileErr("mkfile", p, err)
	}
	f := os.NewFile(uintptr(fd), p)
	_, err = f.Write(a.Data)
	stamp := fileStamp{owner, fileTime(a.Timestamp)}
	err = errors.Join(err, stamp.chown(dir, name), unix.Fchmod(fd, perm), stamp.touch(dir, name), f.Close())
	return fileErr("mkfile", p, fileCause(err))
}

// fileCause strips the path off err, for messages that name it already.
func fileCause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// symlinkAction makes a link (LLB-065).
func (r fileRoot) symlinkAction(a *pb.FileActionSymlink, owner *fileIDs) error {
	p, err := r.resolve(path.Join("/", a.Newpath), true)
	if err != nil {
		return err
	}
	if p == "/" {
		return fileErr("symlink", p, unix.EEXIST)
	}
	dir, name, err := r.openParent(p)
	if err != nil {
		return fileErr("symlink", p, fileCause(err))
	}
	defer unix.Close(dir)
	if err := unix.Symlinkat(a.Oldpath, dir, name); err != nil {
		return fileErr("symlink", p, err)
	}
	return fileErr("symlink", p, fileStamp{owner, fileTime(a.Timestamp)}.apply(dir, name))
}

// rmAction removes files (LLB-066). A link as last element is itself removed.
func (r fileRoot) rmAction(a *pb.FileActionRm) error {
	if !a.AllowWildcard {
		return r.rm(a.Path, a.AllowNotFound)
	}
	matches, err := r.wildcards(fileCleanPath(a.Path), false)
	if err != nil {
		return err
	}
	for _, m := range matches {
		if err := r.rm(m, a.AllowNotFound); err != nil {
			return err
		}
	}
	return nil
}

var errFileRmRoot = errors.New("the root directory can't be removed")

func (r fileRoot) rm(p string, allowNotFound bool) error {
	clean := path.Join("/", p)
	if clean == "/" {
		return fileErr("rm", clean, errFileRmRoot)
	}
	parent, err := r.resolve(path.Dir(clean), true)
	if err != nil {
		return err
	}
	at := path.Join(parent, path.Base(clean))
	if _, err := r.lstat(at); err != nil {
		if allowNotFound && errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	dir, name, err := r.openParent(at)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return fileErr("rm", at, files.RemoveAll(dir, name))
}

// fileCleanPath makes p absolute and clean but keeps "/" and "/." at its end,
// which matter to copies (LLB-067).
func fileCleanPath(p string) string {
	clean := path.Join("/", p)
	switch {
	case strings.HasSuffix(p, "/.") && clean == "/":
		return "/."
	case strings.HasSuffix(p, "/."):
		return clean + "/."
	case strings.HasSuffix(p, "/") && clean != "/":
		return clean + "/"
	}
	return clean
}
