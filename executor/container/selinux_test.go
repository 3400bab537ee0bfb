//go:build linux && (amd64 || arm64)

package container

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Labels of SELinux are what the spec says where there is SELinux, and refused
// elsewhere: nothing runs without one that it should have.
func TestSELinuxLabels(t *testing.T) {
	const process, files = "system_u:system_r:unconfined_t:s0:c1,c2", "system_u:object_r:tmp_t:s0:c1,c2"
	onProcess := func(label string) func(*specs.Spec) { return func(s *specs.Spec) { s.Process.SelinuxLabel = label } }
	onMounts := func(label string) func(*specs.Spec) { return func(s *specs.Spec) { s.Linux.MountLabel = label } }
	refused := map[string]func(*specs.Spec){
		`process.selinuxLabel "a:b:c:d": `: onProcess("a:b:c:d"),
		`linux.mountLabel "a:b:c:d": `:     onMounts("a:b:c:d"),
	}
	why := "SELinux's policy on this machine has no such label"
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
		why = "SELinux is not enabled on this machine: stat /sys/fs/selinux/enforce"
		refused[`process.selinuxLabel "`+process+`": `] = onProcess(process)
		refused[`linux.mountLabel "`+files+`": `] = onMounts(files)
	} else {
		testLabelled(t, process, files, true)
	}
	for what, change := range refused {
		bundle, spec := newBundle(t, "exit 0")
		change(spec)
		if _, err := tryCreate(t, bundle, spec); err == nil || !strings.Contains(err.Error(), what+why) {
			t.Errorf("error %v, want %q in it", err, what+why)
		}
	}
}

// testLabelled looks at a container with mounts of all kinds, and has it look at
// itself.
func testLabelled(t *testing.T, process, files string, noNewPrivileges bool) {
	bundle, spec := newBundle(t, "cat /proc/self/attr/current; cat /copied/file")
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs/copied"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "rootfs/copied/file"), []byte("copied"), 0o644); err != nil {
		t.Fatal(err)
	}
	labelProgram(t, bundle)
	spec.Process.SelinuxLabel, spec.Process.NoNewPrivileges, spec.Linux.MountLabel = process, noNewPrivileges, files
	spec.Linux.MaskedPaths = append(spec.Linux.MaskedPaths, "/proc/fs")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/tmpfs", Type: "tmpfs"}, specs.Mount{Destination: "/copied", Type: "tmpfs", Options: []string{"tmpcopyup"}})
	b := createBox(t, bundle, spec)
	labelOf := func(name string) string {
		buf := make([]byte, 200)
		n, err := unix.Lgetxattr(fmt.Sprintf("/proc/%d/root%s", b.Pid, name), "security.selinux", buf)
		if err != nil {
			t.Fatalf("label of %s: %v", name, err)
		}
		return strings.TrimRight(string(buf[:n]), "\x00")
	}
	for _, name := range []string{"/dev", "/dev/null", "/dev/pts", "/dev/shm", "/dev/mqueue", "/tmpfs", "/copied", "/copied/file", "/proc/fs"} {
		if l := labelOf(name); l != files {
			t.Errorf("the label of %s is %s", name, l)
		}
	}
	for _, name := range []string{"/", "/proc", "/sys"} { // somebody else's, and the policy's
		if l := labelOf(name); l == files {
			t.Errorf("the label of %s is %s", name, l)
		}
	}
	b.start()
	if code, out := b.end(); code != 0 || strings.Replace(out, "\x00", " ", 1) != process+" copied" {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// labelProgram gives the bundle's program a label with which a policy lets
// programs be executed.
func labelProgram(t *testing.T, bundle string) {
	t.Helper()
	setLabel(t, filepath.Join(bundle, "rootfs/bin/busybox"), "system_u:object_r:bin_t:s0")
}

func setLabel(t *testing.T, file, label string) {
	t.Helper()
	if err := unix.Setxattr(file, "security.selinux", []byte(label), 0); err != nil {
		t.Fatal(err)
	}
}
