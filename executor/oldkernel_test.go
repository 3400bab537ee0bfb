//go:build linux && (amd64 || arm64)

package executor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
	"golang.org/x/sys/unix"
)

// openTreeBefore615 refuses to clone from a mount that is attached nowhere.
func openTreeBefore615(fd int, name string, flags uint) (int, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return -1, err
	}
	_, rest, _ := strings.Cut(string(info), "mnt_id:\t")
	id, _, _ := strings.Cut(rest, "\n")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return -1, err
	}
	if !strings.Contains("\n"+string(mounts), "\n"+id+" ") {
		return -1, unix.EINVAL
	}
	return unix.OpenTree(fd, name, flags)
}

func TestBeforeLinux615(t *testing.T) {
	openTree = openTreeBefore615
	defer func() { openTree = unix.OpenTree }()
	src := t.TempDir()
	mkdir(t, filepath.Join(src, "d/e"))
	if err := os.WriteFile(filepath.Join(src, "d/e/f"), []byte("F"), 0o644); err != nil {
		t.Fatal(err)
	}
	e := newTest(t, Config{})
	p := process(t, "cat /whole/d/e/f /part/f /file /ro/f; echo x 2>/dev/null > /ro/f || echo refused; touch /whole/new; ls /dev/shm | wc -l")
	p.Mounts = []Mount{
		{Dest: "/whole", Source: bindMount(src)},
		{Dest: "/part", Source: bindMount(src), Selector: "d/e"},
		{Dest: "/file", Source: bindMount(src), Selector: "/d/e/f"},
		{Dest: "/ro", Source: bindMount(src), Selector: "d/e", Readonly: true},
	}
	if out := output(t, e, p); out != "FFFFrefused\n0\n" {
		t.Errorf("%q", out)
	}
	// What was made in the root to mount on must go again.
	p = process(t, "echo x 2>/dev/null > /x || echo refused")
	p.ReadonlyRoot, p.Mounts = true, []Mount{{Dest: "/m", Source: bindMount(src)}}
	if out := output(t, e, p); out != "refused\n" {
		t.Errorf("read-only root: %q", out)
	}
}

func TestKernelTooOld(t *testing.T) {
	mountSetattr = func(int, string, uint, *unix.MountAttr) error { return unix.ENOSYS }
	defer func() { mountSetattr = unix.MountSetattr }()
	_, err := New(Config{Root: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "kiln needs Linux 5.15") {
		t.Errorf("error %v", err)
	}
}

// Without version 1 hierarchies, steps run in version 2 groups: born there,
// devices confined by a program, a cgroup namespace of their own.
func TestVersion2Cgroups(t *testing.T) {
	needRoot(t)
	e := newTest(t, Config{Cgroups: &cgroup.Tree{V2: cgrouptest.V2(t)}})
	const script = "cat /proc/self/cgroup | grep ^0:; [ -f /sys/fs/cgroup/cgroup.procs ] && echo mounted; mknod /tmp/log c 1 11 && dd if=/tmp/log bs=8192 count=1 >/dev/null 2>&1 && echo readable || echo denied; echo x > /dev/null && echo fine"
	if out := output(t, e, process(t, script)); out != "0::/\nmounted\ndenied\nfine\n" {
		t.Errorf("%q", out)
	}
	p := process(t, script)
	p.Security = SecurityInsecure
	if out := output(t, e, p); out != "0::/\nmounted\nreadable\nfine\n" {
		t.Errorf("insecure: %q", out)
	}
	// An insecure step may make groups of its own, and leave processes there.
	p = process(t, "mkdir -p /sys/fs/cgroup/a/b; (echo 0 > /sys/fs/cgroup/a/b/cgroup.procs; exec setsid sleep 1000) & until grep -q . /sys/fs/cgroup/a/b/cgroup.procs; do :; done; echo made")
	p.Security = SecurityInsecure
	if out := output(t, e, p); out != "made\n" {
		t.Errorf("%q", out)
	}
	p = process(t, "true")
	p.CgroupParent = "/kiln/test-parent"
	output(t, e, p)
}
