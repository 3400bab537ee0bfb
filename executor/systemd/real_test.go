//go:build linux && (amd64 || arm64)

package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// boot makes the namespaces that it is in a machine with a systemd of its own,
// which manages the cgroups below $1; of files only those in $2 can be changed, and
// none of the kernel's settings, which systemd would raise.
const boot = `set -e
mount --make-rprivate /
mkdir "$2/root"
mount --rbind / "$2/root"
mount -o remount,bind,ro "$2/root"
cd "$2/root"
mount --bind "$2" "$PWD$2"
mount -t proc proc proc
mount -o bind,ro proc/sys proc/sys
mount -t tmpfs tmpfs run
umount -R -l sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir run/units
printf '[Unit]\nDefaultDependencies=no\n' >run/units/kiln.target
pivot_root . .
umount -l .
exec env -i PATH="$PATH" container=kiln SYSTEMD_UNIT_PATH=/run/units:/run/systemd/transient NOTIFY_SOCKET="$2/notify" /lib/systemd/systemd --system --unit=kiln.target --show-status=false
`

// patience is how long a systemd may take to begin or to end.
const patience = 2 * time.Minute

// A systemd that is none of the test's makes a unit of each container, knows
// what becomes of it, and forgets it. The test executes itself in its machine.
func TestRealSystemd(t *testing.T) {
	const inside = "KILN_TEST_IN_SYSTEMD"
	if dir := os.Getenv(inside); dir != "" {
		underSystemd(t, dir)
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces")
	}
	dir := t.TempDir()
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "test"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	pid := bootSystemd(t, dir)
	cmd := exec.Command("nsenter", "--target", fmt.Sprint(pid), "--all", filepath.Join(dir, "test"), "-test.v", "-test.timeout", patience.String(), "-test.run", "^TestRealSystemd$")
	cmd.Env = append(os.Environ(), inside+"="+dir, "TMPDIR="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "\n--- PASS") {
		t.Errorf("in the machine: %v\n%s", err, out)
	}
}

// bootSystemd returns the first process of a machine that ends with the test.
func bootSystemd(t *testing.T, dir string) int {
	t.Helper()
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ready.Close() })
	group := newGroup(t)
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("sh", "-c", boot, "sh", group, dir)
	dirfd, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer dirfd.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
		UseCgroupFD: true, CgroupFD: int(dirfd.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		cmd.Wait() //nolint:errcheck // it was killed
	})
	if err := ready.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for message := make([]byte, 4096); ; {
		n, err := ready.Read(message)
		if err != nil {
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("systemd doesn't say that it is ready: %v\n%s", err, text)
		}
		if slices.Contains(strings.Split(string(message[:n]), "\n"), "READY=1") {
			return cmd.Process.Pid
		}
	}
}

// newGroup makes a version 2 cgroup, which goes with all in it when the test ends.
func newGroup(t *testing.T) string {
	t.Helper()
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(mount, fmt.Sprintf("kilntest-%d-systemd", os.Getpid()))
	t.Cleanup(func() {
		if err := errors.Join(removeGroups(group), unix.Unmount(mount, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	return group
}

// removeGroups removes a cgroup and those in it, deepest first. They are empty
// when the kernel has buried the last of their processes.
func removeGroups(group string) error {
	var dirs []string
	err := filepath.WalkDir(group, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for _, dir := range slices.Backward(dirs) {
		rerr := os.Remove(dir)
		for begun := time.Now(); errors.Is(rerr, unix.EBUSY) && time.Since(begun) < patience; {
			rerr = os.Remove(dir)
		}
		err = errors.Join(err, rerr)
	}
	return err
}

// underSystemd is the test in the machine.
func underSystemd(t *testing.T, dir string) {
	ctx := context.Background()
	id := "real"
	bundle, spec := newUnitBundle(t, id)
	spec.Linux.CgroupsPath = "kilntest-inner.slice:kiln:" + id
	if controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers"); err != nil || !strings.Contains(string(controllers), "pids") {
		t.Logf("no limits are tried: the controllers are %q (%v)", controllers, err)
		spec.Linux.Resources.Pids = nil
	}
	r := container.New(filepath.Join(dir, "state"))
	r.Systemd = Connect
	box, p, err := r.Create(ctx, id, spec, container.Options{IO: nullIO(t), Bundle: bundle, Systemd: true})
	if err != nil {
		t.Fatal(err)
	}
	const unit, group = "kiln-real.scope", "/kilntest.slice/kilntest-inner.slice/kiln-real.scope"
	want := []string{"ActiveState=active", "Slice=kilntest-inner.slice", "Delegate=yes", "ControlGroup=" + group}
	if spec.Linux.Resources.Pids != nil {
		want = append(want, fmt.Sprintf("TasksMax=%d", *spec.Linux.Resources.Pids.Limit))
	}
	shows(t, unit, want...)
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Pid))
	if err != nil || !strings.Contains(string(own), "0::"+group+"\n") {
		t.Errorf("cgroups %s, %v", own, err)
	}
	if err := box.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if spec.Linux.Resources.Pids != nil {
		if err := box.Update(ctx, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(55))}}); err != nil {
			t.Error(err)
		}
		shows(t, unit, "TasksMax=55")
	}
	if err := errors.Join(box.Pause(ctx), box.Resume(ctx)); err != nil {
		t.Error(err)
	}
	// What systemd does to its own doesn't touch the container's.
	if out, err := exec.Command("systemctl", "daemon-reload").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	shows(t, unit, want[:4]...)
	if err := box.Delete(ctx, true); err != nil {
		t.Error(err)
	}
	if _, err := p.Wait(ctx, 0); err != nil {
		t.Error(err)
	}
	shows(t, unit, "LoadState=not-found", "ActiveState=inactive")
	if _, err := os.Stat("/sys/fs/cgroup" + group); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cgroup is left: %v", err)
	}
}

// shows fails if systemd doesn't have properties of a unit.
func shows(t *testing.T, unit string, want ...string) {
	t.Helper()
	out, err := exec.Command("systemctl", "show", unit).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Split(string(out), "\n")
	for _, w := range want {
		if !slices.Contains(lines, w) {
			name, _, _ := strings.Cut(w, "=")
			at := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, name+"=") })
			t.Errorf("%s: %q, want %q", unit, lines[max(at, 0)], w)
		}
	}
}
