package snapshot

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	"golang.org/x/sys/unix"
)

// applier unpacks a layer tar into the layer directory itself, in overlay's
// form, and never follows a link on disk: it walks names one by one, upper
// directory and parent side by side, as overlay would show them.
type applier struct {
	ctx context.Context
	walker
	// made are the paths that this layer made. It is nil for a layer that was
	// empty before, all of which this layer made.
	made  map[string]bool
	times map[string]dirTimes // of directories, set at the end
	// inherited are the xattrs that directories of this layer have from the
	// parent's only. They go when the layer hides the parent's.
	inherited map[string][]string
	deletes   bool // there is no parent, but a whiteout
	clears    bool // the root is opaque
	fs        unix.Statfs_t
}

type dirTimes struct{ atime, mtime unix.Timespec }

func applyUpper(ctx context.Context, layer layerInfo, parent *View, r io.Reader) (u unpackedLayer, err error) {
	a := &applier{ctx: ctx, times: map[string]dirTimes{}, inherited: map[string][]string{}}
	if err := a.open(layer, parent); err != nil {
		return u, err
	}
	defer a.close()
	a.onMkdir = func(dir *layerDir, t dirTimes) { a.times[dir.path] = t }
	if err := unix.Fstatfs(a.root.fd, &a.fs); err != nil {
		return u, err
	}
	names, err := files.Names(a.root.fd)
	if err != nil {
		return u, err
	}
	if len(names) > 0 {
		a.made = map[string]bool{}
	}
	if err := a.entries(tar.NewReader(r)); err != nil {
		return u, err
	}
	return unpackedLayer{whole: a.made == nil, deletes: a.deletes, clears: a.clears}, a.finish()
}

func (a *applier) entries(tr *tar.Reader) error {
	for {
		if err := context.Cause(a.ctx); err != nil {
			return err
		}
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		if err := a.entry(h, tr); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

// entry unpacks one entry.
func (a *applier) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	a.refresh()
	a.stamp = dirTimes{timespec(h.ModTime), timespec(h.ModTime)}
	// Cleaned as an absolute path, no name has a way out of the root.
	dirName, name := path.Split(path.Clean("/" + h.Name))
	if name == "" {
		return nil // the root itself, whose metadata upstream ignores, too
	}
	dir, err := a.dir(dirName, true)
	if err != nil {
		return err
	}
	if hidden, ok := strings.CutPrefix(name, whiteoutPrefix); ok {
		return a.whiteout(dir, hidden)
	}
	if err := a.check(h); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		err = a.mkdir(dir, name, h)
	} else {
		err = a.file(dir, name, h, r)
	}
	if err == nil && a.made != nil {
		a.made[dir.path+name] = true
	}
	return err
}

// check refuses numbers that the kernel would take for others.
func (a *applier) check(h *tar.Header) error {
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > math.MaxUint32-1 || int64(h.Gid) > math.MaxUint32-1 {
		return fmt.Errorf("the owner %d:%d is out of range", h.Uid, h.Gid)
	}
	// A sparse file of any size takes no space in the tar.
	if total := int64(a.fs.Blocks) * a.fs.Bsize; h.Size > 1<<30 && h.Size > total {
		return fmt.Errorf("it has %d bytes, more than the file system's %d", h.Size, total)
	}
	return nil
}

// whiteout hides name, as far as it comes from the parent: what the layer itself
// has by that name stays, wherever in the tar it stands.
func (a *applier) whiteout(dir *layerDir, name string) error {
	switch {
	case name == ".wh..opq":
		return a.opaque(dir)
	case name == ".wh.plnk", name == ".wh.aufs", name == ".wh.orph", name == ".wh..tmp":
		return nil // the bookkeeping of aufs, from which the form comes
	case name == "" || name == "." || name == "..":
		return errors.New("the whiteout names no file")
	}
	var st unix.Stat_t
	err := files.Lstat(dir.fd, name, &st)
	switch {
	case err == nil && a.isMade(dir.path+name):
		if files.IsDir(&st) {
			return a.hide(dir, name)
		}
		return nil
	case err == nil:
		if err := a.remove(dir, name, &st); err != nil {
			return err
		}
	case err != unix.ENOENT:
		return err
	}
	if !a.hasParent {
		if a.made != nil {
			return nil // it was about what the snapshot had, which is gone
		}
		a.deletes = true // from whatever the layer will be stacked on
	}
	return a.makeWhiteout(dir, name)
}

// isMade says whether the layer made what is at the path.
func (a *applier) isMade(path string) bool { return a.made == nil || a.made[path] }

// hide makes the directory name opaque.
func (a *applier) hide(dir *layerDir, name string) error {
	d, err := a.child(dir, name, false)
	if err != nil {
		return err
	}
	return a.hideBehind(d)
}

// hideBehind makes d opaque.
func (a *applier) hideBehind(d *layerDir) error {
	for _, name := range a.inherited[d.path] {
		if err := unix.Fremovexattr(d.fd, name); err != nil && err != unix.ENODATA {
			return fmt.Errorf("remove xattr %s: %w", name, err)
		}
	}
	delete(a.inherited, d.path)
	return a.setOpaque(d)
}

// opaque hides all that the parent has in dir, and what the snapshot had before.
func (a *applier) opaque(dir *layerDir) error {
	if a.made != nil {
		names, err := files.Names(dir.fd)
		if err != nil {
			return err
		}
		for _, name := range names {
			if a.madeBelow(dir.path + name) {
				continue
			}
			var st unix.Stat_t
			if err := files.Lstat(dir.fd, name, &st); err != nil {
				return err
			}
			if err := a.remove(dir, name, &st); err != nil {
				return err
			}
		}
	}
	if dir == a.root {
		return a.opaqueRoot(dir)
	}
	return a.hideBehind(dir)
}

// madeBelow says whether the layer made the path, or something in it.
func (a *applier) madeBelow(path string) bool {
	if a.made[path] {
		return true
	}
	for m := range a.made {
		if strings.HasPrefix(m, path+"/") {
			return true
		}
	}
	return false
}

// opaqueRoot hides what the parent has in the root directory, name by name,
// since overlay doesn't look whether that is opaque.
func (a *applier) opaqueRoot(dir *layerDir) error {
	a.clears = true
	if dir.lower < 0 {
		return nil
	}
	lower, err := files.OpenDir(dir.lower, ".")
	if err != nil {
		return err
	}
	defer unix.Close(lower)
	names, err := files.Names(lower)
	if err != nil {
		return err
	}
	for _, name := range names {
		var st unix.Stat_t
		err := files.Lstat(dir.fd, name, &st)
		switch {
		case err == unix.ENOENT:
			err = a.makeWhiteout(dir, name)
		case err == nil && files.IsDir(&st):
			err = a.hide(dir, name)
		}
		if err != nil {
			return fmt.Errorf("hide %s: %w", name, err)
		}
	}
	return nil
}

// mkdir makes the directory name, or gives one that exists its metadata.
func (a *applier) mkdir(dir *layerDir, name string, h *tar.Header) error {
	var st unix.Stat_t
	err := files.Lstat(dir.fd, name, &st)
	hidden := false
	if err == nil && !files.IsDir(&st) {
		if err = a.remove(dir, name, &st); err == nil {
			hidden = true // what the parent has there was gone already
			err = unix.ENOENT
		}
	}
	var d *layerDir
	switch err {
	case nil:
		d, err = a.child(dir, name, false)
	case unix.ENOENT:
		d, err = a.makeDir(dir, name, hidden)
	}
	if err != nil {
		return err
	}
	a.times[d.path] = entryTimes(h)
	delete(a.inherited, d.path)
	for _, x := range d.inherited {
		if _, own := h.PAXRecords[paxXattr+x]; !own {
			a.inherited[d.path] = append(a.inherited[d.path], x)
		}
	}
	return a.meta(d.fd, h, d, "")
}

// file makes everything that is no directory.
func (a *applier) file(dir *layerDir, name string, h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeLink {
		return a.link(dir, name, h)
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return a.regular(dir, name, h, r)
	}
	var create func() error
	switch h.Typeflag {
	case tar.TypeSymlink:
		create = func() error { return unix.Symlinkat(h.Linkname, dir.fd, name) }
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		mode, dev, err := device(h)
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeFifo && rootless.Here().Mapped() {
			return nil // which can't be made there; upstream leaves it out, too
		}
		create = func() error { return unix.Mknodat(dir.fd, name, mode, dev) }
	default:
		return fmt.Errorf("the type %q is unknown", h.Typeflag)
	}
	if err := a.create(dir, name, create); err != nil {
		return err
	}
	return a.meta(-1, h, dir, name)
}

// create calls fn to make name, out of whose way it gets what is there.
func (a *applier) create(dir *layerDir, name string, fn func() error) error {
	err := fn()
	if err != unix.EEXIST {
		return err
	}
	var st unix.Stat_t
	if err := files.Lstat(dir.fd, name, &st); err != nil {
		return err
	}
	if err := a.remove(dir, name, &st); err != nil {
		return err
	}
	return fn()
}

func device(h *tar.Header) (mode uint32, dev int, err error) {
	mode = uint32(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeFifo:
		return mode | unix.S_IFIFO, 0, nil
	case tar.TypeBlock:
		mode |= unix.S_IFBLK
	case tar.TypeChar:
		mode |= unix.S_IFCHR
		if h.Devmajor == 0 && h.Devminor == 0 {
			return 0, 0, errors.New("the character device 0:0 is how overlay marks a deletion, and can't be stored")
		}
	}
	// 12 and 20 bits are what the kernel has for them.
	if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
		return 0, 0, fmt.Errorf("the device %d:%d is out of range", h.Devmajor, h.Devminor)
	}
	return mode, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))), nil
}

// regular makes a file with content.
func (a *applier) regular(dir *layerDir, name string, h *tar.Header, r io.Reader) error {
	var fd int
	err := a.create(dir, name, func() (err error) {
		fd, err = unix.Openat(dir.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	err = a.content(fd, h.Size, r)
	if err == nil {
		err = a.meta(fd, h, nil, "")
	}
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	return err
}

func (a *applier) content(fd int, size int64, r io.Reader) error {
	if size == 0 {
		return nil
	}
	buf := getBuffer()
	defer buffers.Put(buf)
	for {
		if err := context.Cause(a.ctx); err != nil {
			return err
		}
		n, rerr := io.ReadFull(r, buf[:min(size, bufferSize)])
		if err := files.WriteAll(fd, buf[:n]); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		size -= int64(n)
		switch {
		case rerr != nil && size > 0:
			return fmt.Errorf("read the tar: %w", rerr)
		case size == 0:
			return nil
		}
	}
}

// link makes name another name of a file, which may be the parent's: that is
// copied then, as overlay would.
func (a *applier) link(dir *layerDir, name string, h *tar.Header) error {
	targetDir, target := path.Split(path.Clean("/" + h.Linkname))
	if target == "" {
		return errors.New("a hard link to the root directory")
	}
	from, err := a.dir(targetDir, false)
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
	}
	if from == dir && target == name {
		return errors.New("a hard link to itself")
	}
	var st unix.Stat_t
	err = files.Lstat(from.fd, target, &st)
	if err == unix.ENOENT {
		err = a.copyUp(a.ctx, from, target, &st)
	} else if err == nil && isWhiteout(&st) {
		err = unix.ENOENT
	}
	if err == nil && files.IsDir(&st) {
		err = unix.EISDIR
	}
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
	}
	err = a.create(dir, name, func() error { return unix.Linkat(from.fd, target, dir.fd, name, 0) })
	if err != nil {
		return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
	}
	// As upstream does: the entry's metadata counts for the file.
	h.Typeflag = typeOf(&st)
	return a.meta(-1, h, dir, name)
}

func typeOf(st *unix.Stat_t) byte {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		return tar.TypeSymlink
	case unix.S_IFREG:
		return tar.TypeReg
	}
	return tar.TypeFifo // or a device: the difference doesn't matter for metadata
}

// meta sets owner, xattrs, mode and times. It works on the open file fd, or on
// name in dir if name isn't empty.
func (a *applier) meta(fd int, h *tar.Header, dir *layerDir, name string) error {
	open := name == ""
	xattrs := files.XattrsOf(fd)
	var err error
	if open {
		err = unix.Fchown(fd, h.Uid, h.Gid)
	} else {
		xattrs = dir.entry(name)
		err = unix.Fchownat(dir.fd, name, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return rootless.Here().Explain(fmt.Errorf("chown to %d:%d: %w", h.Uid, h.Gid, err), h.Uid, h.Gid)
	}
	for key, value := range h.PAXRecords {
		if key, ok := strings.CutPrefix(key, paxXattr); ok {
			if err := setXattr(xattrs, key, value, h.Typeflag); err != nil {
				return err
			}
		}
	}
	// After chown, which takes the set-id bits away.
	mode := uint32(h.Mode & 0o7777)
	switch {
	case open:
		err = unix.Fchmod(fd, mode)
	case h.Typeflag != tar.TypeSymlink:
		err = chmodAt(dir.fd, name, mode)
	}
	if err != nil {
		return fmt.Errorf("chmod to %o: %w", mode, err)
	}
	t := entryTimes(h)
	if open {
		err = files.SetTimes(fd, t.atime, t.mtime)
	} else {
		err = unix.UtimesNanoAt(dir.fd, name, []unix.Timespec{t.atime, t.mtime}, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// chmodAt changes the mode of what isn't a symlink, but may be a device, which
// must not be opened for real.
func chmodAt(dir int, name string, mode uint32) error {
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmodat(unix.AT_FDCWD, files.Path(fd), mode, 0)
}

// setXattr sets an xattr from a tar. What a host keeps for itself isn't the
// layer's to set, and what the file system or the kind of file can't have is
// left out, both as upstream does. Overlay's own, in either form, would say what
// a mount of the layer shows: what only a privileged user may tell it.
func setXattr(f files.Xattrs, name, value string, typ byte) error {
	if strings.HasPrefix(name, "trusted.") || isOverlayXattr(name) {
		return nil
	}
	err := f.Set(name, []byte(value))
	switch {
	case err == nil, errors.Is(err, unix.ENOTSUP):
		return nil
	case errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") && typ != tar.TypeReg && typ != tar.TypeDir:
		return nil
	}
	return fmt.Errorf("set xattr %s: %w", name, err)
}

// entryTimes are the times an entry gives its file. The access time is that of
// the last change if the tar has none that is later.
func entryTimes(h *tar.Header) dirTimes {
	t := dirTimes{timespec(h.ModTime), timespec(h.ModTime)}
	if h.AccessTime.After(h.ModTime) {
		t.atime = timespec(h.AccessTime)
	}
	return t
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// finish sets the times of directories, which everything made in them changed.
func (a *applier) finish() error {
	for _, p := range slices.Sorted(maps.Keys(a.times)) {
		if err := a.setTimes(p, a.times[p]); err != nil {
			return fmt.Errorf("set the times of %s: %w", p, err)
		}
	}
	return nil
}

// setTimes skips a directory that a later entry replaced.
func (a *applier) setTimes(dir string, t dirTimes) error {
	fd, err := files.OpenBeneath(a.root.fd, strings.Trim(dir, "/"), unix.O_RDONLY|unix.O_DIRECTORY)
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		return nil
	default:
		return err
	}
	defer unix.Close(fd)
	return files.SetTimes(fd, t.atime, t.mtime)
}
