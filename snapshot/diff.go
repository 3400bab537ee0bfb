package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	paxXattr       = "SCHILY.xattr."
	capability     = "security.capability"
)

// diffWriter writes the layer directory upper as a tar.
type diffWriter struct {
	ctx   context.Context
	tw    *tar.Writer
	xattr string // prefix of overlay's own xattrs
	links map[uint64]string
	buf   []byte // for directories
}

// diffDir is a directory that is being written.
type diffDir struct {
	fd      int
	lower   int    // the same directory in the parent, -1 for none
	path    string // "" for the root, else with a slash at the end
	header  *tar.Header
	written bool // is its header
	parent  *diffDir
	// xwhiteouts: deletions in it may be empty files with an xattr, the form
	// for where devices can't be made.
	xwhiteouts bool
}

func writeUpper(ctx context.Context, layer layerInfo, parent *View, w io.Writer) error {
	d := &diffWriter{ctx: ctx, tw: tar.NewWriter(w), xattr: layer.xattr, links: map[uint64]string{}, buf: make([]byte, 32<<10)}
	fd, err := openDir(unix.AT_FDCWD, layer.dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", layer.dir, gone(err))
	}
	defer unix.Close(fd)
	lower := -1
	if parent != nil {
		if lower, err = openDir(parent.FD(), "."); err != nil {
			return fmt.Errorf("open the parent: %w", err)
		}
		defer unix.Close(lower)
	}
	root := &diffDir{fd: fd, lower: lower, written: true}
	if root.xwhiteouts, err = d.hasXwhiteouts(fd); err != nil {
		return err
	}
	if err := d.children(root); err != nil {
		return err
	}
	return d.tw.Close()
}

// children writes what is in dir.
func (d *diffWriter) children(dir *diffDir) error {
	names, err := readNames(dir.fd, d.buf)
	if err != nil {
		return fmt.Errorf("read directory /%s: %w", dir.path, err)
	}
	for _, name := range names {
		if err := context.Cause(d.ctx); err != nil {
			return err
		}
		if err := d.child(dir, name); err != nil {
			return err
		}
	}
	return nil
}

// child writes one entry of dir, and all below it.
func (d *diffWriter) child(dir *diffDir, name string) error {
	var st, lower unix.Stat_t
	if err := lstatAt(dir.fd, name, &st); err != nil {
		return fmt.Errorf("stat /%s%s: %w", dir.path, name, err)
	}
	below := false
	if dir.lower >= 0 {
		switch err := lstatAt(dir.lower, name, &lower); {
		case err == nil:
			below = true
		case !errors.Is(err, unix.ENOENT):
			return fmt.Errorf("stat /%s%s in the parent: %w", dir.path, name, err)
		}
	}
	deleted, err := d.isDeletion(dir, name, &st)
	switch {
	case err != nil:
		return err
	case deleted && below:
		return d.whiteout(dir, name)
	case deleted, st.Mode&unix.S_IFMT == unix.S_IFSOCK:
		return nil
	case isDir(&st):
		return d.dir(dir, name, &st, &lower, below)
	}
	// A file that got a second name is written under both, and one that had
	// several in the parent, and no longer shares its content, for itself.
	if below && st.Nlink == 1 && lower.Nlink == 1 {
		same, err := d.sameFile(dir, name, &st, &lower)
		if err != nil || same {
			return err
		}
	}
	return d.file(dir, name, &st)
}

// isDeletion says whether name is a whiteout, in either form.
func (d *diffWriter) isDeletion(dir *diffDir, name string, st *unix.Stat_t) (bool, error) {
	if isWhiteout(st) {
		return true, nil
	}
	if !dir.xwhiteouts || st.Size != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false, nil
	}
	_, ok, err := d.xattrs(dir.fd, name).value(d.xattr + "whiteout")
	if err != nil {
		return false, fmt.Errorf("xattrs of /%s%s: %w", dir.path, name, err)
	}
	return ok, nil
}

func (d *diffWriter) hasXwhiteouts(fd int) (bool, error) {
	v, _, err := xattrFile{fd: fd}.value(d.xattr + "opaque")
	return string(v) == "x", err
}

func (d *diffWriter) xattrs(dir int, name string) xattrFile {
	return xattrFile{path: fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)}
}

// whiteout writes the deletion of name.
func (d *diffWriter) whiteout(dir *diffDir, name string) error {
	return d.header(dir, &tar.Header{Typeflag: tar.TypeReg, Name: dir.path + whiteoutPrefix + name, ModTime: time.Unix(0, 0)})
}

// header writes h, and before it the directories that it is in.
func (d *diffWriter) header(dir *diffDir, h *tar.Header) error {
	if dir != nil && !dir.written {
		dir.written = true
		if err := d.header(dir.parent, dir.header); err != nil {
			return err
		}
	}
	if err := d.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("tar header of /%s: %w", h.Name, err)
	}
	return nil
}

// dir writes the directory name.
func (d *diffWriter) dir(in *diffDir, name string, st, lower *unix.Stat_t, below bool) (err error) {
	dir := &diffDir{lower: -1, path: in.path + name + "/", parent: in}
	if dir.fd, err = openDir(in.fd, name); err != nil {
		return fmt.Errorf("open /%s: %w", dir.path, err)
	}
	defer unix.Close(dir.fd)
	own := xattrFile{fd: dir.fd}
	if v, ok, err := own.value(d.xattr + "redirect"); err != nil {
		return fmt.Errorf("xattrs of /%s: %w", dir.path, err)
	} else if ok {
		return fmt.Errorf("/%s is a redirect to %q: the layer was mounted with redirect_dir", dir.path, v)
	}
	opaque, _, err := own.value(d.xattr + "opaque")
	if err != nil {
		return fmt.Errorf("xattrs of /%s: %w", dir.path, err)
	}
	dir.xwhiteouts = string(opaque) == "x"
	if dir.header, err = d.newHeader(st, dir.path, own); err != nil {
		return err
	}
	if below && isDir(lower) {
		fd, err := openDir(in.lower, name)
		if err != nil {
			return fmt.Errorf("open /%s in the parent: %w", dir.path, err)
		}
		defer unix.Close(fd)
		if string(opaque) == "y" {
			return d.opaqueDir(dir)
		}
		dir.lower = fd
		same, err := sameMeta(st, lower, own, xattrFile{fd: fd})
		if err != nil {
			return fmt.Errorf("compare /%s with the parent's: %w", dir.path, err)
		}
		if same {
			// It is written when something in it is.
			return d.children(dir)
		}
	}
	dir.written = true
	if err := d.header(in, dir.header); err != nil {
		return err
	}
	return d.children(dir)
}

// opaqueDir writes a directory that hides the parent's of the same name.
func (d *diffWriter) opaqueDir(dir *diffDir) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: dir.path + opaqueMarker, ModTime: time.Unix(0, 0)}
	if err := d.header(dir, h); err != nil {
		return err
	}
	return d.children(dir)
}

// file writes everything that is no directory.
func (d *diffWriter) file(dir *diffDir, name string, st *unix.Stat_t) error {
	path := dir.path + name
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return d.regular(dir, name, path, st)
	}
	h, err := d.newHeader(st, path, d.xattrs(dir.fd, name))
	if err != nil {
		return err
	}
	if isSymlink(st) {
		if h.Linkname, err = readlinkAt(dir.fd, name); err != nil {
			return fmt.Errorf("read link /%s: %w", path, err)
		}
	}
	d.link(st, h)
	return d.header(dir, h)
}

// link makes a hard link of h if its file was written before.
func (d *diffWriter) link(st *unix.Stat_t, h *tar.Header) (linked bool) {
	if st.Nlink < 2 {
		return false
	}
	if first, ok := d.links[st.Ino]; ok {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		return true
	}
	d.links[st.Ino] = h.Name
	return false
}

func (d *diffWriter) regular(dir *diffDir, name, path string, st *unix.Stat_t) error {
	fd, err := retry(func() (int, error) {
		return unix.Openat(dir.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	})
	if err != nil {
		return fmt.Errorf("open /%s: %w", path, err)
	}
	defer unix.Close(fd)
	h, err := d.newHeader(st, path, xattrFile{fd: fd})
	if err != nil {
		return err
	}
	h.Size = st.Size
	linked := d.link(st, h)
	if err := d.header(dir, h); err != nil || linked {
		return err
	}
	return d.data(fd, path, st.Size)
}

// data writes the content of a file.
func (d *diffWriter) data(fd int, path string, size int64) error {
	buf := getBuffer()
	defer buffers.Put(buf)
	for left := size; left > 0; {
		if err := context.Cause(d.ctx); err != nil {
			return err
		}
		n, err := retry(func() (int, error) { return unix.Read(fd, buf[:min(left, bufferSize)]) })
		if err != nil {
			return fmt.Errorf("read /%s: %w", path, err)
		}
		if n == 0 {
			return fmt.Errorf("read /%s: it ends %d bytes before its size of %d", path, left, size)
		}
		if _, err := d.tw.Write(buf[:n]); err != nil {
			return fmt.Errorf("write /%s: %w", path, err)
		}
		left -= int64(n)
	}
	return nil
}

// newHeader describes a file.
func (d *diffWriter) newHeader(st *unix.Stat_t, path string, xattrs xattrFile) (*tar.Header, error) {
	h := &tar.Header{
		Name: path,
		Mode: int64(st.Mode & 0o7777),
		Uid:  int(st.Uid),
		Gid:  int(st.Gid),
		// Whole seconds: in this format the library would write the rest too.
		ModTime: time.Unix(st.Mtim.Sec, 0),
		Format:  tar.FormatPAX,
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag = tar.TypeReg
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return nil, fmt.Errorf("/%s has the unknown file type %o", path, st.Mode&unix.S_IFMT)
	}
	kept, err := keptXattrs(xattrs)
	if err != nil {
		return nil, fmt.Errorf("xattrs of /%s: %w", path, err)
	}
	for name, value := range kept {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string, len(kept))
		}
		h.PAXRecords[paxXattr+name] = string(value)
	}
	return h, nil
}

// keptXattrs returns the xattrs that are part of a layer: file capabilities, as
// in upstream's layers. What users and hosts set stays where it was set.
func keptXattrs(f xattrFile) (map[string][]byte, error) {
	names, err := f.names()
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var out map[string][]byte
	for _, name := range names {
		if name != capability {
			continue
		}
		value, ok, err := f.value(name)
		if err != nil {
			return nil, err
		}
		if ok {
			if out == nil {
				out = map[string][]byte{}
			}
			out[name] = value
		}
	}
	return out, nil
}

// sameMeta says whether two files agree in type, mode, owner, device and xattrs.
func sameMeta(a, b *unix.Stat_t, ax, bx xattrFile) (bool, error) {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev {
		return false, nil
	}
	am, err := keptXattrs(ax)
	if err != nil {
		return false, err
	}
	bm, err := keptXattrs(bx)
	if err != nil || len(am) != len(bm) {
		return false, err
	}
	for name, value := range am {
		if other, ok := bm[name]; !ok || !bytes.Equal(value, other) {
			return false, nil
		}
	}
	return true, nil
}

// sameFile says whether name is in the layer although nothing changed: it was
// opened for writing, or moved away and back. As upstream does, files with the
// same size and time are taken to be the same, unless both times are whole
// seconds: those may come from a tar, and then the content decides.
func (d *diffWriter) sameFile(dir *diffDir, name string, st, lower *unix.Stat_t) (same bool, err error) {
	if st.Size != lower.Size || st.Mtim != lower.Mtim || st.Mode != lower.Mode {
		return false, nil
	}
	same, err = sameMeta(st, lower, d.xattrs(dir.fd, name), d.xattrs(dir.lower, name))
	if err == nil && same && st.Mtim.Nsec == 0 {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			same, err = sameLink(dir.fd, dir.lower, name)
		case unix.S_IFREG:
			same, err = sameContent(dir.fd, dir.lower, name)
		}
	}
	if err != nil {
		err = fmt.Errorf("compare /%s%s with the parent's: %w", dir.path, name, err)
	}
	return same, err
}

func sameLink(a, b int, name string) (bool, error) {
	at, err := readlinkAt(a, name)
	if err != nil {
		return false, err
	}
	bt, err := readlinkAt(b, name)
	return at == bt, err
}

func sameContent(a, b int, name string) (bool, error) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	af, err := unix.Openat(a, name, flags, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(af)
	bf, err := unix.Openat(b, name, flags, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(bf)
	abuf, bbuf := getBuffer(), getBuffer()
	defer buffers.Put(abuf)
	defer buffers.Put(bbuf)
	for off := int64(0); ; {
		an, err := unix.Pread(af, abuf[:], off)
		if err != nil {
			return false, err
		}
		bn, err := unix.Pread(bf, bbuf[:], off)
		if err != nil {
			return false, err
		}
		if n := min(an, bn); an == 0 || bn == 0 || !bytes.Equal(abuf[:n], bbuf[:n]) {
			return an == 0 && bn == 0, nil
		}
		off += int64(min(an, bn))
	}
}

func readlinkAt(dir int, name string) (string, error) {
	var buf [4097]byte
	n, err := unix.Readlinkat(dir, name, buf[:])
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}
