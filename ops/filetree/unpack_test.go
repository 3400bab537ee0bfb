package filetree

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// entry is an entry of an archive: a header and what it holds.
type entry struct {
	tar.Header
	data string
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(treetest.Time+5, 0)
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func fileEntry(name, data string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Uid: 3, Gid: 4}, data}
}

func linkEntry(kind byte, name, target string) entry {
	return entry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func dirEntry(name string, mode int64) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, ""}
}

// add unpacks the archive, called add, to dest below dst.
func add(t testing.TB, archive []byte, dst, dest string, owner *Owner) error {
	t.Helper()
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "add"), archive, 0o644); err != nil {
		t.Fatal(err)
	}
	a := &Copy{Src: "/add", Dest: dest, MakeParents: true, Unpack: true, Stamp: Stamp{Owner: owner}}
	return doCopy(t, src, dst, a)
}

// compat: LLB-071
func TestUnpackCompressions(t *testing.T) {
	plain := tarOf(t, fileEntry("f", "hello"))
	through := func(open func(w io.Writer) (io.WriteCloser, error)) []byte {
		var b bytes.Buffer
		w, err := open(&b)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.Write(plain)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	gz := through(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
	zst := through(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
	bz2 := exec.Command("bzip2", "-c")
	bz2.Stdin = bytes.NewReader(plain)
	bz, err := bz2.Output()
	if err != nil {
		t.Fatalf("this test needs bzip2: %v", err)
	}
	for name, archive := range map[string][]byte{
		"plain": plain,
		"gzip":  gz,
		"bzip2": bz,
		"xz":    through(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }),
		"zstd":  zst,
		// A frame that decoders skip in front of the others.
		"zstd after a skippable frame": append([]byte{0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'h', 'i'}, zst...),
	} {
		t.Run(name, func(t *testing.T) {
			dst := t.TempDir()
			if err := add(t, archive, dst, "/x/y", nil); err != nil {
				t.Fatal(err)
			}
			treetest.Want(t, dst, "x d 755 0:0\nx/y d 755 0:0\nx/y/f - 640 3:4 hello")
		})
	}
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("just text"), "gzip of text": gzipOf(t, "text"), "cut gzip header": gz[:5],
	} {
		t.Run(name+" is copied", func(t *testing.T) {
			dst := t.TempDir()
			if err := add(t, data, dst, "/x", nil); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(dst, "x")); err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	t.Run("cut archive", func(t *testing.T) {
		big := tarOf(t, fileEntry("f", "hello"), fileEntry("g", strings.Repeat("x", 5000)))
		err := add(t, big[:3000], t.TempDir(), "/x", nil)
		if err == nil || !strings.Contains(err.Error(), "unpack /add") {
			t.Errorf("error %v", err)
		}
	})
}

func gzipOf(t testing.TB, s string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := io.WriteString(w, s)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// compat: LLB-071
func TestUnpackEntries(t *testing.T) {
	dev := func(kind byte, name string) entry {
		return entry{tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: 1, Devminor: 3}, ""}
	}
	xattr := fileEntry("x", "")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "1", "SCHILY.xattr.trusted.overlay.opaque": "y"}
	dst := treetest.Tree("old d 700 8:8\nold/kept - 644 0:0 k\nwas d\nwas/in - 644\nlink l 777 0:0 old\ntext - 644 0:0 t").Make(t)
	archive := tarOf(t,
		dirEntry("./", 0o700),
		dirEntry("old/", 0o751),
		fileEntry("was", "now a file"),
		fileEntry("text", "new"),
		fileEntry("implied/dirs/f", "i"),
		fileEntry("./dots/../dots2/f", "d"),
		fileEntry("/absolute", "a"),
		fileEntry("../../up", "u"),
		entry{tar.Header{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o4755}, "s"},
		linkEntry(tar.TypeSymlink, "sym", "../../etc/passwd"),
		linkEntry(tar.TypeLink, "hard", "text"),
		dev(tar.TypeChar, "c"), dev(tar.TypeBlock, "b"), dev(tar.TypeFifo, "p"),
		fileEntry(".wh.gone", "no whiteout"),
		fileEntry("link/through", "l"),
		xattr,
	)
	if err := add(t, archive, dst, "/", nil); err != nil {
		t.Fatal(err)
	}
	treetest.Want(t, dst, `
		.wh.gone - 640 3:4 no whiteout
		absolute - 640 3:4 a
		b b 600 0:0 1:3
		c c 600 0:0 1:3
		dots2 d 755 0:0
		dots2/f - 640 3:4 d
		hard - 777 0:0 new
		implied d 755 0:0
		implied/dirs d 755 0:0
		implied/dirs/f - 640 3:4 i
		link l 777 0:0 old
		old d 751 0:0
		old/kept - 644 0:0 k
		old/through - 640 3:4 l
		p p 600 0:0
		suid - 4755 0:0 s
		sym l 777 0:0 ../../etc/passwd
		text h hard
		up - 640 3:4 u
		was - 640 3:4 now a file
		x - 640 3:4`)
	var st unix.Stat_t
	for _, name := range []string{"old", "text", "sym", "p"} {
		if err := unix.Lstat(filepath.Join(dst, name), &st); err != nil || treetest.ShowTime(&st) != "@5" {
			t.Errorf("time of %s is %s, %v", name, treetest.ShowTime(&st), err)
		}
	}
	var b [8]byte
	if n, err := unix.Lgetxattr(filepath.Join(dst, "x"), "user.a", b[:]); err != nil || string(b[:n]) != "1" {
		t.Errorf("user.a: %v", err)
	}
	if _, err := unix.Lgetxattr(filepath.Join(dst, "x"), "trusted.overlay.opaque", b[:]); err != unix.ENODATA {
		t.Errorf("an archive set overlay's own attribute: %v", err)
	}

	owned := t.TempDir()
	if err := add(t, tarOf(t, dirEntry("d", 0o755), fileEntry("d/f", "x")), owned, "/new", &Owner{50, 60}); err != nil {
		t.Fatal(err)
	}
	treetest.Want(t, owned, "new d 755 50:60\nnew/d d 755 50:60\nnew/d/f - 640 50:60 x")
}

// Zeros don't take space, and what is between them is there.
func TestUnpackSparse(t *testing.T) {
	data := strings.Repeat("\x00", 4<<20) + "middle" + strings.Repeat("\x00", 3<<20)
	dst := t.TempDir()
	if err := add(t, tarOf(t, fileEntry("f", data), fileEntry("end", "e")), dst, "/", nil); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dst, "f"), &st); err != nil || st.Size != int64(len(data)) || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes in %d blocks, %v", st.Size, st.Blocks, err)
	}
	if got, err := os.ReadFile(filepath.Join(dst, "f")); err != nil || string(got) != data {
		t.Errorf("the file differs, %v", err)
	}
}

// Entries can't get out of the destination, by their names or through links
// that were there or came before.
func TestUnpackStaysInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := treetest.Dump(t, outside, true)
	up := strings.Repeat("../", 30) + outside[1:]
	for name, entries := range map[string][]entry{
		"names":          {fileEntry(up+"/x", "e"), fileEntry(outside+"/y", "e")},
		"link":           {linkEntry(tar.TypeSymlink, "l", outside), fileEntry("l/x", "e")},
		"relative link":  {linkEntry(tar.TypeSymlink, "l", up), fileEntry("l/x", "e"), dirEntry("l", 0o777)},
		"link to a file": {linkEntry(tar.TypeSymlink, "l", outside+"/secret"), fileEntry("l", "e")},
		"hard link":      {linkEntry(tar.TypeLink, "l", outside+"/secret"), fileEntry("l", "e")},
		"link to a link": {linkEntry(tar.TypeSymlink, "l", up+"/secret"), linkEntry(tar.TypeLink, "h", "l"), fileEntry("h", "e")},
		"proc":           {linkEntry(tar.TypeSymlink, "l", "/proc/self/root"+outside), fileEntry("l/x", "e")},
		"link, replaced": {dirEntry("d", 0o755), fileEntry("d/f", ""), linkEntry(tar.TypeSymlink, "d", outside), fileEntry("d/f", "e")},
		"existing link":  {fileEntry("there/x", "e"), fileEntry("there/secret", "e")},
	} {
		dst := treetest.Tree("sub d\nsub/there l 777 0:0 " + outside + "\nkeep - 644 0:0 k").Make(t)
		err := add(t, tarOf(t, entries...), dst, "/sub", nil)
		if err != nil && strings.Contains(err.Error(), dst) {
			t.Errorf("%s: error shows where the state is: %v", name, err)
		}
		if after := treetest.Dump(t, outside, true); after != before {
			t.Errorf("%s: outside was\n%s\nand is\n%s", name, before, after)
		}
		if got, err := os.ReadFile(filepath.Join(dst, "keep")); err != nil || string(got) != "k" {
			t.Errorf("%s: a file beside the destination is %q, %v", name, got, err)
		}
	}
}

// FuzzUnpack feeds archives from outside: they may fail, but write nothing
// beside their destination.
func FuzzUnpack(f *testing.F) {
	f.Add(tarOf(f, dirEntry("d", 0o755), fileEntry("d/f", "x"), linkEntry(tar.TypeSymlink, "l", "/x"), fileEntry("l/y", "")))
	f.Add(tarOf(f, linkEntry(tar.TypeLink, "l", "../x"), fileEntry("../x", "")))
	f.Fuzz(func(t *testing.T, archive []byte) {
		dst := t.TempDir()
		if err := os.Mkdir(filepath.Join(dst, "to"), 0o755); err != nil {
			t.Fatal(err)
		}
		_ = add(t, archive, dst, "/to", nil)
		entries, err := os.ReadDir(dst)
		if err != nil || len(entries) != 1 {
			t.Errorf("%v beside the destination, %v", entries, err)
		}
	})
}
