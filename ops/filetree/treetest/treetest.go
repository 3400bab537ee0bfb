// Package treetest makes directory trees from text, and text from directory trees, for
// tests of what changes them.
package treetest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Tree describes files, one a line:
//
//	dir d 755 0:0
//	dir/f - 644 1:2 content
//	l l 777 0:0 target
//	h h f
//
// Kinds are d, -, l, h (hard link), p, s, c and b. Devices are 1:3. Owner and
// mode may be left out from the right. Every file's time is Time plus
// its line number in seconds.
type Tree string

// Time is that of a Tree's first line, in seconds.
const Time = 1_000_000_000

// Make builds the tree in a new directory.
func (tree Tree) Make(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tree.MakeIn(t, root)
	return root
}

// MakeIn builds the tree in the directory root.
func (tree Tree) MakeIn(t testing.TB, root string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
	lines := strings.Split(strings.TrimSpace(string(tree)), "\n")
	for i, line := range lines {
		if strings.TrimSpace(line) == "" {
			continue
		}
		if err := makeLine(root, strings.Fields(line)); err != nil {
			t.Fatalf("line %d, %q: %v", i, line, err)
		}
	}
	for i, line := range slices.Backward(lines) { // children before their directories
		if f := strings.Fields(line); len(f) > 1 && f[1] != "h" {
			touch(t, filepath.Join(root, f[0]), Time+int64(i))
		}
	}
	touch(t, root, Time-1)
}

func touch(t testing.TB, p string, sec int64) {
	t.Helper()
	ts := unix.Timespec{Sec: sec}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
}

func makeLine(root string, f []string) error {
	p := filepath.Join(root, f[0])
	field := func(i int, otherwise string) string {
		if len(f) > i {
			return f[i]
		}
		return otherwise
	}
	if f[1] == "h" {
		return os.Link(filepath.Join(root, f[2]), p)
	}
	normal := "644"
	if f[1] == "d" {
		normal = "755"
	}
	perm, err := strconv.ParseUint(field(2, normal), 8, 32)
	if err != nil {
		return err
	}
	content := field(4, "")
	switch kinds := map[string]uint32{"p": unix.S_IFIFO, "s": unix.S_IFSOCK, "c": unix.S_IFCHR, "b": unix.S_IFBLK}; f[1] {
	case "d":
		err = os.Mkdir(p, 0o700)
	case "-":
		err = os.WriteFile(p, []byte(content), 0o600)
	case "l":
		err = os.Symlink(content, p)
	default:
		err = unix.Mknod(p, kinds[f[1]]|0o600, int(unix.Mkdev(1, 3)))
	}
	if err != nil {
		return err
	}
	var uid, gid int
	if _, err := fmt.Sscanf(field(3, "0:0"), "%d:%d", &uid, &gid); err != nil {
		return err
	}
	if err := os.Lchown(p, uid, gid); err != nil || f[1] == "l" {
		return err
	}
	return unix.Chmod(p, uint32(perm))
}

// Dump describes what is below root as a Tree does, sorted, with times appended if
// they are asked for.
func Dump(t testing.TB, root string, times bool) string {
	t.Helper()
	var lines []string
	first := map[uint64]string{}
	root = strings.TrimSuffix(root, "/")
	// The slash leads through the link that the path of a view is.
	err := filepath.WalkDir(root+"/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == root+"/" {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(p, root+"/")
		if prev, ok := first[st.Ino]; ok {
			lines = append(lines, name+" h "+prev)
			return nil
		}
		if st.Nlink > 1 && !files.IsDir(&st) {
			first[st.Ino] = name
		}
		line, err := showLine(p, name, &st)
		if times {
			line += " " + ShowTime(&st)
		}
		lines = append(lines, line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func showLine(p, name string, st *unix.Stat_t) (string, error) {
	owner := fmt.Sprintf("%o %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return name + " d " + owner, nil
	case unix.S_IFREG:
		data, err := os.ReadFile(p)
		return strings.TrimSuffix(name+" - "+owner+" "+string(data), " "), err
	case unix.S_IFLNK:
		link, err := os.Readlink(p)
		return name + " l " + owner + " " + link, err
	}
	kind := map[uint32]string{unix.S_IFIFO: "p", unix.S_IFSOCK: "s", unix.S_IFCHR: "c", unix.S_IFBLK: "b"}[st.Mode&unix.S_IFMT]
	if st.Rdev != 0 {
		owner += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return name + " " + kind + " " + owner, nil
}

// ShowTime is the time of a file in seconds after Time; "now" is any of the last hour.
func ShowTime(st *unix.Stat_t) string {
	if st.Mtim.Sec > time.Now().Unix()-3600 {
		return "@now"
	}
	return fmt.Sprintf("@%d", st.Mtim.Sec-Time)
}

// Want compares what is below root with a tree, written in any order.
func Want(t testing.TB, root, want string) {
	t.Helper()
	var lines []string
	for line := range strings.SplitSeq(want, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	if got := Dump(t, root, false); got != strings.Join(lines, "\n") {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(lines, "\n"))
	}
}
