package ops

import (
	"errors"
	"io/fs"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	mode "github.com/tonistiigi/dchapes-mode"
	"golang.org/x/sys/unix"
)

// fileIDs is who owns a file.
type fileIDs struct{ uid, gid int }

// explain is err of giving a file to ids.
func (ids fileIDs) explain(err error) error { return rootless.Here().Explain(err, ids.uid, ids.gid) }

// fileStamp is what an action says about new files. A nil field keeps what
// comes naturally.
type fileStamp struct {
	owner *fileIDs
	time  *unix.Timespec
}

// fileTime is a timestamp of the protocol: nanoseconds, or -1 for none (LLB-061).
func fileTime(ns int64) *unix.Timespec {
	if ns == -1 {
		return nil
	}
	ts := unix.NsecToTimespec(ns)
	return &ts
}

// apply gives name in dir, which may be a link, the owner and time.
func (s fileStamp) apply(dir int, name string) error {
	return errors.Join(s.chown(dir, name), s.touch(dir, name))
}

func (s fileStamp) chown(dir int, name string) error {
	if s.owner == nil {
		return nil
	}
	return s.owner.explain(unix.Fchownat(dir, name, s.owner.uid, s.owner.gid, unix.AT_SYMLINK_NOFOLLOW))
}

func (s fileStamp) touch(dir int, name string) error {
	if s.time == nil {
		return nil
	}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{*s.time, *s.time}, unix.AT_SYMLINK_NOFOLLOW)
}

// mkdirAll makes the directory at the resolved path p and those above it, with
// owner and time each, and returns the ones that it made, outermost first. As
// later changes in them alter their times, the caller ends with touchAll.
func (r fileRoot) mkdirAll(p string, perm uint32, stamp fileStamp) (made []string, err error) {
	st, err := r.lstat(p)
	if err == nil {
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, fileErr("mkdir", p, unix.ENOTDIR)
		}
		return nil, nil
	}
	if !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	if made, err = r.mkdirAll(path.Dir(p), perm, stamp); err != nil {
		return nil, err
	}
	if err := r.mkdir(p, perm, stamp); err != nil {
		return nil, err
	}
	return append(made, p), nil
}

// mkdir makes the directory at the resolved path p, whatever the umask.
func (r fileRoot) mkdir(p string, perm uint32, stamp fileStamp) error {
	dir, name, err := r.openParent(p)
	if errors.Is(err, unix.ENOENT) {
		return fileErr("mkdir", p, unix.ENOENT)
	}
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if err := unix.Mkdirat(dir, name, perm); err != nil {
		return fileErr("mkdir", p, err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fileErr("mkdir", p, err)
	}
	if st.Mode&0o777 != perm {
		// A set-group-id bit inherited from the directory above stays.
		if err := unix.Fchmodat(dir, name, perm|st.Mode&unix.S_ISGID, 0); err != nil {
			return fileErr("chmod", p, err)
		}
	}
	return fileErr("set owner and time of", p, stamp.apply(dir, name))
}

// touchAll sets the time of directories made earlier.
func (r fileRoot) touchAll(dirs []string, stamp fileStamp) error {
	if stamp.time == nil {
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
			return fileErr("set time of", p, err)
		}
	}
	return nil
}

// fileChmod is how a copy changes permissions (LLB-068): by a chmod expression,
// to fixed bits, or not at all.
type fileChmod struct {
	set   *mode.Set
	fixed int // -1 for none
}

// of returns the permission bits of a copy of a file of mode m.
func (c fileChmod) of(m uint32) uint32 {
	switch {
	case c.set != nil:
		kind := fs.FileMode(0)
		if m&unix.S_IFMT == unix.S_IFDIR {
			kind = fs.ModeDir
		}
		return files.Perm(c.set.Apply(files.GoPerm(m) | kind))
	case c.fixed != -1:
		return uint32(c.fixed) & 0o7777
	}
	return m & 0o7777
}

// parents returns the permission bits of directories made above a copy.
func (c fileChmod) parents() uint32 {
	if c.set == nil && c.fixed != -1 {
		return uint32(c.fixed) & 0o777
	}
	return 0o755
}

// fileXattrAllowed reports whether a build may set the attribute. Those of
// overlay change what a mount of the layer shows, so they never come from files.
func fileXattrAllowed(key string) bool {
	return !strings.HasPrefix(key, "trusted.overlay.") && !strings.HasPrefix(key, "user.overlay.")
}

// fileCopyXattrs copies extended attributes as far as both filesystems have
// them and we may set them (LLB-077).
func fileCopyXattrs(to, from files.Xattrs) {
	for key, value := range fileReadXattrs(from) {
		// Best effort by contract: the result is the same file without it.
		_ = to.Set(key, value)
	}
}

// fileReadXattrs returns the attributes that a build may set; none where the file
// system has none, or we may not read them.
func fileReadXattrs(x files.Xattrs) map[string][]byte {
	names, err := x.Names()
	if err != nil || len(names) == 0 {
		return nil
	}
	out := map[string][]byte{}
	for _, key := range names {
		if !fileXattrAllowed(key) {
			continue
		}
		if value, ok, err := x.Get(key); ok && err == nil {
			out[key] = value
		}
	}
	return out
}
