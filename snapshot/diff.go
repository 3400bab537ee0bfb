package snapshot

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	paxXattr       = "SCHILY.xattr."
)

// diffWriter writes changes as a tar.
type diffWriter struct {
	ctx   context.Context
	tw    *tar.Writer
	links map[uint64]string
}

func writeUpper(ctx context.Context, layer layerInfo, parent *View, w io.Writer) error {
	d := &diffWriter{ctx: ctx, tw: tar.NewWriter(w), links: map[uint64]string{}}
	if err := walkChanges(ctx, layer, parent, d, false); err != nil {
		return err
	}
	return d.tw.Close()
}

func (d *diffWriter) foreign() {}

func (d *diffWriter) leave(*changeDir) error { return nil }

func (d *diffWriter) dir(dir *changeDir) error {
	if dir.parent == nil {
		return nil // the root's metadata isn't part of a layer
	}
	h, err := d.newHeader(&dir.st, dir.path, files.XattrsOf(dir.fd))
	if err != nil {
		return err
	}
	return d.header(h)
}

// whiteout writes the deletion of name.
func (d *diffWriter) whiteout(dir *changeDir, name string) error {
	return d.header(&tar.Header{Typeflag: tar.TypeReg, Name: dir.path + whiteoutPrefix + name, ModTime: time.Unix(0, 0)})
}

func (d *diffWriter) header(h *tar.Header) error {
	if err := d.tw.WriteHeader(h); err != nil {
		return fmt.Errorf("tar header of /%s: %w", h.Name, err)
	}
	return nil
}

// file writes everything that is no directory.
func (d *diffWriter) file(dir *changeDir, name string, st *unix.Stat_t) error {
	path := dir.path + name
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return d.regular(dir, name, path, st)
	}
	h, err := d.newHeader(st, path, files.XattrsAt(dir.fd, name))
	if err != nil {
		return err
	}
	if files.IsLink(st) {
		if h.Linkname, err = files.Readlink(dir.fd, name); err != nil {
			return fmt.Errorf("read link /%s: %w", path, err)
		}
	}
	d.link(st, h)
	return d.header(h)
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

func (d *diffWriter) regular(dir *changeDir, name, path string, st *unix.Stat_t) error {
	fd, err := files.OpenFile(dir.fd, name)
	if err != nil {
		return fmt.Errorf("open /%s: %w", path, err)
	}
	defer unix.Close(fd)
	h, err := d.newHeader(st, path, files.XattrsOf(fd))
	if err != nil {
		return err
	}
	h.Size = st.Size
	linked := d.link(st, h)
	if err := d.header(h); err != nil || linked {
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
		n, err := files.Retry(func() (int, error) { return unix.Read(fd, buf[:min(left, bufferSize)]) })
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
func (d *diffWriter) newHeader(st *unix.Stat_t, path string, xattrs files.Xattrs) (*tar.Header, error) {
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
	value, ok, err := xattrs.Get(capability)
	if err != nil {
		return nil, fmt.Errorf("xattrs of /%s: %w", path, err)
	}
	if ok {
		h.PAXRecords = map[string]string{paxXattr + capability: string(value)}
	}
	return h, nil
}
