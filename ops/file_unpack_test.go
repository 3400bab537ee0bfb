package ops

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

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/solver/pb"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// fileTestEntry is an entry of an archive: a header and what it holds.
type fileTestEntry struct {
	tar.Header
	data string
}

func fileTestTar(t testing.TB, entries ...fileTestEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.data))
		if e.ModTime.IsZero() {
			e.ModTime = time.Unix(fileTestTime+5, 0)
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

func fileTestFile(name, data string) fileTestEntry {
	return fileTestEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Uid: 3, Gid: 4}, data}
}

func fileTestLink(kind byte, name, target string) fileTestEntry {
	return fileTestEntry{tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, ""}
}

func fileTestDir(name string, mode int64) fileTestEntry {
	return fileTestEntry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, ""}
}

// fileTestAdd unpacks the archive, called add, to dest below dst.
func fileTestAdd(t testing.TB, archive []byte, dst, dest string, owner *fileIDs) error {
	t.Helper()
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "add"), archive, 0o644); err != nil {
		t.Fatal(err)
	}
	return fileTestDoCopy(t, src, dst, &pb.FileActionCopy{Src: "/add", Dest: dest, Mode: -1, Timestamp: -1,
		CreateDestPath: true, AttemptUnpackDockerCompatibility: true}, owner)
}

// compat: LLB-071
func TestFileUnpackCompressions(t *testing.T) {
	plain := fileTestTar(t, fileTestFile("f", "hello"))
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
			if err := fileTestAdd(t, archive, dst, "/x/y", nil); err != nil {
				t.Fatal(err)
			}
			fileTestWant(t, dst, "x d 755 0:0\nx/y d 755 0:0\nx/y/f - 640 3:4 hello")
		})
	}
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("just text"), "gzip of text": gzipOf(t, "text"), "cut gzip header": gz[:5],
	} {
		t.Run(name+" is copied", func(t *testing.T) {
			dst := t.TempDir()
			if err := fileTestAdd(t, data, dst, "/x", nil); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(filepath.Join(dst, "x")); err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	t.Run("cut archive", func(t *testing.T) {
		big := fileTestTar(t, fileTestFile("f", "hello"), fileTestFile("g", strings.Repeat("x", 5000)))
		err := fileTestAdd(t, big[:3000], t.TempDir(), "/x", nil)
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
func TestFileUnpackEntries(t *testing.T) {
	dev := func(kind byte, name string) fileTestEntry {
		return fileTestEntry{tar.Header{Typeflag: kind, Name: name, Mode: 0o600, Devmajor: 1, Devminor: 3}, ""}
	}
	xattr := fileTestFile("x", "")
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.user.a": "1", "SCHILY.xattr.trusted.overlay.opaque": "y"}
	dst := fileTestTree("old d 700 8:8\nold/kept - 644 0:0 k\nwas d\nwas/in - 644\nlink l 777 0:0 old\ntext - 644 0:0 t").make(t)
	archive := fileTestTar(t,
		fileTestDir("./", 0o700),
		fileTestDir("old/", 0o751),
		fileTestFile("was", "now a file"),
		fileTestFile("text", "new"),
		fileTestFile("implied/dirs/f", "i"),
		fileTestFile("./dots/../dots2/f", "d"),
		fileTestFile("/absolute", "a"),
		fileTestFile("../../up", "u"),
		fileTestEntry{tar.Header{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o4755}, "s"},
		fileTestLink(tar.TypeSymlink, "sym", "../../etc/passwd"),
		fileTestLink(tar.TypeLink, "hard", "text"),
		dev(tar.TypeChar, "c"), dev(tar.TypeBlock, "b"), dev(tar.TypeFifo, "p"),
		fileTestFile(".wh.gone", "no whiteout"),
		fileTestFile("link/through", "l"),
		xattr,
	)
	if err := fileTestAdd(t, archive, dst, "/", nil); err != nil {
		t.Fatal(err)
	}
	fileTestWant(t, dst, `
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
		if err := unix.Lstat(filepath.Join(dst, name), &st); err != nil || fileTestShowTime(&st) != "@5" {
			t.Errorf("time of %s is %s, %v", name, fileTestShowTime(&st), err)
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
	if err := fileTestAdd(t, fileTestTar(t, fileTestDir("d", 0o755), fileTestFile("d/f", "x")), owned, "/new", &fileIDs{50, 60}); err != nil {
		t.Fatal(err)
	}
	fileTestWant(t, owned, "new d 755 50:60\nnew/d d 755 50:60\nnew/d/f - 640 50:60 x")
}

// Zeros don't take space, and what is between them is there.
func TestFileUnpackSparse(t *testing.T) {
	data := strings.Repeat("\x00", 4<<20) + "middle" + strings.Repeat("\x00", 3<<20)
	dst := t.TempDir()
	if err := fileTestAdd(t, fileTestTar(t, fileTestFile("f", data), fileTestFile("end", "e")), dst, "/", nil); err != nil {
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
func TestFileUnpackStaysInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := fileTestDump(t, outside, true)
	up := strings.Repeat("../", 30) + outside[1:]
	for name, entries := range map[string][]fileTestEntry{
		"names":          {fileTestFile(up+"/x", "e"), fileTestFile(outside+"/y", "e")},
		"link":           {fileTestLink(tar.TypeSymlink, "l", outside), fileTestFile("l/x", "e")},
		"relative link":  {fileTestLink(tar.TypeSymlink, "l", up), fileTestFile("l/x", "e"), fileTestDir("l", 0o777)},
		"link to a file": {fileTestLink(tar.TypeSymlink, "l", outside+"/secret"), fileTestFile("l", "e")},
		"hard link":      {fileTestLink(tar.TypeLink, "l", outside+"/secret"), fileTestFile("l", "e")},
		"link to a link": {fileTestLink(tar.TypeSymlink, "l", up+"/secret"), fileTestLink(tar.TypeLink, "h", "l"), fileTestFile("h", "e")},
		"proc":           {fileTestLink(tar.TypeSymlink, "l", "/proc/self/root"+outside), fileTestFile("l/x", "e")},
		"link, replaced": {fileTestDir("d", 0o755), fileTestFile("d/f", ""), fileTestLink(tar.TypeSymlink, "d", outside), fileTestFile("d/f", "e")},
		"existing link":  {fileTestFile("there/x", "e"), fileTestFile("there/secret", "e")},
	} {
		dst := fileTestTree("sub d\nsub/there l 777 0:0 " + outside + "\nkeep - 644 0:0 k").make(t)
		err := fileTestAdd(t, fileTestTar(t, entries...), dst, "/sub", nil)
		if err != nil && strings.Contains(err.Error(), dst) {
			t.Errorf("%s: error shows where the state is: %v", name, err)
		}
		if after := fileTestDump(t, outside, true); after != before {
			t.Errorf("%s: outside was\n%s\nand is\n%s", name, before, after)
		}
		if got, err := os.ReadFile(filepath.Join(dst, "keep")); err != nil || string(got) != "k" {
			t.Errorf("%s: a file beside the destination is %q, %v", name, got, err)
		}
	}
}

// FuzzFileUnpack feeds archives from outside: they may fail, but write nothing
// beside their destination.
func FuzzFileUnpack(f *testing.F) {
	f.Add(fileTestTar(f, fileTestDir("d", 0o755), fileTestFile("d/f", "x"), fileTestLink(tar.TypeSymlink, "l", "/x"), fileTestFile("l/y", "")))
	f.Add(fileTestTar(f, fileTestLink(tar.TypeLink, "l", "../x"), fileTestFile("../x", "")))
	f.Fuzz(func(t *testing.T, archive []byte) {
		dst := t.TempDir()
		if err := os.Mkdir(filepath.Join(dst, "to"), 0o755); err != nil {
			t.Fatal(err)
		}
		_ = fileTestAdd(t, archive, dst, "/to", nil)
		entries, err := os.ReadDir(dst)
		if err != nil || len(entries) != 1 {
			t.Errorf("%v beside the destination, %v", entries, err)
		}
	})
}
