package filetree

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"golang.org/x/sys/unix"
)

// baseTree has a link of every kind that paths can go through.
const baseTree treetest.Tree = `
etc d
etc/conf - 644 0:0 old
dir d 750 3:4
dir/f - 600 1:2 content
abs l 777 0:0 /dir
rel l 777 0:0 dir
out l 777 0:0 ../../../../../../etc
dangling l 777 0:0 /new/target
loop l 777 0:0 loop
toconf l 777 0:0 /etc/conf
null c 666
hard h dir/f
`

// changeCase is one action on baseTree and the lines that it changes:
// those that go, marked by "-", and those that come.
type changeCase struct {
	name   string
	do     func(r Root) error
	change string
	err    string // part of the error
}

func (c changeCase) run(t *testing.T) {
	t.Run(c.name, func(t *testing.T) {
		dir := baseTree.Make(t)
		before := treetest.Dump(t, dir, false)
		err := c.do(rootOf(t, dir))
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Fatalf("error %v, want %q", err, c.err)
		}
		if err != nil && strings.Contains(err.Error(), dir) {
			t.Errorf("error shows where the state is: %v", err)
		}
		var want []string
		gone := map[string]bool{}
		for line := range strings.SplitSeq(c.change, "\n") {
			line = strings.TrimSpace(line)
			if g, ok := strings.CutPrefix(line, "- "); ok {
				gone[g] = true
			} else if line != "" {
				want = append(want, line)
			}
		}
		for line := range strings.SplitSeq(before, "\n") {
			name, _, _ := strings.Cut(line, " ")
			if !gone[name] {
				want = append(want, line)
			}
		}
		treetest.Want(t, dir, strings.Join(want, "\n"))
	})
}

// compat: LLB-063
func TestMkdir(t *testing.T) {
	mkdir := func(p string, perm uint32, owner *Owner) func(Root) error {
		return func(r Root) error { return r.Mkdir(p, perm, Stamp{Owner: owner}) }
	}
	mkdirAll := func(p string, perm uint32, owner *Owner) func(Root) error {
		return func(r Root) error { return r.MkdirAll(p, perm, Stamp{Owner: owner}) }
	}
	me := &Owner{11, 12}
	for _, c := range []changeCase{
		{"plain", mkdir("/x", 0o731, nil), "x d 731 0:0", ""},
		{"only permission bits", mkdir("/x", 0o7777, nil), "x d 777 0:0", ""},
		{"owner", mkdir("x", 0o755, me), "x d 755 11:12", ""},
		{"existing", mkdir("/dir", 0o777, me), "", ""},
		{"existing file", mkdir("/etc/conf", 0o777, nil), "", ""},
		{"root", mkdir("/", 0o777, nil), "", ""},
		{"no parent", mkdir("/x/y", 0o755, nil), "", "mkdir /x/y: no such file or directory"},
		{"file as parent", mkdir("/etc/conf/y", 0o755, nil), "", "not a directory"},
		{"parents", mkdirAll("/x/y/z", 0o700, me), "x d 700 11:12\nx/y d 700 11:12\nx/y/z d 700 11:12", ""},
		{"parents, existing", mkdirAll("/dir/sub", 0o711, me), "dir/sub d 711 11:12", ""},
		{"parents, all exist", mkdirAll("/dir", 0o711, me), "", ""},
		{"parents, file at the end", mkdirAll("/etc/conf", 0o711, nil), "", "mkdir /etc/conf: not a directory"},
		{"through links", mkdir("/abs/x", 0o755, nil), "dir/x d 755 0:0", ""},
		{"link that leads out", mkdir("/out/x", 0o755, nil), "etc/x d 755 0:0", ""},
		{"dots that lead out", mkdir("../../../x", 0o755, nil), "x d 755 0:0", ""},
		{"where a dangling link leads", mkdirAll("/dangling", 0o755, nil), "new d 755 0:0\nnew/target d 755 0:0", ""},
		{"loop", mkdir("/loop/x", 0o755, nil), "", "too many links"},
	} {
		c.run(t)
	}
}

// compat: LLB-061
func TestTimes(t *testing.T) {
	dir := baseTree.Make(t)
	r := rootOf(t, dir)
	at := Stamp{Time: &unix.Timespec{Sec: treetest.Time + 9}}
	if err := errors.Join(
		r.MkdirAll("/m/n", 0o755, at),
		r.Mkfile("/file", nil, 0o644, at),
		r.Symlink("/dir", "/sym", at),
		r.Mkfile("/before", nil, 0o644, Stamp{Time: &unix.Timespec{Sec: -2}}),
		r.Mkfile("/natural", nil, 0o644, Stamp{}),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"m": "@9", "m/n": "@9", "file": "@9", "sym": "@9", "dir": "@1", "before": fmt.Sprintf("@%d", -treetest.Time-2), "natural": "@now"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if got := treetest.ShowTime(&st); name != "dir" && got != want {
			t.Errorf("time of %s is %s, want %s", name, got, want)
		}
	}
}

// compat: LLB-064
func TestMkfile(t *testing.T) {
	mkfile := func(p string, perm uint32, data string, owner *Owner) func(Root) error {
		return func(r Root) error { return r.Mkfile(p, []byte(data), perm, Stamp{Owner: owner}) }
	}
	for _, c := range []changeCase{
		{"plain", mkfile("/x", 0o666, "hello", nil), "x - 666 0:0 hello", ""},
		{"only permission bits", mkfile("/x", 0o4755, "", nil), "x - 755 0:0", ""},
		{"owner", mkfile("x", 0o600, "h", &Owner{5, 6}), "x - 600 5:6 h", ""},
		{"overwrite", mkfile("/etc/conf", 0o640, "new", nil), "- etc/conf\netc/conf - 640 0:0 new", ""},
		{"overwrite one of two names", mkfile("/hard", 0o644, "new", nil), "- hard\n- dir/f\nhard - 644 0:0 new\ndir/f - 600 1:2 content", ""},
		{"overwrite what a link leads to", mkfile("/toconf", 0o644, "new", nil), "- etc/conf\netc/conf - 644 0:0 new", ""},
		{"replace a device", mkfile("/null", 0o644, "new", nil), "- null\nnull - 644 0:0 new", ""},
		{"onto a directory", mkfile("/dir", 0o644, "", nil), "", "mkfile /dir: is a directory"},
		{"root", mkfile("/", 0o644, "", nil), "", "mkfile /: is a directory"},
		{"no parent", mkfile("/x/y", 0o644, "", nil), "", "mkfile /x/y: no such file or directory"},
		{"link that leads out", mkfile("/out/x", 0o644, "in", nil), "etc/x - 644 0:0 in", ""},
		{"dots that lead out", mkfile("/../../x", 0o644, "in", nil), "x - 644 0:0 in", ""},
		{"loop", mkfile("/loop", 0o644, "", nil), "", "too many links"},
	} {
		c.run(t)
	}
}

// compat: LLB-065
func TestSymlink(t *testing.T) {
	symlink := func(to, at string, owner *Owner) func(Root) error {
		return func(r Root) error { return r.Symlink(to, at, Stamp{Owner: owner}) }
	}
	for _, c := range []changeCase{
		{"plain", symlink("../any/../thing", "/x", nil), "x l 777 0:0 ../any/../thing", ""},
		{"owner", symlink("f", "/dir/x", &Owner{5, 6}), "dir/x l 777 5:6 f", ""},
		{"through links", symlink("f", "/abs/x", nil), "dir/x l 777 0:0 f", ""},
		{"link that leads out", symlink("/etc/shadow", "/out/x", nil), "etc/x l 777 0:0 /etc/shadow", ""},
		{"exists", symlink("f", "/dir/f", nil), "", "symlink /dir/f: file exists"},
		{"root", symlink("f", "/", nil), "", "symlink /: file exists"},
		{"no parent", symlink("f", "/x/y", nil), "", "symlink /x/y: no such file or directory"},
	} {
		c.run(t)
	}
}

// compat: LLB-066
func TestRm(t *testing.T) {
	rm := func(p string, allowNotFound, wildcard bool) func(Root) error {
		return func(r Root) error {
			if wildcard {
				return r.RemoveMatches(p, allowNotFound)
			}
			return r.Remove(p, allowNotFound)
		}
	}
	const noDir = "- dir\n- dir/f\n- hard\nhard - 600 1:2 content"
	for _, c := range []changeCase{
		{"file", rm("/etc/conf", false, false), "- etc/conf", ""},
		{"directory", rm("dir", false, false), noDir, ""},
		{"directory with slash", rm("/dir/", false, false), noDir, ""},
		{"link", rm("/abs", false, false), "- abs", ""},
		{"dangling link", rm("/dangling", false, false), "- dangling", ""},
		{"loop", rm("/loop", false, false), "- loop", ""},
		{"device", rm("/null", false, false), "- null", ""},
		{"through links", rm("/out/conf", false, false), "- etc/conf", ""},
		{"root", rm("/", false, false), "", "can't be removed"},
		{"root by dots", rm("/dir/..", true, false), "", "can't be removed"},
		{"missing", rm("/x", false, false), "", "/x: no such file or directory"},
		{"missing, allowed", rm("/x", true, false), "", ""},
		{"missing parent, allowed", rm("/x/y", true, false), "", ""},
		{"wildcard", rm("/d*", false, true), noDir + "\n- dangling", ""},
		{"wildcard below", rm("/*/conf", false, true), "- etc/conf", ""},
		{"wildcard that matches nothing", rm("/x*", false, true), "", ""},
		{"wildcards not allowed", rm("/d*", true, false), "", ""},
	} {
		c.run(t)
	}
}
