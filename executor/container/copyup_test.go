//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
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

// What an image has can't be copied into more memory than the container has.
func TestCopyUpWithinMemoryLimit(t *testing.T) {
	const limit = 8 << 20
	with := func(size int64, files int, options ...string) (*box, error) {
		t.Helper()
		dir, spec := newBundle(t, "busybox wc -c </copied/f")
		from := filepath.Join(dir, "rootfs/copied")
		err := errors.Join(os.Mkdir(from, 0o755), os.WriteFile(filepath.Join(from, "f"), nil, 0o644), os.Truncate(filepath.Join(from, "f"), size))
		for i := range files {
			err = errors.Join(err, os.WriteFile(filepath.Join(from, fmt.Sprint(i)), nil, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
		spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(limit))}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/copied", Type: "tmpfs", Source: "tmpfs", Options: append(options, "tmpcopyup")})
		return tryCreate(t, dir, spec)
	}
	for what, try := range map[string]func() (*box, error){
		"bytes":                        func() (*box, error) { return with(limit+1, 0) },
		"bytes of a larger mount":      func() (*box, error) { return with(limit+1, 0, "size=1g") },
		"bytes of a mount of any":      func() (*box, error) { return with(limit+1, 0, "size=0") },
		"bytes of a smaller mount":     func() (*box, error) { return with(1<<20+1, 0, "size=1m") },
		"files":                        func() (*box, error) { return with(0, limit>>10) },
		"files of a mount with plenty": func() (*box, error) { return with(0, limit>>10, "nr_inodes=0", "size=1m") },
	} {
		if _, err := try(); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "memory limit of the container") {
			t.Errorf("too many %s: %v", what, err)
		}
	}
	b, err := with(1<<20, 100, "size=2m")
	if err != nil {
		t.Fatal(err)
	}
	b.start()
	if code, out := b.end(); code != 0 || out != "1048576\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
}
