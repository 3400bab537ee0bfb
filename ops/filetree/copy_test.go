package filetree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"golang.org/x/sys/unix"
)

// doCopy runs c on the two directories.
func doCopy(t testing.TB, src, dst string, c *Copy) error {
	t.Helper()
	return c.Run(context.Background(), rootOf(t, src), rootOf(t, dst))
}

// rules is what lands where, from src to dst.
//
//	src:  f (1), dir/{f (2), sub/g (3)}, link -> dir, flink -> dir/f, empty/
//	dst:  d/old, file, dlink -> d, dangling -> nowhere/x
const (
	rulesSrc treetest.Tree = `
f - 644 0:0 1
dir d 700 5:5
dir/f - 600 1:2 2
dir/sub d 751
dir/sub/g - 644 0:0 3
link l 777 0:0 dir
flink l 777 0:0 /dir/f
empty d 711
`
	rulesDst treetest.Tree = `
d d 755 9:9
d/old - 644 0:0 o
file - 644 0:0 x
dlink l 777 0:0 /d
dangling l 777 0:0 /nowhere/x
`
	rulesKept = "d d 755 9:9\nd/old - 644 0:0 o\nfile - 644 0:0 x\ndlink l 777 0:0 /d\ndangling l 777 0:0 /nowhere/x"
)

// The same rules are compared with the peer's library on random trees; this
// table is for readers.
//
// compat: LLB-067, LLB-069, LLB-070, LLB-072, LLB-073, LLB-076
func TestCopyRules(t *testing.T) {
	contents := func(at string) string {
		return at + "/f - 600 1:2 2\n" + at + "/sub d 751 0:0\n" + at + "/sub/g - 644 0:0 3"
	}
	type opt = func(*Copy)
	var (
		follow   opt = func(a *Copy) { a.FollowLinks = true }
		inside   opt = func(a *Copy) { a.Contents = true }
		noParent opt = func(a *Copy) { a.MakeParents = false }
		wild     opt = func(a *Copy) { a.Wildcards = true }
		empty    opt = func(a *Copy) { a.AllowNone = true }
		replace  opt = func(a *Copy) { a.Replace = true }
	)
	for _, c := range []struct {
		src, dest string
		opts      []opt
		gone      string // a line of dst that is gone
		want      string // beside what dst held, or an error starting with "!"
	}{
		// A file onto a path, or into a directory.
		{"/f", "/new", nil, "", "new - 644 0:0 1"},
		{"f", "new", nil, "", "new - 644 0:0 1"},
		{"/f", "/new/", nil, "", "new d 755 0:0\nnew/f - 644 0:0 1"},
		{"/f", "/new/.", nil, "", "new d 755 0:0\nnew/f - 644 0:0 1"},
		{"/f", "/", nil, "", "f - 644 0:0 1"},
		{"/f", "/d", nil, "", "d/f - 644 0:0 1"},
		{"/f", "/dlink", nil, "", "d/f - 644 0:0 1"},
		{"/f", "/dlink/x", nil, "", "d/x - 644 0:0 1"},
		{"/f", "/file", nil, "file - 644 0:0 x", "file - 644 0:0 1"},
		{"/f", "/dangling", nil, "", "nowhere d 755 0:0\nnowhere/x - 644 0:0 1"},
		{"/f", "/a/b/c", nil, "", "a d 755 0:0\na/b d 755 0:0\na/b/c - 644 0:0 1"},
		{"/f", "/a/b/c", []opt{noParent}, "", "!parent of destination /a/b/c: lstat /a/b"},
		{"/f", "/new", []opt{noParent}, "", "new - 644 0:0 1"},
		{"/f", "/file/x", nil, "", "!not a directory"},
		{"/missing", "/x", nil, "", `!"/missing": not found`},
		// A directory onto a path, or into what is there.
		{"/dir", "/new", nil, "", "new d 700 5:5\n" + contents("new")},
		{"/dir/", "/new", nil, "", "new d 700 5:5\n" + contents("new")},
		{"/dir", "/new/", nil, "", "new d 755 0:0\nnew/dir d 700 5:5\n" + contents("new/dir")},
		{"/dir", "/d", nil, "", "d/dir d 700 5:5\n" + contents("d/dir")},
		{"/dir", "/file", nil, "", "!mkdir /file: not a directory"},
		{"/dir/.", "/d", nil, "", contents("d")},
		{"/dir/.", "/new", nil, "", "new d 700 5:5\n" + contents("new")},
		{"/empty", "/new", nil, "", "new d 711 0:0"},
		// The contents of a directory; a new destination isn't the source's copy.
		{"/dir", "/d", []opt{inside}, "", contents("d")},
		{"/dir", "/new", []opt{inside}, "", "new d 755 0:0\n" + contents("new")},
		{"/dir", "/file", []opt{inside}, "", "!cannot copy to non-directory: /file"},
		{"/dir", "/file", []opt{inside, replace}, "file - 644 0:0 x", "file d 700 5:5\n" + contents("file")},
		{"/f", "/d", []opt{inside}, "", "d/f - 644 0:0 1"},
		// Links as sources.
		{"/link", "/new", nil, "", "new l 777 0:0 dir"},
		{"/link", "/new", []opt{follow}, "", "new d 700 5:5\n" + contents("new")},
		{"/link", "/d/", []opt{follow}, "", "d/link d 700 5:5\n" + contents("d/link")},
		{"/link", "/d/", []opt{follow, inside}, "", contents("d")},
		{"/link/f", "/new", nil, "", "new - 600 1:2 2"},
		{"/flink", "/new", []opt{follow}, "", "new - 600 1:2 2"},
		{"/flink", "/new", nil, "", "new l 777 0:0 /dir/f"},
		// Wildcards; what they match goes by its own name.
		{"/d*", "/new/", []opt{wild}, "", "new d 755 0:0\nnew/dir d 700 5:5\n" + contents("new/dir")},
		{"/dir/*", "/new/", []opt{wild}, "", "new d 755 0:0\n" + contents("new")},
		{"/link/*", "/new/", []opt{wild, follow}, "", "new d 755 0:0\n" + contents("new")},
		{"/*/g", "/new/", []opt{wild}, "", "!/*/g not found"},
		{"/*/g", "/new/", []opt{wild, empty}, "", ""},
		{"/*/*/g", "/new/", []opt{wild}, "", "new d 755 0:0\nnew/g - 644 0:0 3"},
		{"/[f]", "/new", []opt{wild}, "", "new - 644 0:0 1"},
		{"/*", "/new", nil, "", `!"/*": not found`},
		// Kinds that differ.
		{"/f", "/d/old", nil, "d/old - 644 0:0 o", "d/old - 644 0:0 1"},
		{"/dir/sub", "/d/old/", nil, "", "!mkdir /d/old: not a directory"},
		{"/f", "/dangling/.", nil, "", "nowhere d 755 0:0\nnowhere/x d 755 0:0\nnowhere/x/f - 644 0:0 1"},
	} {
		name := fmt.Sprintf("%s to %s %d", c.src, c.dest, len(c.opts))
		t.Run(name, func(t *testing.T) {
			src, dst := rulesSrc.Make(t), rulesDst.Make(t)
			a := &Copy{Src: c.src, Dest: c.dest, MakeParents: true}
			for _, o := range c.opts {
				o(a)
			}
			err := doCopy(t, src, dst, a)
			if want, ok := strings.CutPrefix(c.want, "!"); ok {
				if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), dst) || strings.Contains(err.Error(), src) {
					t.Fatalf("error %v, want %q", err, want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			kept := rulesKept
			if c.gone != "" {
				kept = strings.Replace(kept, c.gone, "", 1)
			}
			treetest.Want(t, dst, kept+"\n"+c.want)
		})
	}
}

// compat: LLB-068
func TestCopyMode(t *testing.T) {
	parse := func(expr string) Chmod {
		c, err := ParseChmod(expr)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const src treetest.Tree = "dir d 750\ndir/run - 755\ndir/data - 640\ndir/sub d 2700\ndir/l l 777 0:0 x"
	for _, c := range []struct {
		name  string
		chmod Chmod
		want  string
	}{
		{"none", Chmod{}, "n d 750 0:0\nn/run - 755 0:0\nn/data - 640 0:0\nn/sub d 2700 0:0\nn/l l 777 0:0 x"},
		{"604", ChmodTo(0o604), "n d 604 0:0\nn/run - 604 0:0\nn/data - 604 0:0\nn/sub d 604 0:0\nn/l l 777 0:0 x"},
		{"7711", ChmodTo(0o7711), "n d 7711 0:0\nn/run - 7711 0:0\nn/data - 7711 0:0\nn/sub d 7711 0:0\nn/l l 777 0:0 x"},
		{"0", ChmodTo(0), "n d 0 0:0\nn/run - 0 0:0\nn/data - 0 0:0\nn/sub d 0 0:0\nn/l l 777 0:0 x"},
		{"u=rw,go+rX", parse("u=rw,go+rX"), "n d 655 0:0\nn/run - 655 0:0\nn/data - 644 0:0\nn/sub d 2655 0:0\nn/l l 777 0:0 x"},
		{"a=rX", parse("a=rX"), "n d 555 0:0\nn/run - 555 0:0\nn/data - 444 0:0\nn/sub d 555 0:0\nn/l l 777 0:0 x"},
		{"u+s,g-rwx", parse("u+s,g-rwx"), "n d 4700 0:0\nn/run - 4705 0:0\nn/data - 4600 0:0\nn/sub d 6700 0:0\nn/l l 777 0:0 x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := t.TempDir()
			a := &Copy{Src: "/dir", Dest: "/n", Chmod: c.chmod}
			if err := doCopy(t, src.Make(t), dst, a); err != nil {
				t.Fatal(err)
			}
			treetest.Want(t, dst, c.want)
		})
	}
}

// compat: LLB-061, LLB-062
func TestCopyStamp(t *testing.T) {
	dst := t.TempDir()
	a := &Copy{Src: "/dir", Dest: "/new/", MakeParents: true, Stamp: Stamp{&Owner{21, 22}, &unix.Timespec{Sec: treetest.Time + 77}}}
	if err := doCopy(t, rulesSrc.Make(t), dst, a); err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(treetest.Dump(t, dst, true), "\n") {
		if !strings.Contains(line, " 21:22") || !strings.HasSuffix(line, "@77") {
			t.Errorf("%s", line)
		}
	}
	a = &Copy{Src: "/dir", Dest: "/keep"}
	if err := doCopy(t, rulesSrc.Make(t), dst, a); err != nil {
		t.Fatal(err)
	}
	if got := treetest.Dump(t, filepath.Join(dst, "keep"), true); got != "f - 600 1:2 2 @2\nsub d 751 0:0 @3\nsub/g - 644 0:0 3 @4" {
		t.Errorf("times aren't kept:\n%s", got)
	}
}

// compat: LLB-074
func TestCopyPatterns(t *testing.T) {
	const src treetest.Tree = `
a d 700 3:3
a/b d 711 4:4
a/b/c.go - 644
a/b/d.txt - 644
a/x.go - 644
e d
e/f.txt - 644
g.go - 644
`
	for _, c := range []struct {
		include, exclude []string
		want             string
	}{
		{[]string{"**/*.go"}, nil, "a d 700 3:3\na/b d 711 4:4\na/b/c.go - 644 0:0\na/x.go - 644 0:0\ng.go - 644 0:0"},
		{[]string{"a/b/c.go"}, nil, "a d 700 3:3\na/b d 711 4:4\na/b/c.go - 644 0:0"},
		{[]string{"a"}, []string{"a/b"}, "a d 700 3:3\na/x.go - 644 0:0"},
		{[]string{"a"}, []string{"a/b", "!a/b/c.go"}, "a d 700 3:3\na/b d 711 4:4\na/b/c.go - 644 0:0\na/x.go - 644 0:0"},
		{nil, []string{"a", "**/*.txt"}, "e d 755 0:0\ng.go - 644 0:0"},
		{nil, []string{"**"}, ""},
		{[]string{"zzz"}, nil, ""},
	} {
		t.Run(fmt.Sprint(c.include, c.exclude), func(t *testing.T) {
			dst := t.TempDir()
			a := &Copy{Src: "/", Dest: "/", Contents: true, Include: c.include, Exclude: c.exclude}
			if err := doCopy(t, src.Make(t), dst, a); err != nil {
				t.Fatal(err)
			}
			treetest.Want(t, dst, c.want)
			for line := range strings.SplitSeq(treetest.Dump(t, dst, true), "\n") {
				if strings.HasSuffix(line, "@now") {
					t.Errorf("time isn't the source's: %s", line)
				}
			}
		})
	}
	a := &Copy{Src: "/", Dest: "/", Include: []string{"[a"}}
	if err := doCopy(t, src.Make(t), t.TempDir(), a); err == nil || !strings.Contains(err.Error(), "include patterns") {
		t.Errorf("bad pattern: %v", err)
	}
}

// compat: LLB-075
func TestCopyRequired(t *testing.T) {
	for _, c := range []struct {
		include, required []string
		missing           string
	}{
		{[]string{"dir"}, []string{"/dir"}, ""},
		{[]string{"dir", "f"}, []string{"/dir/sub", "/f"}, ""},
		{[]string{"dir"}, []string{"/dir", "/f"}, "/f"},
		{[]string{"zzz"}, []string{"/dir"}, "/dir"},
		{nil, []string{"/zzz"}, ""},
	} {
		a := &Copy{Src: "/", Dest: "/", Include: c.include, Required: c.required}
		err := doCopy(t, rulesSrc.Make(t), t.TempDir(), a)
		if c.missing == "" && err != nil {
			t.Errorf("%v: %v", c, err)
		}
		if c.missing != "" && (err == nil || err.Error() != fmt.Sprintf("%q: not found", c.missing) || !errors.Is(err, fs.ErrNotExist)) {
			t.Errorf("%v: error %v", c, err)
		}
	}
}

// compat: LLB-077
func TestCopyKeeps(t *testing.T) {
	src := treetest.Tree("d d\nd/one - 644 0:0 same\nd/two h d/one\nd/sub d\nd/sub/three h d/one\nd/s s 755\nd/b b 600\nd/x - 644 0:0 x\nd/l l 777 0:0 x").Make(t)
	const size = 40 << 20
	hole := filepath.Join(src, "d/hole")
	f, err := os.Create(hole)
	if err != nil {
		t.Fatal(err)
	}
	_, werr := f.WriteAt(bytes.Repeat([]byte("end"), 50_000), 20<<20)
	if err := errors.Join(werr, f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	set := func(name, key, value string) {
		if err := unix.Lsetxattr(filepath.Join(src, name), key, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	set("d", "user.dir", "1")
	set("d/x", "user.x", "2")
	set("d/x", "trusted.x", "3")
	set("d/x", "trusted.overlay.opaque", "y")
	set("d/l", "trusted.l", "4")
	set("d/s", "trusted.s", "5")

	dst := t.TempDir()
	a := &Copy{Src: "/d", Dest: "/n"}
	if err := doCopy(t, src, dst, a); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dst, "n/hole"), &st); err != nil || st.Size != size || st.Blocks*512 > 10<<20 {
		t.Errorf("hole: %v, %d bytes in %d blocks", err, st.Size, st.Blocks)
	}
	want, _ := os.ReadFile(hole)
	if got, err := os.ReadFile(filepath.Join(dst, "n/hole")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the sparse file differs: %v", err)
	}
	if err := errors.Join(os.Remove(hole), os.Remove(filepath.Join(dst, "n/hole"))); err != nil {
		t.Fatal(err)
	}
	treetest.Want(t, dst, `
		n d 755 0:0
		n/b b 600 0:0 1:3
		n/l l 777 0:0 x
		n/one - 644 0:0 same
		n/s - 755 0:0
		n/sub d 755 0:0
		n/sub/three h n/one
		n/two h n/one
		n/x - 644 0:0 x`)
	for name, attrs := range map[string]map[string]string{
		"n": {"user.dir": "1"}, "n/x": {"user.x": "2", "trusted.x": "3", "trusted.overlay.opaque": ""}, "n/l": {"trusted.l": "4"}, "n/s": {"trusted.s": "5"},
	} {
		for key, want := range attrs {
			var b [16]byte
			n, err := unix.Lgetxattr(filepath.Join(dst, name), key, b[:])
			if want == "" && err != unix.ENODATA || want != "" && (err != nil || string(b[:n]) != want) {
				t.Errorf("%s of %s: %q, %v", key, name, b[:max(n, 0)], err)
			}
		}
	}
}

// Whatever links a hostile image holds, nothing outside its root changes.
func TestCopyStaysInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 30)
	hostile := treetest.Tree("abs l 777 0:0 " + outside + "\nup l 777 0:0 " + up + outside[1:] +
		"\nproc l 777 0:0 /proc/self/root\nmagic l 777 0:0 /proc/self/cwd\nfile l 777 0:0 " + outside + "/secret\ndev b 600")
	src := treetest.Tree("evil d\nevil/abs - 644 0:0 own\nevil/up - 644 0:0 own\nplain - 644 0:0 own\nlink l 777 0:0 " + outside + "/secret").Make(t)
	before := treetest.Dump(t, outside, true)
	owned := Stamp{&Owner{1, 1}, &unix.Timespec{Nsec: 1}}
	for _, dest := range []string{"/abs", "/abs/", "/abs/x", "/up/x", "/up/secret", "/proc" + outside + "/x", "/magic/x", "/file", "/file/", "/" + up + outside, "/dev"} {
		for _, from := range []string{"/plain", "/evil", "/evil/.", "/link"} {
			for _, follow := range []bool{false, true} {
				dst := hostile.Make(t)
				a := &Copy{Src: from, Dest: dest, MakeParents: true, FollowLinks: follow, Stamp: owned, Chmod: ChmodTo(0o777)}
				err := doCopy(t, src, dst, a)
				if from == "/link" && follow && err == nil {
					t.Errorf("copying a link to %s's outside worked", src)
				}
				r := rootOf(t, dst)
				_ = r.Mkfile(dest, []byte("own"), 0, owned)
				_ = r.MkdirAll(dest, 0o777, owned)
				_ = r.Remove(dest+"/secret", false)
				_ = r.RemoveMatches(dest+"/*", false)
			}
		}
	}
	if after := treetest.Dump(t, outside, true); after != before {
		t.Errorf("outside was\n%s\nand is\n%s", before, after)
	}
}

func TestCopyCancelled(t *testing.T) {
	src := treetest.Tree("d d\nd/a - 644 0:0 a\nd/b d\nd/b/c - 644 0:0 c").Make(t)
	stop := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	from, to := rootOf(t, src), rootOf(t, t.TempDir())
	open := openFDs(t)
	if err := (&Copy{Src: "/d", Dest: "/n"}).Run(ctx, from, to); !errors.Is(err, stop) {
		t.Errorf("error %v", err)
	}
	if now := openFDs(t); now > open { // a collected file of an earlier test may be closed meanwhile
		t.Errorf("%d open files, %d before", now, open)
	}
}

// A copy that fails in the midst of many files closes what it opened.
func TestCopyFailureLeaksNothing(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	for i := range 40 {
		dir := filepath.Join(src, fmt.Sprintf("d%02d/sub", i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for j := range 40 {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(dst, "d33/sub/17/in the way"), 0o755); err != nil {
		t.Fatal(err)
	}
	from, to := rootOf(t, src), rootOf(t, dst)
	open := openFDs(t)
	if err := (&Copy{Src: "/.", Dest: "/"}).Run(t.Context(), from, to); err == nil || err.Error() != "copy /d33/sub/17: cannot replace directory /d33/sub/17 with file" {
		t.Errorf("error %v", err)
	}
	if now := openFDs(t); now > open { // a collected file of an earlier test may be closed meanwhile
		t.Errorf("%d open files, %d before", now, open)
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func BenchmarkCopy20k(b *testing.B) {
	src := b.TempDir()
	data := bytes.Repeat([]byte("x"), 10<<10)
	for i := range 20_000 {
		dir := filepath.Join(src, fmt.Sprintf("%03d", i/50))
		if i%50 == 0 {
			if err := os.Mkdir(dir, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), data, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	a := &Copy{Src: "/", Dest: "/", Contents: true}
	run := func(name string, copy func(dst string) error) {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				b.StopTimer()
				dst := b.TempDir()
				b.StartTimer()
				if err := copy(dst); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("ours", func(dst string) error { return doCopy(b, src, dst, a) })
	run("fsutil", func(dst string) error { return oracleCopy{Copy: a}.asPeer(src, dst) })
}
