//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func openDir(t *testing.T, name string) int {
	t.Helper()
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	file, old := filepath.Join(from, "dir/file"), time.Unix(1e9, 5)
	if err := errors.Join(
		os.Mkdir(filepath.Dir(file), 0o750), os.WriteFile(file, []byte("text"), 0o600), os.Chmod(file, 0o4755), os.Chown(filepath.Dir(file), 7, 8),
		unix.Setxattr(file, "security.kilntest", []byte("value"), 0), os.Chtimes(file, old, old),
		os.Symlink("/etc/passwd", filepath.Join(from, "link")), unix.Mkfifo(filepath.Join(from, "fifo"), 0o620),
		unix.Mknod(filepath.Join(from, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), os.Chmod(from, 0o711),
	); err != nil {
		t.Fatal(err)
	}
	if err := copyTree(openDir(t, from), openDir(t, to)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "dir", "dir/file", "link", "fifo", "null"} {
		var a, b unix.Stat_t
		if err := errors.Join(unix.Lstat(filepath.Join(from, name), &a), unix.Lstat(filepath.Join(to, name), &b)); err != nil {
			t.Error(err)
			continue
		}
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev || a.Mtim != b.Mtim {
			t.Errorf("%s: %+v became %+v", name, a, b)
		}
	}
	if text, err := os.ReadFile(filepath.Join(to, "dir/file")); err != nil || string(text) != "text" {
		t.Errorf("%q, %v", text, err)
	}
	value := make([]byte, 16)
	if n, err := unix.Getxattr(filepath.Join(to, "dir/file"), "security.kilntest", value); err != nil || string(value[:n]) != "value" {
		t.Errorf("attribute %q, %v", value[:max(n, 0)], err)
	}
	if to, err := os.Readlink(filepath.Join(to, "link")); to != "/etc/passwd" {
		t.Errorf("link to %q, %v", to, err)
	}
	// A second time, everything is there already.
	if err := copyTree(openDir(t, from), openDir(t, to)); !errors.Is(err, unix.EEXIST) {
		t.Errorf("error %v", err)
	}
}
