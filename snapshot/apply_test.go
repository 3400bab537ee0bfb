package snapshot_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// layerTar makes a tar of headers; a header's Name may be followed by "=content".
func layerTar(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		name, content, _ := strings.Cut(h.Name, "=")
		h.Name, h.Size = name, int64(len(content))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, content)
		must(t, err)
	}
	must(t, w.Close())
	return buf.Bytes()
}

func file(name string) tar.Header { return tar.Header{Name: name} }
func dir(name string) tar.Header  { return tar.Header{Name: name, Typeflag: tar.TypeDir} }
func symlink(name, to string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}
}
func hardlink(name, to string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}
}

// shown lists what is visible in a snapshot, by name and, for files, content.
func shown(t testing.TB, s snapshot.Snapshotter, id string) string {
	t.Helper()
	var out []string
	inSnapshot(t, s, id, func(dir string) {
		must(t, filepath.Walk(dir+"/", func(path string, info os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			name := strings.TrimPrefix(path, dir+"/")
			switch {
			case name == "":
				return nil
			case info.IsDir():
				name += "/"
			case info.Mode()&os.ModeSymlink != 0:
				to, err := os.Readlink(path)
				must(t, err)
				name += "->" + to
			case info.Mode().IsRegular():
				data, err := os.ReadFile(path)
				must(t, err)
				name += "=" + string(data)
			}
			out = append(out, name)
			return nil
		}))
	})
	return strings.Join(out, " ")
}

// outside makes a directory that nothing may touch, and checks that at the end.
func outside(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, dir+"/secret", "secret")
	writeFile(t, dir+"/d/deep", "deep")
	before := tree(t, dir, true)
	t.Cleanup(func() {
		if !t.Failed() {
			sameTree(t, "outside of the snapshot", tree(t, dir, true), before)
		}
	})
	return dir
}

func TestApply(t *testing.T) {
	out := outside(t)
	up := "../../../../../../../../../../../../../.."
	for _, c := range []struct {
		name   string
		parent []tar.Header
		layer  []tar.Header
		want   string
		err    string // if it must fail
	}{
		{name: "plain", layer: []tar.Header{file("a=1"), dir("d/"), file("d/b=2"), file("./e/f=3")}, want: "a=1 d/ d/b=2 e/ e/f=3"},
		{name: "the root itself", layer: []tar.Header{dir("./"), dir("/"), dir("x/.."), file("a=1")}, want: "a=1"},
		{name: "whiteout", parent: []tar.Header{file("a=1"), file("d/b=2"), file("d/c=3")}, layer: []tar.Header{file(".wh.a"), file("d/.wh.b")}, want: "d/ d/c=3"},
		{name: "whiteout of a directory", parent: []tar.Header{file("d/b=2"), file("d/e/c=3")}, layer: []tar.Header{file(".wh.d")}, want: ""},
		{name: "whiteout of nothing", parent: []tar.Header{file("a=1")}, layer: []tar.Header{file(".wh.x"), file("d/.wh.y"), file("d/z=1")}, want: "a=1 d/ d/z=1"},
		{name: "whiteout without a parent", layer: []tar.Header{file(".wh.x"), file("d/.wh.y"), file("d/.wh..wh..opq"), file("a=1")}, want: "a=1 d/"},
		{name: "deleted, then made", parent: []tar.Header{file("d/b=2"), file("f=1")}, layer: []tar.Header{file(".wh.d"), dir("d/"), file("d/n=1"), file(".wh.f"), file("f=2")}, want: "d/ d/n=1 f=2"},
		{name: "deleted, then made below", parent: []tar.Header{file("d/b=2")}, layer: []tar.Header{file(".wh.d"), file("d/n=1")}, want: "d/ d/n=1"},
		{name: "made, then deleted", parent: []tar.Header{file("d/b=2"), file("f=1")}, layer: []tar.Header{dir("d/"), file("d/n=1"), file(".wh.d"), file("f=2"), file(".wh.f")}, want: "d/ d/n=1 f=2"},
		{name: "opaque first", parent: []tar.Header{file("d/b=2"), file("d/e/c=3")}, layer: []tar.Header{dir("d/"), file("d/.wh..wh..opq"), file("d/e/n=1")}, want: "d/ d/e/ d/e/n=1"},
		{name: "opaque last", parent: []tar.Header{file("d/b=2"), file("d/e/c=3")}, layer: []tar.Header{file("d/e/n=1"), file("d/.wh..wh..opq")}, want: "d/ d/e/ d/e/n=1"},
		{name: "opaque root", parent: []tar.Header{file("d/b=2"), file("e/c=3"), file("f=1"), file("g=1")}, layer: []tar.Header{file("f=2"), file("d/n=1"), file(".wh..wh..opq"), file("e/m=1")}, want: "d/ d/n=1 e/ e/m=1 f=2"},
		{name: "names of aufs", parent: []tar.Header{file("a=1")}, layer: []tar.Header{file(".wh..wh.plnk"), file(".wh..wh.aufs"), file(".wh..wh.orph/x"), file("b=1")}, want: ".wh..wh.orph/ .wh..wh.orph/x= a=1 b=1"},
		{name: "whiteout without a name", layer: []tar.Header{file(".wh.")}, err: "names no file"},
		{name: "whiteout of the directory", layer: []tar.Header{file("d/.wh..")}, err: "names no file"},
		{name: "whiteout of the directory above", layer: []tar.Header{file("d/.wh...")}, err: "names no file"},
		{name: "a file in the place of a directory", parent: []tar.Header{file("d/b=2")}, layer: []tar.Header{file("d=1")}, want: "d=1"},
		{name: "a directory in the place of a file", parent: []tar.Header{file("d=1")}, layer: []tar.Header{dir("d/"), file("d/b=2")}, want: "d/ d/b=2"},
		{name: "a directory for a file, and back", parent: []tar.Header{file("d/b=2")}, layer: []tar.Header{dir("d/"), file("d/c=1"), file("d=1"), dir("d/"), file("d/e=1")}, want: "d/ d/e=1"},
		{name: "the same name twice", layer: []tar.Header{file("a=1"), file("a=2"), symlink("a", "x"), file("a=3"), symlink("l", "1"), symlink("l", "2")}, want: "a=3 l->2"},
		{name: "a directory in the place of a link", parent: []tar.Header{file("usr/lib/a=1"), symlink("lib", "usr/lib")}, layer: []tar.Header{dir("lib/"), file("lib/b=1")}, want: "lib/ lib/b=1 usr/ usr/lib/ usr/lib/a=1"},
		{name: "through a link of the parent", parent: []tar.Header{file("usr/lib/a=1"), symlink("lib", "usr/lib")}, layer: []tar.Header{file("lib/b=1"), file("lib/.wh.a")}, want: "lib->usr/lib usr/ usr/lib/ usr/lib/b=1"},
		{name: "through an absolute link", parent: []tar.Header{dir("run/"), symlink("var/run", "/run")}, layer: []tar.Header{file("var/run/x=1")}, want: "run/ run/x=1 var/ var/run->/run"},
		{name: "through links of links", parent: []tar.Header{dir("a/b/c/"), symlink("a/l", "../m"), symlink("m", "./a/b/../../n/"), symlink("n", "/a//b/c")}, layer: []tar.Header{file("a/l/x=1")}, want: "a/ a/b/ a/b/c/ a/b/c/x=1 a/l->../m m->./a/b/../../n/ n->/a//b/c"},
		{name: "through a link to nothing", parent: []tar.Header{symlink("l", "/new/place")}, layer: []tar.Header{file("l/x=1")}, want: "l->/new/place new/ new/place/ new/place/x=1"},
		{name: "through links in a circle", layer: []tar.Header{symlink("a", "b"), symlink("b", "a"), file("a/x=1")}, err: "too many levels of symbolic links"},
		{name: "through a file", parent: []tar.Header{file("f=1")}, layer: []tar.Header{file("f/x=1")}, err: "not a directory"},
		{name: "through a file of its own", layer: []tar.Header{file("f=1"), file("f/x=1")}, err: "not a directory"},
		{name: "names that go up", layer: []tar.Header{file(up + out + "/secret=x"), file("/a=1"), file("d/../../b=1")}, want: "a=1 b=1 " + made(out+"/secret=x")},
		{name: "an absolute link out", layer: []tar.Header{symlink("l", out), file("l/secret=x"), file("l/d/deep=y")}, want: "l->" + out + " " + made(out+"/d/deep=y", out+"/secret=x")},
		{name: "a relative link out", layer: []tar.Header{symlink("l", up+out), file("l/secret=x")}, want: "l->" + up + out + " " + made(out+"/secret=x")},
		{name: "a parent's link out", parent: []tar.Header{symlink("l", out)}, layer: []tar.Header{file("l/secret=x"), file("l/.wh.d")}, want: "l->" + out + " " + made(out+"/secret=x")},
		{name: "writing through a link", layer: []tar.Header{symlink("l", out+"/secret"), file("l=x")}, want: "l=x"},
		{name: "a directory through a link", layer: []tar.Header{symlink("l", out), dir("l/")}, want: "l/"},
		{name: "a hard link out", layer: []tar.Header{hardlink("l", up+out+"/secret")}, err: "no such file"},
		{name: "a hard link out, absolute", layer: []tar.Header{hardlink("l", out+"/secret")}, err: "no such file"},
		{name: "a hard link through a link out", layer: []tar.Header{symlink("s", out), hardlink("l", "s/secret")}, err: "no such file"},
		{name: "a hard link to a link out", layer: []tar.Header{symlink("s", out+"/secret"), hardlink("l", "s"), file("l=x")}, want: "l=x s->" + out + "/secret"},
		{name: "whiteout through a link out", layer: []tar.Header{symlink("l", out), file("l/.wh.secret"), file("l/.wh..wh..opq")}, want: "l->" + out + " " + made(out+"/")},
		{name: "hard links", layer: []tar.Header{file("a=1"), hardlink("d/b", "a"), hardlink("c", "/d/b")}, want: "a=1 c=1 d/ d/b=1"},
		{name: "a hard link to the parent's", parent: []tar.Header{file("usr/lib/a=1"), symlink("lib", "usr/lib")}, layer: []tar.Header{hardlink("b", "lib/a")}, want: "b=1 lib->usr/lib usr/ usr/lib/ usr/lib/a=1"},
		{name: "a hard link to what was deleted", parent: []tar.Header{file("a=1"), file("d/a=1")}, layer: []tar.Header{file(".wh.a"), hardlink("b", "a")}, err: "no such file"},
		{name: "a hard link into what was deleted", parent: []tar.Header{file("a=1"), file("d/a=1")}, layer: []tar.Header{file(".wh.d"), hardlink("b", "d/a")}, err: "no such file"},
		{name: "a hard link to a directory", layer: []tar.Header{dir("d/"), hardlink("b", "d")}, err: "is a directory"},
		{name: "a hard link to a parent's directory", parent: []tar.Header{dir("d/")}, layer: []tar.Header{hardlink("b", "d")}, err: "is a directory"},
		{name: "a hard link to itself", layer: []tar.Header{file("a=1"), hardlink("a", "./a")}, err: "to itself"},
		{name: "a hard link to the root", layer: []tar.Header{hardlink("a", "/")}, err: "root directory"},
		{name: "a hard link in the place of its directory", layer: []tar.Header{file("d/e/a=1"), hardlink("d", "d/e/a")}, err: "no such file"},
		{name: "an overlay's whiteout", layer: []tar.Header{{Name: "c", Typeflag: tar.TypeChar}}, err: "marks a deletion"},
		{name: "a device out of range", layer: []tar.Header{{Name: "c", Typeflag: tar.TypeBlock, Devmajor: 5000}}, err: "out of range"},
		{name: "an owner out of range", layer: []tar.Header{{Name: "c", Uid: 1 << 32}}, err: "out of range"},
		{name: "a link to nowhere", layer: []tar.Header{symlink("l", strings.Repeat("x", 5000))}, err: "name too long"},
		{name: "a long name", layer: []tar.Header{file(strings.Repeat("x", 300) + "/a=1")}, err: "name too long"},
		{name: "a long path", layer: []tar.Header{file(strings.Repeat("xxxx/", 1000) + "a=1")}, err: "name too long"},
		{name: "global headers", layer: []tar.Header{{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, file("a=1")}, want: "a=1"},
	} {
		t.Run(strings.ReplaceAll(c.name, ",", ""), func(t *testing.T) {
			o := newOverlay(t)
			parent := ""
			if c.parent != nil {
				parent = "base"
				must(t, o.Prepare(t.Context(), parent, ""))
				must(t, snapshot.Apply(t.Context(), o, parent, bytes.NewReader(layerTar(t, c.parent...))))
				must(t, o.Commit(t.Context(), parent))
			}
			must(t, o.Prepare(t.Context(), "top", parent))
			err := snapshot.Apply(t.Context(), o, "top", bytes.NewReader(layerTar(t, c.layer...)))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("error %v, want %q", err, c.err)
				}
				return
			}
			must(t, err)
			want := strings.Fields(c.want)
			if got := shown(t, o, "top"); got != strings.Join(want, " ") {
				t.Errorf("shows %q, want %q", got, strings.Join(want, " "))
			}
		})
	}
}

// made lists the files and all directories that they need, in order.
func made(names ...string) string {
	var out []string
	seen := map[string]bool{}
	for _, name := range names {
		steps := strings.SplitAfter(strings.TrimPrefix(name, "/"), "/")
		for i := range steps {
			if p := strings.Join(steps[:i+1], ""); p != "" && !seen[p] {
				seen[p] = true
				out = append(out, p)
			}
		}
	}
	return strings.Join(out, " ")
}

func TestApplyMetadata(t *testing.T) {
	o := newOverlay(t)
	when := time.Unix(1234567890, 987654321)
	caps := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	x := func(pairs ...string) map[string]string {
		out := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			out["SCHILY.xattr."+pairs[i]] = pairs[i+1]
		}
		return out
	}
	h := func(name string, typ byte, mode int64, xattrs ...string) tar.Header {
		return tar.Header{Name: name, Typeflag: typ, Mode: mode, Uid: 3000000, Gid: 7, ModTime: when, Format: tar.FormatPAX, PAXRecords: x(xattrs...)}
	}
	link := h("l", tar.TypeSymlink, 0o777, "user.ignored", "1")
	link.Linkname = "nowhere"
	dev := h("c", tar.TypeChar, 0o4666)
	dev.Devmajor, dev.Devminor = 1, 3
	blk := h("b", tar.TypeBlock, 0o660)
	blk.Devmajor, blk.Devminor = 259, 70000
	must(t, o.Prepare(t.Context(), "a", ""))
	must(t, snapshot.Apply(t.Context(), o, "a", bytes.NewReader(layerTar(t,
		h("d/", tar.TypeDir, 0o2751, "user.k", "v\x00w"), h("d/e/", tar.TypeDir, 0o1777),
		h("d/e/suid=content", tar.TypeReg, 0o6755, "security.capability", caps, "trusted.x", "ignored"),
		link, dev, blk, h("p", tar.TypeFifo, 0o600), h("implied/x=1", tar.TypeReg, 0)))))
	want := []string{
		"/ 40755 0:0",
		"/b 60660 3000000:7 259:70000 @1234567890",
		"/c 24666 3000000:7 1:3 @1234567890",
		`/d 42751 3000000:7 @1234567890 user.k="v\x00w"`,
		"/d/e 41777 3000000:7 @1234567890",
		"/d/e/suid 106755 3000000:7 7 ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73 @1234567890 security.capability=" + fmt.Sprintf("%q", caps),
		"/implied 40755 0:0 @1234567890",
		"/implied/x 100644 3000000:7 1 6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b @1234567890",
		"/l 120777 3000000:7 -> nowhere @1234567890",
		"/p 10600 3000000:7 @1234567890",
	}
	sameTree(t, "unpacked", tree(t, layerDir(o, "a"), true), want)
	var st unix.Stat_t
	for _, f := range []string{"/d/e/suid", "/d", "/l", "/c"} {
		must(t, unix.Lstat(layerDir(o, "a")+f, &st))
		if st.Mtim.Nsec != 987654321 {
			t.Errorf("%s has the time %v", f, st.Mtim)
		}
	}

	// A file below directories that the tar doesn't have leaves them as they
	// are; a hard link's entry gives its file metadata.
	must(t, o.Commit(t.Context(), "a"))
	must(t, o.Prepare(t.Context(), "b", "a"))
	when = time.Unix(5, 0)
	hl := h("d/hl", tar.TypeLink, 0o600)
	hl.Linkname = "d/e/suid"
	must(t, snapshot.Apply(t.Context(), o, "b", bytes.NewReader(layerTar(t, h("d/e/new=1", tar.TypeReg, 0o600), hl))))
	sameTree(t, "the second layer itself", tree(t, layerDir(o, "b"), true), []string{
		"/ 40755 0:0",
		`/d 42751 3000000:7 @1234567890 user.k="v\x00w"`,
		"/d/e 41777 3000000:7 @1234567890",
		"/d/e/new 100600 3000000:7 1 6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b @5",
		"/d/e/suid 100600 3000000:7 7 ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73 @5",
		"/d/hl 100600 3000000:7 7 ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73 = /d/e/suid @5",
	})
}

// A layer can't tell overlay what to show: neither what is elsewhere in its
// parent, nor that something is hidden or deleted that it doesn't name.
func TestApplySteersNoOverlay(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "base", "", func(dir string) {
		writeFile(t, dir+"/secret/key", "1")
		writeFile(t, dir+"/d/kept", "1")
		writeFile(t, dir+"/f", "1")
	})
	marked := func(name string, typ byte) tar.Header {
		records := map[string]string{}
		for _, prefix := range []string{"trusted.overlay.", "user.overlay."} {
			for k, v := range map[string]string{"opaque": "y", "redirect": "/secret", "metacopy": "", "whiteout": "", "origin": "x", "protattr": "i", "overlay.opaque": "y"} {
				records["SCHILY.xattr."+prefix+k] = v
			}
		}
		return tar.Header{Name: name, Typeflag: typ, Format: tar.FormatPAX, PAXRecords: records}
	}
	layer := layerTar(t, marked("d/", tar.TypeDir), marked("d/empty", tar.TypeReg), marked("new/", tar.TypeDir), marked("f=2", tar.TypeReg))
	for id, parent := range map[string]string{"home": "base", "abroad": ""} {
		must(t, o.Prepare(t.Context(), id, parent))
		must(t, snapshot.Apply(t.Context(), o, id, bytes.NewReader(layer)))
		must(t, o.Commit(t.Context(), id))
		for _, f := range []string{"", "/d", "/d/empty", "/new", "/f"} {
			buf := make([]byte, 4096)
			n, err := unix.Llistxattr(layerDir(o, id)+f, buf)
			must(t, err)
			if bytes.Contains(buf[:n], []byte("overlay")) {
				t.Errorf("%s of the layer has the xattrs %q", f, buf[:n])
			}
		}
	}
	stack(t, o, "st", "base", "abroad")
	const want = "d/ d/empty= d/kept=1 f=2 new/ secret/ secret/key=1"
	for _, id := range []string{"home", "st"} {
		if got := shown(t, o, id); got != want {
			t.Errorf("%s shows %q, want %q", id, got, want)
		}
	}
}

// What a step that may do everything leaves in a layer is refused, not followed.
func TestOverlayFollowsNoRedirects(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "base", "", func(dir string) { writeFile(t, dir+"/secret/key", "1") })
	makeLayer(t, o, "layer", "", func(dir string) {
		must(t, unix.Setxattr(mkdir(t, dir+"/d"), "trusted.overlay.redirect", []byte("/secret"), 0))
	})
	stack(t, o, "st", "base", "layer")
	inSnapshot(t, o, "st", func(dir string) {
		if data, err := os.ReadFile(dir + "/d/key"); err == nil {
			t.Errorf("it leads to the parent's %q", data)
		}
	})
}

// Hard links to all kinds of files that only the parent has.
func TestApplyCopiesUp(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "a", "", func(dir string) {
		writeFile(t, dir+"/d/f", strings.Repeat("content", 1<<20))
		must(t, os.Chmod(dir+"/d/f", 0o755|os.ModeSetuid))
		must(t, unix.Setxattr(dir+"/d/f", "user.k", []byte("v"), 0))
		must(t, os.Symlink("f", dir+"/d/l"))
		must(t, unix.Mknod(dir+"/d/c", unix.S_IFCHR|0o620, int(unix.Mkdev(1, 3))))
		must(t, os.Lchown(dir+"/d/l", 5, 6))
	})
	layer := layerTar(t,
		tar.Header{Name: "z/f", Typeflag: tar.TypeLink, Linkname: "d/f", Mode: 0o4755},
		tar.Header{Name: "z/l", Typeflag: tar.TypeLink, Linkname: "d/l", Mode: 0o777, Uid: 5, Gid: 6},
		tar.Header{Name: "z/c", Typeflag: tar.TypeLink, Linkname: "d/c", Mode: 0o600})
	var want []string
	for _, line := range treeOf(t, o, "a") {
		want = append(want, line)
		if name, rest, _ := strings.Cut(line, " "); name != "/" && name != "/d" {
			link := " = " + name
			if i := strings.Index(rest, " user."); i >= 0 {
				link, rest = link+rest[i:], rest[:i]
			}
			want = append(want, "/z/"+filepath.Base(name)+" "+rest+link)
		}
	}
	must(t, o.Prepare(t.Context(), "b", "a"))
	must(t, snapshot.Apply(t.Context(), o, "b", bytes.NewReader(layer)))
	want = append(want, "/z 40755 0:0")
	slices.Sort(want)
	if len(want) != 9 {
		t.Fatalf("the base has %q", want)
	}
	sameTree(t, "copied up", treeOf(t, o, "b"), want)
}

// A second layer unpacked into the same snapshot deletes from the first.
func TestApplyOntoFiles(t *testing.T) {
	for _, parent := range []string{"", "base"} {
		o := newOverlay(t)
		makeLayer(t, o, "base", "", func(dir string) {
			for _, f := range []string{"x", "d/x", "e/x", "g/x"} {
				writeFile(t, dir+"/"+f, "0")
			}
		})
		must(t, o.Prepare(t.Context(), "a", parent))
		apply := func(headers ...tar.Header) {
			t.Helper()
			must(t, snapshot.Apply(t.Context(), o, "a", bytes.NewReader(layerTar(t, headers...))))
		}
		apply(file("x=1"), file("d/y=1"), file("e/y=1"), file("e/s/z=1"), file("g/y=1"), file("g/s/y=1"), file("g/s/z=1"))
		apply(file(".wh.x"), file(".wh.d"), file("e/n=2"), file("e/.wh..wh..opq"), file("g/s/n=2"), file("g/.wh..wh..opq"), file("g/s/.wh.y"))
		// What is in a directory that the second layer wrote into stays.
		want := "e/ e/n=2 g/ g/s/ g/s/n=2 g/s/z=1"
		if got := shown(t, o, "a"); got != want {
			t.Errorf("on %q: shows %q, want %q", parent, got, want)
		}
	}
}

func TestApplyErrors(t *testing.T) {
	o := newOverlay(t)
	ctx := t.Context()
	makeLayer(t, o, "a", "", func(string) {})
	must(t, o.Prepare(ctx, "b", "a"))
	good := layerTar(t, file("x="+strings.Repeat("x", 1<<20)), file("y=1"))
	if err := snapshot.Apply(ctx, o, "none", bytes.NewReader(good)); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("no snapshot: %v", err)
	}
	if err := snapshot.Apply(ctx, o, "a", bytes.NewReader(good)); !errors.Is(err, snapshot.ErrNotActive) {
		t.Errorf("a committed one: %v", err)
	}
	for _, n := range []int{100, 513, 700, 1 << 19} {
		if err := snapshot.Apply(ctx, o, "b", bytes.NewReader(good[:n])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: %v", n, err)
		}
	}
	cause := errors.New("gone")
	if err := snapshot.Apply(ctx, o, "b", io.MultiReader(bytes.NewReader(good[:1<<19]), errorReader{cause})); !errors.Is(err, cause) {
		t.Errorf("a reader that fails: %v", err)
	}
	if err := snapshot.Apply(ctx, o, "b", io.MultiReader(bytes.NewReader(good), errorReader{cause})); !errors.Is(err, cause) {
		t.Errorf("a reader that fails after the tar: %v", err)
	}
	cancelled, cancel := context.WithCancelCause(ctx)
	cancel(cause)
	if err := snapshot.Apply(cancelled, o, "b", bytes.NewReader(good)); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
	// A sparse file costs its tar nothing, whatever its size.
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	must(t, w.WriteHeader(&tar.Header{Name: "huge", Typeflag: tar.TypeReg, Size: 1 << 60, Format: tar.FormatGNU}))
	if err := snapshot.Apply(ctx, o, "b", &buf); err == nil || !strings.Contains(err.Error(), "more than the file system") {
		t.Errorf("a huge file: %v", err)
	}
	tail := &countReader{r: io.MultiReader(bytes.NewReader(good), strings.NewReader(strings.Repeat("\x00", 10000)))}
	must(t, snapshot.Apply(ctx, o, "b", tail))
	if tail.n != len(good)+10000 {
		t.Errorf("%d bytes were read of %d", tail.n, len(good)+10000)
	}
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }

type countReader struct {
	r io.Reader
	n int
}

func (r *countReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.n += n
	return n, err
}

// Many directories at once, more than are kept open.
func TestApplyManyDirectories(t *testing.T) {
	o := newOverlay(t)
	var headers []tar.Header
	for i := range 1000 {
		headers = append(headers, file(fmt.Sprintf("a%d/b/c/f=%d", i%500, i)))
	}
	headers = append(headers, dir(strings.Repeat("deep/", 200)))
	must(t, o.Prepare(t.Context(), "a", ""))
	must(t, snapshot.Apply(t.Context(), o, "a", bytes.NewReader(layerTar(t, headers...))))
	for _, fd := range names(t, "/proc/self/fd") {
		if file, err := os.Readlink("/proc/self/fd/" + fd); err == nil && strings.HasPrefix(file, layerDir(o, "a")) {
			t.Errorf("%s is still open", file)
		}
	}
	if got := names(t, layerDir(o, "a")); len(got) != 501 {
		t.Errorf("%d directories", len(got))
	}
	if data, _ := os.ReadFile(layerDir(o, "a") + "/a7/b/c/f"); string(data) != "507" {
		t.Errorf("a file holds %q", data)
	}
}

// FuzzApply unpacks what is or isn't a tar onto a parent full of traps.
func FuzzApply(f *testing.F) {
	out := f.TempDir()
	writeFile(f, out+"/secret", "secret")
	writeFile(f, out+"/d/deep", "deep")
	before := tree(f, out, true)
	f.Add(layerTar(f, file("a=1"), dir("d/"), file("d/.wh.x"), file("out/secret=x"), hardlink("h", "out/secret")))
	f.Add(layerTar(f, symlink("l", out), file("l/secret=x"), file("up/up/secret=y"), file(".wh..wh..opq")))
	f.Add(layerTar(f, tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, hardlink("d/f2", "/d/f"), dir("out/")))
	f.Add(layerTar(f, tar.Header{Name: strings.Repeat("x/", 90), Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}))
	o := newOverlay(f)
	makeLayer(f, o, "base", "", func(dir string) {
		writeFile(f, dir+"/d/f", "1")
		must(f, os.Symlink(out, dir+"/out"))
		must(f, os.Symlink("../../../../../../../.."+out, dir+"/up"))
		must(f, os.Symlink(".", dir+"/self"))
	})
	n := 0
	f.Fuzz(func(t *testing.T, data []byte) {
		n++
		id := fmt.Sprint("f", n)
		must(t, o.Prepare(t.Context(), id, "base"))
		err := snapshot.Apply(t.Context(), o, id, bytes.NewReader(data))
		if err == nil {
			// What was unpacked can be shown and written again.
			inSnapshot(t, o, id, func(dir string) { tree(t, dir, false) })
			must(t, snapshot.WriteDiff(t.Context(), o, id, io.Discard))
		}
		sameTree(t, "outside of the snapshot", tree(t, out, true), before)
		must(t, os.RemoveAll(filepath.Dir(layerDir(o, id))))
	})
}

func BenchmarkApply(b *testing.B) {
	o := newOverlay(b)
	makeLayer(b, o, "base", "", func(dir string) {})
	makeLayer(b, o, "a", "base", func(dir string) { manyFiles(b, dir) })
	layer := diffOf(b, o, "a")
	b.SetBytes(int64(len(layer)))
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprint("x", i)
		must(b, o.Prepare(b.Context(), id, "base"))
		must(b, snapshot.Apply(b.Context(), o, id, bytes.NewReader(layer)))
	}
}
