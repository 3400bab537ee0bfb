package filetree

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// unpack extracts src to the directory dest if it is a regular file that holds
// an archive (LLB-071), and reports whether it does.
func (c *copying) unpack(ctx context.Context, src, dest string) (done bool, err error) {
	from, err := c.src.resolve(path.Join("/", src), true)
	if err != nil {
		return false, err
	}
	if st, err := c.src.lstat(from); err != nil || !files.IsRegular(&st) {
		return false, nil // the copy says what is wrong
	}
	f, err := c.src.openRegular(from)
	if err != nil {
		return false, err
	}
	defer f.Close()
	r, closeReader, err := decompress(f)
	if err != nil {
		return false, nil // no archive that we know: it is copied
	}
	defer closeReader()
	tr := tar.NewReader(r)
	hdr, err := nextHeader(tr)
	if err != nil {
		return false, nil
	}

	to, err := c.dst.resolve(dest, true)
	if err != nil {
		return false, err
	}
	made, err := c.dst.mkdirAll(to, 0o755, c.Stamp)
	if err != nil {
		return false, err
	}
	fd, err := c.dst.openDir(to)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	x := &extraction{root: At(fd), owner: c.Stamp.Owner, parent: -1}
	defer x.leave()
	for ; err == nil; hdr, err = nextHeader(tr) {
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
		if err := x.entry(ctx, hdr, tr); err != nil {
			return false, fmt.Errorf("unpack %s: entry %q: %w", from, hdr.Name, err)
		}
	}
	if err != io.EOF {
		return false, fmt.Errorf("unpack %s: %w", from, err)
	}
	if err := x.touchDirs(); err != nil {
		return false, fmt.Errorf("unpack %s: %w", from, err)
	}
	return true, c.dst.touchAll(made, c.Stamp)
}

// nextHeader is tr.Next; names that lead outside are brought inside later.
func nextHeader(tr *tar.Reader) (*tar.Header, error) {
	hdr, err := tr.Next()
	if errors.Is(err, tar.ErrInsecurePath) {
		err = nil
	}
	return hdr, err
}

// decompress returns what r holds, decompressed if it is compressed.
func decompress(r io.Reader) (_ io.Reader, closeReader func(), err error) {
	buf := bufio.NewReaderSize(r, 64<<10)
	start, err := buf.Peek(10)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	nothing := func() {}
	switch {
	case bytes.HasPrefix(start, []byte("BZh")):
		return bzip2.NewReader(buf), nothing, nil
	case bytes.HasPrefix(start, []byte{0x1f, 0x8b, 8}):
		z, err := gzip.NewReader(buf)
		return z, nothing, err
	case bytes.HasPrefix(start, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		z, err := xz.NewReader(buf)
		return z, nothing, err
	case bytes.HasPrefix(start, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(start) >= 8 && binary.LittleEndian.Uint32(start)&^0xf == 0x184d2a50: // a skippable frame
		z, err := zstd.NewReader(buf)
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return buf, nothing, nil
}

// extraction writes the entries of an archive below root. Unlike in a layer,
// ".wh." names mean nothing.
type extraction struct {
	root  Root
	owner *Owner // of everything, nil for what the archive says
	dirs  []dirTime

	parent int    // the directory that the last entry was in, -1 for none
	at     string // its path
}

type dirTime struct {
	path  string
	times []unix.Timespec
}

// enter opens the directory at p, made if it isn't there, for an entry.
func (x *extraction) enter(p string) error {
	if x.parent >= 0 && x.at == p {
		return nil
	}
	x.leave()
	to, err := x.root.resolve(p, true)
	if err != nil {
		return err
	}
	if _, err := x.root.mkdirAll(to, 0o755, Stamp{Owner: &Owner{}}); err != nil {
		return err
	}
	fd, err := x.root.openDir(to)
	if err != nil {
		return err
	}
	x.parent, x.at = fd, p
	return nil
}

func (x *extraction) leave() {
	if x.parent >= 0 {
		unix.Close(x.parent)
	}
	x.parent = -1
}

func (x *extraction) entry(ctx context.Context, hdr *tar.Header, content io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p := path.Join("/", hdr.Name) // ".." at the top stays there
	if p == "/" {
		if hdr.Typeflag == tar.TypeDir {
			return nil // the directory that all goes to
		}
		return errors.New("it would replace the destination itself")
	}
	if err := x.enter(path.Dir(p)); err != nil {
		return err
	}
	name := path.Base(p)
	var st unix.Stat_t
	err := files.Lstat(x.parent, name, &st)
	if err != nil && err != unix.ENOENT {
		return err
	}
	merge := err == nil && files.IsDir(&st) && hdr.Typeflag == tar.TypeDir
	if err == nil && !merge {
		if err := files.RemoveAll(x.parent, name); err != nil {
			return err
		}
		if err := x.enter(path.Dir(p)); err != nil {
			return err
		}
	}
	if (hdr.Typeflag == tar.TypeChar || hdr.Typeflag == tar.TypeBlock) && rootless.Here().Mapped() {
		return nil // a device can't be made there; upstream leaves it out, too
	}
	if err := x.create(ctx, hdr, name, merge, content); err != nil {
		return err
	}
	return x.describe(hdr, p, name)
}

func (x *extraction) create(ctx context.Context, hdr *tar.Header, name string, merge bool, content io.Reader) error {
	perm := uint32(hdr.Mode) & 0o777
	switch hdr.Typeflag {
	case tar.TypeDir:
		if merge {
			return nil
		}
		return unix.Mkdirat(x.parent, name, perm)
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return x.regular(ctx, name, perm, content)
	case tar.TypeSymlink:
		return unix.Symlinkat(hdr.Linkname, x.parent, name)
	case tar.TypeLink:
		return x.link(hdr.Linkname, name)
	case tar.TypeChar:
		return x.mknod(hdr, name, unix.S_IFCHR|perm)
	case tar.TypeBlock:
		return x.mknod(hdr, name, unix.S_IFBLK|perm)
	case tar.TypeFifo:
		return x.mknod(hdr, name, unix.S_IFIFO|perm)
	}
	return fmt.Errorf("unknown type %q", hdr.Typeflag)
}

func (x *extraction) mknod(hdr *tar.Header, name string, mode uint32) error {
	return unix.Mknodat(x.parent, name, mode, int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))))
}

// link makes a hard link to the file called target in the archive, that is,
// below root.
func (x *extraction) link(target, name string) error {
	at, err := x.root.resolve(path.Join("/", target), false)
	if err != nil {
		return err
	}
	if at == "/" {
		return pathErr("link", at, unix.EPERM)
	}
	dir, base, err := x.root.openParent(at)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return pathErr("link", at, unix.Linkat(dir, base, x.parent, name, 0))
}

func (x *extraction) regular(ctx context.Context, name string, perm uint32, content io.Reader) (err error) {
	fd, err := unix.Openat(x.parent, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, perm)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := unix.Close(fd); err == nil {
			err = cerr
		}
	}()
	return files.WriteSparse(ctx, fd, content)
}

// describe gives the entry its metadata.
func (x *extraction) describe(hdr *tar.Header, p, name string) error {
	owner := Owner{hdr.Uid, hdr.Gid}
	if x.owner != nil {
		owner = *x.owner
	}
	if err := unix.Fchownat(x.parent, name, owner.UID, owner.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return owner.explain(fmt.Errorf("chown to %d:%d: %w", owner.UID, owner.GID, err))
	}
	xattrs := files.XattrsAt(x.parent, name)
	for key, value := range hdr.PAXRecords {
		key, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok || !xattrAllowed(key) {
			continue
		}
		err := xattrs.Set(key, []byte(value))
		if err != nil && err != unix.ENOTSUP && err != unix.EPERM { // as far as we may
			return fmt.Errorf("set extended attribute %s: %w", key, err)
		}
	}
	var st unix.Stat_t
	if err := files.Lstat(x.parent, name, &st); err != nil {
		return err
	}
	if !files.IsLink(&st) {
		if err := unix.Fchmodat(x.parent, name, uint32(hdr.Mode)&0o7777, 0); err != nil {
			return fmt.Errorf("chmod to %o: %w", hdr.Mode, err)
		}
	}
	times := tarTimes(hdr)
	if hdr.Typeflag == tar.TypeDir {
		x.dirs = append(x.dirs, dirTime{p, times})
	}
	return unix.UtimesNanoAt(x.parent, name, times, unix.AT_SYMLINK_NOFOLLOW)
}

// touchDirs sets the times of directories, after all is in them.
func (x *extraction) touchDirs() error {
	for _, d := range x.dirs {
		at, err := x.root.resolve(d.path, false)
		if err != nil {
			return err
		}
		dir, name, err := x.root.openParent(at)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			continue // a later entry replaced it
		}
		if err != nil {
			return err
		}
		err = unix.UtimesNanoAt(dir, name, d.times, unix.AT_SYMLINK_NOFOLLOW)
		unix.Close(dir)
		if err != nil && err != unix.ENOENT {
			return pathErr("set time of", at, err)
		}
	}
	return nil
}

// tarTimes are the times of access and change of an entry. Those that a
// file can't have are the epoch.
func tarTimes(hdr *tar.Header) []unix.Timespec {
	bound := func(t time.Time) unix.Timespec {
		if t.Before(time.Unix(0, 0)) || t.After(time.Unix(0, 1<<63-1)) {
			t = time.Unix(0, 0)
		}
		return unix.NsecToTimespec(t.UnixNano())
	}
	accessed := hdr.AccessTime
	if accessed.Before(hdr.ModTime) {
		accessed = hdr.ModTime
	}
	return []unix.Timespec{bound(accessed), bound(hdr.ModTime)}
}
