package ops

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// fileTestBase has a link of every kind that paths can go through.
const fileTestBase fileTestTree = `
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

// fileTestAction is one action on fileTestBase and the lines that it changes:
// those that go, marked by "-", and those that come.
type fileTestAction struct {
	name   string
	do     func(r fileRoot) error
	change string
	err    string // part of the error
}

func (c fileTestAction) run(t *testing.T) {
	t.Run(c.name, func(t *testing.T) {
		dir := fileTestBase.make(t)
		before := fileTestDump(t, dir, false)
		err := c.do(fileTestRoot(t, dir))
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
		fileTestWant(t, dir, strings.Join(want, "\n"))
	})
}

// compat: LLB-063
func TestFileMkdir(t *testing.T) {
	mkdir := func(a *pb.FileActionMkDir, owner *fileIDs) func(fileRoot) error {
		return func(r fileRoot) error { return r.mkdirAction(a, owner) }
	}
	me := &fileIDs{11, 12}
	for _, c := range []fileTestAction{
		{"plain", mkdir(&pb.FileActionMkDir{Path: "/x", Mode: 0o731, Timestamp: -1}, nil), "x d 731 0:0", ""},
		{"only permission bits", mkdir(&pb.FileActionMkDir{Path: "/x", Mode: 0o7777, Timestamp: -1}, nil), "x d 777 0:0", ""},
		{"owner", mkdir(&pb.FileActionMkDir{Path: "x", Mode: 0o755, Timestamp: -1}, me), "x d 755 11:12", ""},
		{"existing", mkdir(&pb.FileActionMkDir{Path: "/dir", Mode: 0o777, Timestamp: -1}, me), "", ""},
		{"existing file", mkdir(&pb.FileActionMkDir{Path: "/etc/conf", Mode: 0o777, Timestamp: -1}, nil), "", ""},
		{"root", mkdir(&pb.FileActionMkDir{Path: "/", Mode: 0o777, Timestamp: -1}, nil), "", ""},
		{"no parent", mkdir(&pb.FileActionMkDir{Path: "/x/y", Mode: 0o755, Timestamp: -1}, nil), "", "mkdir /x/y: no such file or directory"},
		{"file as parent", mkdir(&pb.FileActionMkDir{Path: "/etc/conf/y", Mode: 0o755, Timestamp: -1}, nil), "", "not a directory"},
		{"parents", mkdir(&pb.FileActionMkDir{Path: "/x/y/z", Mode: 0o700, MakeParents: true, Timestamp: -1}, me), "x d 700 11:12\nx/y d 700 11:12\nx/y/z d 700 11:12", ""},
		{"parents, existing", mkdir(&pb.FileActionMkDir{Path: "/dir/sub", Mode: 0o711, MakeParents: true, Timestamp: -1}, me), "dir/sub d 711 11:12", ""},
		{"parents, all exist", mkdir(&pb.FileActionMkDir{Path: "/dir", Mode: 0o711, MakeParents: true, Timestamp: -1}, me), "", ""},
		{"parents, file at the end", mkdir(&pb.FileActionMkDir{Path: "/etc/conf", Mode: 0o711, MakeParents: true, Timestamp: -1}, nil), "", "mkdir /etc/conf: not a directory"},
		{"through links", mkdir(&pb.FileActionMkDir{Path: "/abs/x", Mode: 0o755, Timestamp: -1}, nil), "dir/x d 755 0:0", ""},
		{"link that leads out", mkdir(&pb.FileActionMkDir{Path: "/out/x", Mode: 0o755, Timestamp: -1}, nil), "etc/x d 755 0:0", ""},
		{"dots that lead out", mkdir(&pb.FileActionMkDir{Path: "../../../x", Mode: 0o755, Timestamp: -1}, nil), "x d 755 0:0", ""},
		{"where a dangling link leads", mkdir(&pb.FileActionMkDir{Path: "/dangling", Mode: 0o755, MakeParents: true, Timestamp: -1}, nil), "new d 755 0:0\nnew/target d 755 0:0", ""},
		{"loop", mkdir(&pb.FileActionMkDir{Path: "/loop/x", Mode: 0o755, Timestamp: -1}, nil), "", "too many links"},
	} {
		c.run(t)
	}
}

// compat: LLB-061
func TestFileTimes(t *testing.T) {
	dir := fileTestBase.make(t)
	r := fileTestRoot(t, dir)
	const at = (fileTestTime + 9) * 1e9
	if err := errors.Join(
		r.mkdirAction(&pb.FileActionMkDir{Path: "/m/n", Mode: 0o755, MakeParents: true, Timestamp: at}, nil),
		r.mkfileAction(&pb.FileActionMkFile{Path: "/file", Mode: 0o644, Timestamp: at}, nil),
		r.symlinkAction(&pb.FileActionSymlink{Oldpath: "/dir", Newpath: "/sym", Timestamp: at}, nil),
		r.mkfileAction(&pb.FileActionMkFile{Path: "/before", Mode: 0o644, Timestamp: -2e9}, nil),
		r.mkfileAction(&pb.FileActionMkFile{Path: "/natural", Mode: 0o644, Timestamp: -1}, nil),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"m": "@9", "m/n": "@9", "file": "@9", "sym": "@9", "dir": "@1", "before": fmt.Sprintf("@%d", -fileTestTime-2), "natural": "@now"} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if got := fileTestShowTime(&st); name != "dir" && got != want {
			t.Errorf("time of %s is %s, want %s", name, got, want)
		}
	}
}

// compat: LLB-064
func TestFileMkfile(t *testing.T) {
	mkfile := func(p string, mode int32, data string, owner *fileIDs) func(fileRoot) error {
		return func(r fileRoot) error {
			return r.mkfileAction(&pb.FileActionMkFile{Path: p, Mode: mode, Data: []byte(data), Timestamp: -1}, owner)
		}
	}
	for _, c := range []fileTestAction{
		{"plain", mkfile("/x", 0o666, "hello", nil), "x - 666 0:0 hello", ""},
		{"only permission bits", mkfile("/x", 0o4755, "", nil), "x - 755 0:0", ""},
		{"owner", mkfile("x", 0o600, "h", &fileIDs{5, 6}), "x - 600 5:6 h", ""},
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
func TestFileSymlink(t *testing.T) {
	symlink := func(to, at string, owner *fileIDs) func(fileRoot) error {
		return func(r fileRoot) error {
			return r.symlinkAction(&pb.FileActionSymlink{Oldpath: to, Newpath: at, Timestamp: -1}, owner)
		}
	}
	for _, c := range []fileTestAction{
		{"plain", symlink("../any/../thing", "/x", nil), "x l 777 0:0 ../any/../thing", ""},
		{"owner", symlink("f", "/dir/x", &fileIDs{5, 6}), "dir/x l 777 5:6 f", ""},
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
func TestFileRm(t *testing.T) {
	rm := func(p string, allowNotFound, wildcard bool) func(fileRoot) error {
		return func(r fileRoot) error {
			return r.rmAction(&pb.FileActionRm{Path: p, AllowNotFound: allowNotFound, AllowWildcard: wildcard})
		}
	}
	const noDir = "- dir\n- dir/f\n- hard\nhard - 600 1:2 content"
	for _, c := range []fileTestAction{
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

// compat: LLB-062
func TestFileOwner(t *testing.T) {
	users := fileTestTree("etc d\nreal d").make(t)
	if err := errors.Join(
		os.WriteFile(filepath.Join(users, "real/passwd"), []byte("root:x:0:0:root:/:/bin/sh\n# no user\napp:x:500:600::/:/bin/sh\napp:x:1:1::/:/bin/sh\n"), 0o644),
		os.Symlink("/real/passwd", filepath.Join(users, "etc/passwd")),
		os.WriteFile(filepath.Join(users, "etc/group"), []byte("root:x:0:\ngrp:x:700:app\n"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	bare := fileTestTree("etc - 644 0:0 file").make(t)
	device := fileTestTree("etc d\netc/passwd c 644\netc/group p 644").make(t)
	big := fileTestTree("etc d").make(t)
	if err := os.WriteFile(filepath.Join(big, "etc/passwd"), []byte(strings.Repeat("u:x:1:1::/:/bin/sh\n", 600_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	states := []string{users, bare, device, big}
	root := func(i int) (fileRoot, error) { return fileTestRoot(t, states[i]), nil }
	name := func(n string, in int64) *pb.UserOpt {
		return &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: n, Input: in}}}
	}
	id := func(n uint32) *pb.UserOpt { return &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: n}} }

	for _, c := range []struct {
		name        string
		user, group *pb.UserOpt
		want        fileIDs
		err         string
	}{
		{"nobody said", nil, nil, fileIDs{0, 0}, ""},
		{"user id", id(5), nil, fileIDs{5, 5}, ""},
		{"group id", nil, id(6), fileIDs{0, 6}, ""},
		{"both ids", id(5), id(6), fileIDs{5, 6}, ""},
		{"large ids", id(4294967294), nil, fileIDs{4294967294, 4294967294}, ""},
		{"user name, through a link", name("app", 0), nil, fileIDs{500, 600}, ""},
		{"user and group name", name("app", 0), name("grp", 0), fileIDs{500, 700}, ""},
		{"user id, group name", id(5), name("grp", 0), fileIDs{5, 700}, ""},
		{"unknown names", name("x", 0), name("y", 0), fileIDs{0, 0}, ""},
		{"no files", name("app", 1), name("grp", 1), fileIDs{0, 0}, ""},
		{"a device", name("app", 2), nil, fileIDs{}, "look up user \"app\": open /etc/passwd: not a regular file"},
		{"a pipe", nil, name("grp", 2), fileIDs{}, "look up group \"grp\": open /etc/group: not a regular file"},
		{"too large", name("app", 3), nil, fileIDs{}, "exceeds 10485760 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := fileOwnerIDs(&pb.ChownOpt{User: c.user, Group: c.group}, root)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || *got != c.want {
				t.Fatalf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
	if got, err := fileOwnerIDs(nil, root); got != nil || err != nil {
		t.Errorf("without an owner: %v, %v", got, err)
	}
}

// FuzzFileResolve holds resolve to what the kernel says of the same path after
// a chroot, where that exists.
func FuzzFileResolve(f *testing.F) {
	for _, p := range []string{"/abs/f", "/out/conf", "rel/../rel/f", "/../../dir", "//dir//f/", "dangling", "loop", "/toconf"} {
		f.Add(p)
	}
	dir := fileTestBase.make(f)
	f.Fuzz(func(t *testing.T, p string) {
		if strings.ContainsRune(p, 0) || len(p) > 1000 {
			t.Skip("no path of a system call")
		}
		r := fileTestRoot(t, dir)
		got, err := r.resolve(p, true)
		if err != nil {
			return
		}
		if !strings.HasPrefix(got, "/") || filepath.Clean(got) != got {
			t.Fatalf("%q resolves to %q", p, got)
		}
		fd, err := unix.Openat2(r.fd, strings.TrimLeft("./"+p, "/"), &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		if err != nil {
			return
		}
		defer unix.Close(fd)
		var want unix.Stat_t
		if err := unix.Fstat(fd, &want); err != nil {
			t.Fatal(err)
		}
		st, err := r.lstat(got)
		if err != nil && !errors.Is(err, fs.ErrNotExist) || st.Ino != want.Ino || st.Dev != want.Dev {
			t.Fatalf("%q resolves to %q, %v, which isn't where the kernel goes", p, got, err)
		}
	})
}
