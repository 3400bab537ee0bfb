package filetree

import (
	"errors"
	"os"
	"path"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Mkdir makes a directory (LLB-063) with the permission bits of perm, whatever the
// umask. What is at the path already is left alone and fine.
func (r Root) Mkdir(p string, perm uint32, stamp Stamp) error {
	at, err := r.resolve(p, true)
	if err != nil || at == "/" {
		return err
	}
	if err := r.makeDir(at, perm&0o777, stamp); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// MkdirAll makes a directory and those above it that are missing.
func (r Root) MkdirAll(p string, perm uint32, stamp Stamp) error {
	at, err := r.resolve(p, true)
	if err != nil {
		return err
	}
	made, err := r.mkdirAll(at, perm&0o777, stamp)
	if err != nil {
		return err
	}
	return r.touchAll(made, stamp)
}

// mkdirAll makes the directory at the resolved path p and those above it, with
// owner and time each, and returns the ones that it made, outermost first. As
// later changes in them alter their times, the caller ends with touchAll.
func (r Root) mkdirAll(p string, perm uint32, stamp Stamp) (made []string, err error) {
	st, err := r.lstat(p)
	if err == nil {
		if !files.IsDir(&st) {
			return nil, pathErr("mkdir", p, unix.ENOTDIR)
		}
		return nil, nil
	}
	if !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	if made, err = r.mkdirAll(path.Dir(p), perm, stamp); err != nil {
		return nil, err
	}
	if err := r.makeDir(p, perm, stamp); err != nil {
		return nil, err
	}
	return append(made, p), nil
}

// makeDir makes the directory at the resolved path p, whatever the umask.
func (r Root) makeDir(p string, perm uint32, stamp Stamp) error {
	dir, name, err := r.openParent(p)
	if errors.Is(err, unix.ENOENT) {
		return pathErr("mkdir", p, unix.ENOENT)
	}
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := unix.Mkdirat(dir, name, perm); err != nil {
		return pathErr("mkdir", p, err)
	}
	var st unix.Stat_t
	if err := files.Lstat(dir, name, &st); err != nil {
		return pathErr("mkdir", p, err)
	}
	if st.Mode&0o777 != perm {
		// A set-group-id bit inherited from the directory above stays.
		if err := unix.Fchmodat(dir, name, perm|st.Mode&unix.S_ISGID, 0); err != nil {
			return pathErr("chmod", p, err)
		}
	}
	return pathErr("set owner and time of", p, stamp.apply(dir, name))
}

// touchAll sets the time of directories made earlier.
func (r Root) touchAll(dirs []string, stamp Stamp) error {
	if stamp.Time == nil {
		return nil
	}
	for _, p := range dirs {
		if p == "/" {
			continue
		}
		dir, name, err := r.openParent(p)
		if err != nil {
			return err
		}
		err = stamp.touch(dir, name)
		unix.Close(dir)
		if err != nil {
			return pathErr("set time of", p, err)
		}
	}
	return nil
}

// Mkfile writes a file with the permission bits of perm, in place of whatever but a
// directory is there (LLB-064). That is never opened: it may be a device, or a hard
// link.
func (r Root) Mkfile(p string, data []byte, perm uint32, stamp Stamp) error {
	at, err := r.resolve(p, true)
	if err != nil {
		return err
	}
	if at == "/" {
		return pathErr("mkfile", at, unix.EISDIR)
	}
	perm &= 0o777
	dir, name, err := r.openParent(at)
	if err != nil {
		return pathErr("mkfile", at, cause(err))
	}
	defer unix.Close(dir)
	if err := unix.Unlinkat(dir, name, 0); err != nil && err != unix.ENOENT {
		return pathErr("mkfile", at, err)
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, perm)
	if err != nil {
		return pathErr("mkfile", at, err)
	}
	f := os.NewFile(uintptr(fd), at)
	_, err = f.Write(data)
	err = errors.Join(err, stamp.chown(dir, name), unix.Fchmod(fd, perm), stamp.touch(dir, name), f.Close())
	return pathErr("mkfile", at, cause(err))
}

// Symlink makes a link to target at p (LLB-065).
func (r Root) Symlink(target, p string, stamp Stamp) error {
	at, err := r.resolve(path.Join("/", p), true)
	if err != nil {
		return err
	}
	if at == "/" {
		return pathErr("symlink", at, unix.EEXIST)
	}
	dir, name, err := r.openParent(at)
	if err != nil {
		return pathErr("symlink", at, cause(err))
	}
	defer unix.Close(dir)
	if err := unix.Symlinkat(target, dir, name); err != nil {
		return pathErr("symlink", at, err)
	}
	return pathErr("symlink", at, stamp.apply(dir, name))
}

var errRemoveRoot = errors.New("the root directory can't be removed")

// Remove removes what is at p, with all that is in it (LLB-066). A link as last
// element is itself removed. If nothing is there, that is an error unless
// allowNotFound.
func (r Root) Remove(p string, allowNotFound bool) error {
	clean := path.Join("/", p)
	if clean == "/" {
		return pathErr("rm", clean, errRemoveRoot)
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
	return pathErr("rm", at, files.RemoveAll(dir, name))
}

// RemoveMatches removes all that the wildcards in pattern match.
func (r Root) RemoveMatches(pattern string, allowNotFound bool) error {
	matches, err := r.wildcards(cleanPath(pattern), false)
	if err != nil {
		return err
	}
	for _, m := range matches {
		if err := r.Remove(m, allowNotFound); err != nil {
			return err
		}
	}
	return nil
}

// Clear removes all that is in the tree.
func (r Root) Clear() error {
	fd, err := files.OpenDir(r.fd, ".") // what is mounted can't be listed itself
	if err != nil {
		return pathErr("list", "/", err)
	}
	defer unix.Close(fd)
	names, err := files.Names(fd)
	if err != nil {
		return pathErr("list", "/", err)
	}
	for _, name := range names {
		if err := files.RemoveAll(r.fd, name); err != nil {
			return pathErr("remove", "/"+name, err)
		}
	}
	return nil
}
