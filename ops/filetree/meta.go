package filetree

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	mode "github.com/tonistiigi/dchapes-mode"
	"golang.org/x/sys/unix"
)

// Owner is who owns a file.
type Owner struct{ UID, GID int }

// explain is err of giving a file to o.
func (o Owner) explain(err error) error { return rootless.Here().Explain(err, o.UID, o.GID) }

// Stamp is what new files get in place of what comes naturally, which a nil field
// leaves them.
type Stamp struct {
	Owner *Owner
	Time  *unix.Timespec // of access and change
}

// apply gives name in dir, which may be a link, the owner and time.
func (s Stamp) apply(dir int, name string) error {
	return errors.Join(s.chown(dir, name), s.touch(dir, name))
}

func (s Stamp) chown(dir int, name string) error {
	if s.Owner == nil {
		return nil
	}
	return s.Owner.explain(unix.Fchownat(dir, name, s.Owner.UID, s.Owner.GID, unix.AT_SYMLINK_NOFOLLOW))
}

func (s Stamp) touch(dir int, name string) error {
	if s.Time == nil {
		return nil
	}
	return unix.UtimesNanoAt(dir, name, []unix.Timespec{*s.Time, *s.Time}, unix.AT_SYMLINK_NOFOLLOW)
}

// Chmod is how a copy changes permissions (LLB-068): by a chmod expression or to
// fixed bits. The zero value leaves them as they are.
type Chmod struct {
	set   *mode.Set
	fixed *uint32
}

// ChmodTo gives all copies the permission bits perm.
func ChmodTo(perm uint32) Chmod {
	perm &= 0o7777
	return Chmod{fixed: &perm}
}

// ParseChmod reads an expression of chmod(1), such as "go+rX".
func ParseChmod(expr string) (Chmod, error) {
	set, err := mode.ParseWithUmask(expr, 0)
	if err != nil {
		return Chmod{}, fmt.Errorf("mode %q: %w", expr, err)
	}
	return Chmod{set: &set}, nil
}

// of returns the permission bits of a copy of a file of mode m.
func (c Chmod) of(m uint32) uint32 {
	switch {
	case c.set != nil:
		kind := fs.FileMode(0)
		if m&unix.S_IFMT == unix.S_IFDIR {
			kind = fs.ModeDir
		}
		return files.Perm(c.set.Apply(files.GoPerm(m) | kind))
	case c.fixed != nil:
		return *c.fixed
	}
	return m & 0o7777
}

// parents returns the permission bits of directories made above a copy.
func (c Chmod) parents() uint32 {
	if c.fixed != nil {
		return *c.fixed & 0o777
	}
	return 0o755
}

// xattrAllowed reports whether a build may set the attribute. Those of
// overlay change what a mount of the layer shows, so they never come from files.
func xattrAllowed(key string) bool {
	return !strings.HasPrefix(key, "trusted.overlay.") && !strings.HasPrefix(key, "user.overlay.")
}

// copyXattrs copies extended attributes as far as both filesystems have
// them and we may set them (LLB-077).
func copyXattrs(to, from files.Xattrs) {
	for key, value := range readXattrs(from) {
		// Best effort by contract: the result is the same file without it.
		_ = to.Set(key, value)
	}
}

// readXattrs returns the attributes that a build may set; none where the file
// system has none, or we may not read them.
func readXattrs(x files.Xattrs) map[string][]byte {
	names, err := x.Names()
	if err != nil || len(names) == 0 {
		return nil
	}
	out := map[string][]byte{}
	for _, key := range names {
		if !xattrAllowed(key) {
			continue
		}
		if value, ok, err := x.Get(key); ok && err == nil {
			out[key] = value
		}
	}
	return out
}
