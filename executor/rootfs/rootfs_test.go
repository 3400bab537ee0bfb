package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tree makes a directory: names ending in / are directories, values starting
// with -> links, everything else files.
func tree(t testing.TB, files map[string]string) (Root, string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		full := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "->"); ok {
			err = os.Symlink(target, full)
		} else if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(full, 0o755)
		} else {
			err = os.WriteFile(full, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return New(fd), dir
}

func TestResolve(t *testing.T) {
	r, _ := tree(t, map[string]string{
		"a/b/file": "x", "abs": "->/a", "rel": "->a/b", "up": "->../../../a", "dangling": "->/no/where", "chain": "->abs/b", "loop": "->loop", "a/parent": "->..",
	})
	for _, tc := range []struct {
		in, want string
		exists   bool
	}{
		{"/", "/", true}, {"/a/b", "/a/b", true}, {"/a/b/", "/a/b", true}, {"//a//./b", "/a/b", true},
		{"/abs/b", "/a/b", true}, {"/rel/file", "/a/b/file", true}, {"/up/b", "/a/b", true}, {"/chain/file", "/a/b/file", true},
		{"/../../a", "/a", true}, {"/abs/../a", "/a", true}, {"/a/parent/a", "/a", true},
		{"/new/x", "/new/x", false}, {"/dangling/x", "/no/where/x", false}, {"/a/b/file/x", "/a/b/file/x", false}, {"/abs/new/../y", "/a/y", false},
	} {
		got, exists, err := r.Resolve(tc.in)
		if err != nil || got != tc.want || exists != tc.exists {
			t.Errorf("%s: %s %v %v, want %s %v", tc.in, got, exists, err, tc.want, tc.exists)
		}
	}
	if _, _, err := r.Resolve("/loop/x"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a loop: %v", err)
	}
}

// The target of a link outside of the root is never touched.
func TestNothingLeavesTheRoot(t *testing.T) {
	outside := t.TempDir()
	r, dir := tree(t, map[string]string{"abs": "->" + outside, "up": "->" + strings.Repeat("../", 30) + outside})
	for _, link := range []string{"/abs", "/up"} {
		if err := r.MakeCwd(link+"/cwd", 1, 1); err != nil {
			t.Error(err)
		}
		s, err := r.Prepare([]MountPoint{{Path: link + "/dir"}, {Path: link + "/file", File: true}}, false)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) > 0 {
		t.Errorf("outside: %v %v", entries, err)
	}
	if _, err := os.Stat(filepath.Join(dir, outside, "cwd")); err != nil {
		t.Errorf("inside: %v", err)
	}
}

func TestMakeCwd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it changes owners")
	}
	r, dir := tree(t, map[string]string{"there/": "", "file": ""})
	defer unix.Umask(unix.Umask(0o077))
	if err := r.MakeCwd("/there/new/deep", 7, 8); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"there": "0:0 755", "there/new": "7:8 755", "there/new/deep": "7:8 755"} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode&0o777); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if err := r.MakeCwd("/file/x", 0, 0); err == nil || !strings.Contains(err.Error(), "/file/x") {
		t.Errorf("below a file: %v", err)
	}
}

func TestStubsThatChanged(t *testing.T) {
	r, dir := tree(t, map[string]string{"etc/": ""})
	s, err := r.Prepare([]MountPoint{{Path: "/etc/hosts", File: true}, {Path: "/written", File: true}, {Path: "/filled"}, {Path: "/gone"}, {Path: "/p/swapped"}, {Path: "/p/swapped/below"}}, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(dir, "written"), []byte("x"), 0o644),
		os.WriteFile(filepath.Join(dir, "filled/x"), nil, 0o644),
		os.Remove(filepath.Join(dir, "gone")),
		os.Rename(filepath.Join(dir, "p"), filepath.Join(dir, "q")),
		os.Symlink("q", filepath.Join(dir, "p")),
	); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(); err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, name := range []string{"etc/hosts", "written", "filled", "q/swapped", "p"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			left = append(left, name)
		}
	}
	if want := []string{"written", "filled", "q/swapped", "p"}; !slices.Equal(left, want) {
		t.Errorf("left are %v, want %v", left, want)
	}
}

func TestPrepareFailsClean(t *testing.T) {
	r, dir := tree(t, map[string]string{"file": "x"})
	_, err := r.Prepare([]MountPoint{{Path: "/made"}, {Path: "/file/x"}}, false)
	if err == nil || !strings.Contains(err.Error(), "/file/x") {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); !os.IsNotExist(err) {
		t.Errorf("the first mount point is left: %v", err)
	}
}

func TestUser(t *testing.T) {
	const passwd, group = "root:x:0:0:root:/root:/bin/sh\nu:x:10:20:::\nroot2:x:0:5::/r2:\nbroken\n", "root:x:0:\ng:x:20:\nmany:x:30:u,root\n"
	for _, tc := range []struct {
		name   string
		files  map[string]string
		want   User
		errHas string
	}{
		{"", nil, User{Groups: []uint32{0}, Home: "/"}, ""},
		{"", map[string]string{"etc/passwd": passwd, "etc/group": group}, User{Groups: []uint32{0, 30}, Home: "/root"}, ""},
		{"u", map[string]string{"etc/passwd": passwd, "etc/group": group}, User{UID: 10, GID: 20, Groups: []uint32{20, 30}, Home: "/"}, ""},
		{"10", map[string]string{"etc/passwd": passwd, "etc/group": group}, User{UID: 10, GID: 20, Groups: []uint32{20, 30}, Home: "/"}, ""},
		{"u:many", map[string]string{"etc/passwd": passwd, "etc/group": group}, User{UID: 10, GID: 30, Groups: []uint32{30}, Home: "/"}, ""},
		{"99:98", map[string]string{"etc/passwd": passwd}, User{UID: 99, GID: 98, Groups: []uint32{98}, Home: "/"}, ""},
		{"root:root", nil, User{Groups: []uint32{0}, Home: "/"}, ""},
		{"u", nil, User{}, `look up user "u"`},
		{"4294967294:4294967294", nil, User{UID: maxID, GID: maxID, Groups: []uint32{maxID}, Home: "/"}, ""},
		{"4294967295:0", nil, User{}, "look up user"}, // setresuid(-1) would leave root
		{"0:4294967295", nil, User{}, "look up user"},
		{"u", map[string]string{"etc/passwd": "u:x:4294967295:1:::\n"}, User{}, "not between 0 and"},
		{"u", map[string]string{"etc/passwd": "u:x:99999999999999999999:1:::\n"}, User{}, "not between 0 and"},
		{"u", map[string]string{"etc/passwd": "u:x:-1:1:::\n"}, User{}, "not between 0 and"},
		{"u", map[string]string{"etc/passwd": "u:x:1:4294967296:::\n"}, User{}, "not between 0 and"},
		{"u", map[string]string{"etc/passwd": "u:x:1:1:::\n", "etc/group": "g:x:-1:u\n"}, User{}, "not between 0 and"},
		{"", map[string]string{"etc/passwd": "root:x:0:-1:::\n", "etc/group": "g:x:-1:root\n"}, User{Groups: []uint32{0}, Home: "/"}, ""},
		{"u:nogroup", map[string]string{"etc/passwd": passwd, "etc/group": group}, User{}, `look up user "u:nogroup"`},
		{"u", map[string]string{"etc/passwd/": ""}, User{}, "not a regular file"},
		{"", map[string]string{"etc/passwd/": ""}, User{Groups: []uint32{0}, Home: "/"}, ""},
		{"u", map[string]string{"etc/passwd": strings.Repeat("x", maxUserFile+1)}, User{}, "exceeds"},
		{"u", map[string]string{"etc/passwd": "->/etc/passwd"}, User{}, "too many levels"},
	} {
		r, _ := tree(t, tc.files)
		got, err := r.User(tc.name)
		switch {
		case tc.errHas != "":
			if err == nil || !strings.Contains(err.Error(), tc.errHas) {
				t.Errorf("%q: error %v, want %q", tc.name, err, tc.errHas)
			}
		case err != nil || fmt.Sprint(got) != fmt.Sprint(tc.want):
			t.Errorf("%q: %v %v, want %v", tc.name, got, err, tc.want)
		}
	}
	// A pipe in place of the file must not block.
	r, dir := tree(t, map[string]string{"etc/": ""})
	if err := unix.Mkfifo(filepath.Join(dir, "etc/passwd"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.User("u"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("pipe: %v", err)
	}
	// Nor is a device opened, which for some is enough to start something: this
	// one has no driver, so that to open it would fail.
	if err := errors.Join(os.Remove(filepath.Join(dir, "etc/passwd")), unix.Mknod(filepath.Join(dir, "etc/passwd"), unix.S_IFCHR|0o666, int(unix.Mkdev(4000, 0)))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.User("u"); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("device: %v", err)
	}
}

func FuzzUser(f *testing.F) {
	f.Add("u:x:1:2::/h:/s\n", "g:x:2:u\n", "u")
	f.Add("", "", "1:2")
	f.Add("u:x:4294967295:99999999999999999999:::\nu:x:-1\n::::::\n", "g:x:-1:u\n:\n", "u:g")
	f.Add("root:x:0:0:root:/root\n", "", "4294967295:0")
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		r, _ := tree(t, map[string]string{"etc/passwd": strings.ReplaceAll(passwd, "->", ""), "etc/group": strings.ReplaceAll(group, "->", "")})
		u, err := r.User(name)
		if err == nil && (len(u.Groups) == 0 || u.Home == "" || u.UID > maxID || slices.ContainsFunc(append(u.Groups, u.GID), func(g uint32) bool { return g > maxID })) {
			t.Errorf("%+v", u)
		}
	})
}
