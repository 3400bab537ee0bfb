package filetree

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"path"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Mirror makes the tree to equal from, and touches only what differs: that is
// what an overlay layer on top of to then holds.
func Mirror(ctx context.Context, from, to Root) error {
	c := &copying{Copy: &Copy{Replace: true}, src: from, dst: to}
	m := &treeMirror{c.newTree(ctx)}
	_, err := m.directory(&pair{from: "/", at: "/", srcFD: from.fd, dst: to.fd}, ".")
	return err
}

// treeMirror copies like a Copy does, but removes too, and leaves alone what is
// the same already.
type treeMirror struct{ *treeCopy }

// contents makes what is in d's copy what is in its source.
func (m *treeMirror) contents(d *pair) (changed bool, err error) {
	if err := context.Cause(m.ctx); err != nil {
		return false, err
	}
	want, err := names(d.srcFD)
	if err != nil {
		return false, pathErr("list", d.from, err)
	}
	have, err := names(d.dst)
	if err != nil {
		return false, pathErr("list", d.at, err)
	}
	for name := range have {
		if !want[name] {
			if err := files.RemoveAll(d.dst, name); err != nil {
				return true, pathErr("remove", path.Join(d.at, name), err)
			}
			changed = true
		}
	}
	for name := range want {
		other, err := m.entry(d, name, have[name])
		if err != nil {
			return true, err
		}
		changed = changed || other
	}
	return changed, nil
}

// entry makes one name in d's copy what it is in the source.
func (m *treeMirror) entry(d *pair, name string, exists bool) (changed bool, err error) {
	var want, have unix.Stat_t
	if err := files.Lstat(d.srcFD, name, &want); err != nil {
		return false, pathErr("lstat", path.Join(d.from, name), err)
	}
	if exists {
		if err := files.Lstat(d.dst, name, &have); err != nil {
			return false, pathErr("lstat", path.Join(d.at, name), err)
		}
	}
	if !files.IsDir(&want) {
		if exists {
			same, err := sameFile(d, name, &want, &have)
			if err != nil || same {
				return false, err
			}
		}
		return true, m.file(d, name, name, goType(want.Mode))
	}
	if exists && !files.IsDir(&have) {
		if err := unix.Unlinkat(d.dst, name, 0); err != nil {
			return true, pathErr("remove", path.Join(d.at, name), err)
		}
		exists = false
	}
	if !exists {
		if err := unix.Mkdirat(d.dst, name, 0o700); err != nil {
			return true, pathErr("mkdir", path.Join(d.at, name), err)
		}
	}
	changed, err = m.directory(d, name)
	return changed || !exists, err
}

// directory is entry for a directory that both have, or for d itself as ".".
func (m *treeMirror) directory(d *pair, name string) (changed bool, err error) {
	sub := &pair{from: path.Join(d.from, name), at: path.Join(d.at, name), inherits: true}
	if sub.srcFD, err = files.OpenDir(d.srcFD, name); err != nil {
		return false, pathErr("open", sub.from, err)
	}
	defer unix.Close(sub.srcFD)
	if sub.dst, err = files.OpenDir(d.dst, name); err != nil {
		return false, pathErr("open", sub.at, err)
	}
	defer unix.Close(sub.dst)
	if changed, err = m.contents(sub); err != nil {
		return true, err
	}
	return m.metadata(sub, changed)
}

// metadata gives d's copy the owner, mode, attributes and times of its source.
// Times alone are no difference: copied up for them, a directory would be part of
// the layer without a change in it.
func (m *treeMirror) metadata(d *pair, changed bool) (bool, error) {
	var want, have unix.Stat_t
	if err := errors.Join(unix.Fstat(d.srcFD, &want), unix.Fstat(d.dst, &have)); err != nil {
		return true, pathErr("stat", d.at, err)
	}
	from, to := files.XattrsOf(d.srcFD), files.XattrsOf(d.dst)
	attributes := sameXattrs(from, to)
	if sameMetadata(&want, &have) && attributes && (!changed || want.Mtim == have.Mtim) {
		return changed, nil
	}
	if err := unix.Fchown(d.dst, int(want.Uid), int(want.Gid)); err != nil {
		return true, pathErr("chown", d.at, err)
	}
	if err := unix.Fchmod(d.dst, want.Mode&0o7777); err != nil {
		return true, pathErr("chmod", d.at, err)
	}
	if !attributes {
		for key := range readXattrs(to) {
			if err := unix.Fremovexattr(d.dst, key); err != nil && err != unix.ENODATA {
				return true, pathErr("remove attribute "+key+" of", d.at, err)
			}
		}
		copyXattrs(to, from)
	}
	return true, pathErr("set times of", d.at, unix.UtimesNanoAt(d.dst, ".", []unix.Timespec{want.Atim, want.Mtim}, 0))
}

// sameFile says whether a name that is no directory is the same in d's copy as
// in its source. Files of one size are not read if they were changed at the
// same nanosecond, unless that is a whole second: tools that set times set such
// ones.
func sameFile(d *pair, name string, want, have *unix.Stat_t) (bool, error) {
	if !sameMetadata(want, have) || want.Rdev != have.Rdev || want.Mtim != have.Mtim {
		return false, nil
	}
	switch want.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		if same, err := files.SameLink(d.srcFD, d.dst, name); err != nil || !same {
			return false, pathErr("compare", path.Join(d.at, name), err)
		}
	case unix.S_IFREG:
		if want.Size != have.Size {
			return false, nil
		}
		if want.Mtim.Nsec == 0 {
			if same, err := files.SameContent(d.srcFD, d.dst, name); err != nil || !same {
				return false, pathErr("compare", path.Join(d.at, name), err)
			}
		}
	}
	return sameXattrs(files.XattrsAt(d.srcFD, name), files.XattrsAt(d.dst, name)), nil
}

func sameMetadata(a, b *unix.Stat_t) bool {
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid
}

func sameXattrs(a, b files.Xattrs) bool {
	return maps.EqualFunc(readXattrs(a), readXattrs(b), bytes.Equal)
}

// names are the names in the open directory dir.
func names(dir int) (map[string]bool, error) {
	names, err := files.Names(dir)
	if err != nil {
		return nil, err
	}
	out := make(map[string]bool, len(names))
	for _, name := range names {
		out[name] = true
	}
	return out, nil
}
