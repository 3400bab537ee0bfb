package snapshot_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tree describes everything below dir exactly, a line a file. With times, the
// seconds of the last change are part of it.
func tree(t testing.TB, dir string, times bool) []string {
	t.Helper()
	dir += "/"
	var out []string
	first := map[uint64]string{}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		name := "/" + strings.TrimPrefix(path, dir)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x", len(data), sha256.Sum256(data))
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if !info.IsDir() && st.Nlink > 1 {
			if f, ok := first[st.Ino]; ok {
				line += " = " + f
			} else {
				first[st.Ino] = name
			}
		}
		if times && name != "/" {
			line += fmt.Sprintf(" @%d", st.Mtim.Sec)
		}
		out = append(out, line+xattrsOf(t, path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func xattrsOf(t testing.TB, path string) string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.Trim(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	out := ""
	for _, name := range names {
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		v := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			t.Fatal(err)
		}
		out += fmt.Sprintf(" %s=%q", name, v[:n])
	}
	return out
}

// sameTree compares two descriptions.
func sameTree(t testing.TB, what string, got, want []string) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	var diff []string
	in := map[string]bool{}
	for _, l := range got {
		in[l] = true
	}
	for _, l := range want {
		if !in[l] {
			diff = append(diff, "- "+l)
		}
		delete(in, l)
	}
	for l := range in {
		diff = append(diff, "+ "+l)
	}
	slices.SortFunc(diff, func(a, b string) int { return strings.Compare(a[2:], b[2:]) })
	t.Fatalf("%s:\n%s", what, strings.Join(diff, "\n"))
}
