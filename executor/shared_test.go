//go:build linux && (amd64 || arm64)

package executor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// On machines with systemd all mounts are shared: what is mounted in a clone
// of one would appear in the original.
func TestSharedMounts(t *testing.T) {
	needRoot(t)
	shared := t.TempDir()
	if err := unix.Mount("tmpfs", shared, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(shared, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", shared, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	root, src := filepath.Join(shared, "root"), filepath.Join(shared, "src")
	if err := os.CopyFS(root, os.DirFS(busyboxRoot(t))); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(root, "bin/busybox"), 0o755); err != nil {
		t.Fatal(err)
	}
	mkdir(t, filepath.Join(src, "below"))
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "mount -t tmpfs none /src/below && echo mounted; grep -q shared: /proc/self/mountinfo || echo private")
		p.Root = bindMount(root)
		p.Security = SecurityInsecure
		p.Mounts = []Mount{{Dest: "/src", Source: bindMount(src)}, {Dest: "/src/in", Source: bindMount(t.TempDir())}}
		if out := output(t, e, p); out != "mounted\nprivate\n" {
			t.Errorf("%q", out)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), " "+shared+"/") {
			t.Errorf("the step's mounts are in the daemon's mount namespace:\n%s", mounts)
		}
	})
}
