//go:build e2e

// Package containerd has Debian's containerd run containers with kilnrun in
// runc's place. `make containerd` installs what it needs and runs it, as root.
package containerd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/kilnbuild/kiln/hack/testimage"
)

// patience is how long anything may take.
const patience = 60 * time.Second

// world is a containerd with directories and sockets of its own.
type world struct {
	*testing.T
	dir    string
	events *harness.Output
}

const config = `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs"]
[grpc]
  address = "%[1]s/sock"
[ttrpc]
  address = "%[1]s/ttrpc"
`

// start builds kilnrun, and starts a containerd that has the image of a
// busybox.
func start(t *testing.T) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it runs containers")
	}
	dir, err := os.MkdirTemp("", "kiln-cd-") // short, for its sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	w := &world{t, dir, &harness.Output{}}
	t.Cleanup(w.removeCgroups)
	w.must(w.command("go", "build", "-o", w.path("kilnrun"), "../../cmd/kilnrun"))
	// What it is called with is written down.
	wrapper := fmt.Sprintf("#!/bin/sh\necho \"$*\" >>%[1]s/calls\nexec %[1]s/kilnrun \"$@\"\n", dir)
	for name, text := range map[string]string{"config.toml": fmt.Sprintf(config, dir), "runtime": wrapper} {
		if err := os.WriteFile(w.path(name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	log := &harness.Output{}
	w.background(exec.Command("containerd", "--config", w.path("config.toml")), log)
	if err := log.WaitFor(patience, "containerd successfully booted"); err != nil {
		t.Fatal(err)
	}
	w.background(w.ctr("events"), w.events)
	img, err := testimage.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.Write(w.path("layout")); err != nil {
		t.Fatal(err)
	}
	w.must(w.command("tar", "-C", w.path("layout"), "-cf", w.path("image.tar"), "."))
	w.must(w.ctr("images", "import", "--base-name", "busybox", w.path("image.tar")))
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) command(name string, args ...string) *exec.Cmd { return exec.Command(name, args...) }

// ctr is a command in a namespace of containerd's that is the test's own, and so
// are the cgroups that are called as the namespace.
func (w *world) ctr(args ...string) *exec.Cmd {
	return exec.Command("ctr", append([]string{"--address", w.path("sock"), "--namespace", filepath.Base(w.dir)}, args...)...)
}

// removeCgroups removes the parents of containers' cgroups, which runtimes leave.
func (w *world) removeCgroups() {
	for _, place := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, err := filepath.Glob(filepath.Join(place, filepath.Base(w.dir)))
		for _, dir := range dirs {
			err = errors.Join(err, os.Remove(dir))
		}
		if err != nil {
			w.Errorf("cgroups are left: %v", err)
		}
	}
}

// run is the command that runs a container with kilnrun.
func (w *world) run(args ...string) *exec.Cmd {
	return w.ctr(append([]string{"run", "--runc-binary", w.path("runtime"), "--runc-root", w.path("runc")}, args...)...)
}

// background starts cmd, which is ended with the test.
func (w *world) background(cmd *exec.Cmd, out io.Writer) {
	w.Helper()
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = out, out, patience
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		w.Fatalf("%v: run make containerd", err)
	}
	w.Cleanup(func() {
		timer := time.AfterFunc(patience, func() { cmd.Process.Kill() }) //nolint:errcheck // told by Wait
		defer timer.Stop()
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			w.Error(err)
		}
		cmd.Wait() //nolint:errcheck // it was told to end
	})
}

// try runs cmd and returns its exit code and output.
func (w *world) try(cmd *exec.Cmd) (int, string) {
	w.Helper()
	out := &harness.Output{}
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = out, out
	}
	cmd.WaitDelay = patience
	if err := cmd.Start(); err != nil {
		w.Fatalf("%v: run make containerd", err)
	}
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() }) //nolint:errcheck // told by how it ends
	defer timer.Stop()
	if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
		w.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

func (w *world) must(cmd *exec.Cmd) string {
	w.Helper()
	code, out := w.try(cmd)
	if code != 0 {
		w.Fatalf("%s: exit code %d: %s", strings.Join(cmd.Args, " "), code, out)
	}
	return out
}

func (w *world) status(id, want string) {
	w.Helper()
	if err := harness.WaitFor(patience, func() error {
		_, out := w.try(w.ctr("tasks", "list"))
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == id && f[2] == want {
				return nil
			}
		}
		return fmt.Errorf("%s isn't %s: %s", id, want, out)
	}); err != nil {
		w.Error(err)
	}
}

const image = "busybox:latest"

func TestContainerd(t *testing.T) {
	w := start(t)
	t.Run("run", w.runs)
	t.Run("lifecycle", w.lifecycle)
	t.Run("terminal", w.terminal)
	calls, err := os.ReadFile(w.path("calls"))
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"create", "start", "exec", "kill", "delete", "pause", "resume"} {
		if !strings.Contains(string(calls), " "+command+" ") {
			t.Errorf("containerd never called %s", command)
		}
	}
	entries, err := os.ReadDir(filepath.Join(w.path("runc"), filepath.Base(w.dir)))
	if err != nil || len(entries) > 0 {
		t.Errorf("state of containers is left: %v, %v", entries, err)
	}
}

// A container to its end: output, exit code, and what kilnrun itself says when
// it can't be.
func (w *world) runs(t *testing.T) {
	w = &world{t, w.dir, w.events}
	if code, out := w.try(w.run("--rm", image, "r1", "sh", "-c", "echo hello; id -u; exit 3")); code != 3 || out != "hello\n0\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	if code, out := w.try(w.run("--rm", "--env", "A=b", "--cwd", "/tmp", "--memory-limit", "33554432", image, "r2", "sh", "-c", "echo $A; pwd")); code != 0 || out != "b\n/tmp\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	if code, out := w.try(w.run("--rm", image, "r3", "nonexist")); code == 0 || !strings.Contains(out, "executable file not found in $PATH") {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

func (w *world) lifecycle(t *testing.T) {
	w = &world{t, w.dir, w.events}
	w.must(w.run("--detach", image, "c1", "sleep", "1000"))
	w.status("c1", "RUNNING")
	if out := w.must(w.ctr("tasks", "exec", "--exec-id", "e1", "c1", "sh", "-c", "echo in; cat /proc/1/comm")); out != "in\nsleep\n" {
		t.Errorf("exec: %q", out)
	}
	if code, out := w.try(w.ctr("tasks", "exec", "--exec-id", "e2", "c1", "sh", "-c", "exit 7")); code != 7 {
		t.Errorf("exec: exit code %d, %s", code, out)
	}
	w.must(w.ctr("tasks", "pause", "c1"))
	w.status("c1", "PAUSED")
	w.must(w.ctr("tasks", "resume", "c1"))
	w.status("c1", "RUNNING")
	if out := w.must(w.ctr("tasks", "metrics", "c1")); !strings.Contains(out, "memory.usage") || !strings.Contains(out, "pids.current") {
		t.Errorf("metrics: %s", out)
	}
	if out := w.must(w.ctr("tasks", "ps", "c1")); len(strings.Split(strings.TrimSpace(out), "\n")) != 2 {
		t.Errorf("ps: %s", out)
	}
	w.must(w.ctr("tasks", "kill", "--signal", "SIGKILL", "c1"))
	w.status("c1", "STOPPED")
	w.try(w.ctr("tasks", "delete", "c1")) // its exit code is the task's
	w.must(w.ctr("containers", "delete", "c1"))
	for _, topic := range []string{"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete"} {
		if err := w.events.WaitFor(patience, topic); err != nil {
			t.Errorf("event: %v", err)
		}
	}
}

// terminal runs a container and a process in it on terminals.
func (w *world) terminal(t *testing.T) {
	w = &world{t, w.dir, w.events}
	out, code := w.onTerminal(w.run("--rm", "--tty", image, "t1", "sh", "-c", "tty; read x; echo got $x; exit 5"), "typed\n")
	if !strings.Contains(out, "/dev/pts/0\r") || !strings.Contains(out, "got typed\r") || code != 5 {
		t.Errorf("exit code %d, output %q", code, out)
	}
	w.must(w.run("--detach", image, "t2", "sleep", "1000"))
	out, code = w.onTerminal(w.ctr("tasks", "exec", "--tty", "--exec-id", "e1", "t2", "sh", "-c", "tty; exit 6"), "")
	if !strings.Contains(out, "/dev/pts/0\r") || code != 6 {
		t.Errorf("exit code %d, output %q", code, out)
	}
	w.must(w.ctr("tasks", "kill", "--signal", "SIGKILL", "t2"))
	w.status("t2", "STOPPED")
	w.try(w.ctr("tasks", "delete", "t2"))
	w.must(w.ctr("containers", "delete", "t2"))
}

// onTerminal runs cmd on a terminal of 24 lines and 80 columns, types text, and
// returns what it shows.
func (w *world) onTerminal(cmd *exec.Cmd, text string) (string, int) {
	w.Helper()
	master, name, err := console.NewPty()
	if err != nil {
		w.Fatal(err)
	}
	defer master.Close()
	if err := master.Resize(console.WinSize{Height: 24, Width: 80}); err != nil {
		w.Fatal(err)
	}
	tty, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		w.Fatal(err)
	}
	shown, copied := &harness.Output{}, make(chan error, 1)
	go func() { _, err := io.Copy(shown, master); copied <- err }()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if _, err := io.WriteString(master, text); err != nil {
		w.Fatal(err)
	}
	code, _ := w.try(cmd)
	if err := tty.Close(); err != nil {
		w.Error(err)
	}
	if err := <-copied; err != nil && !errors.Is(err, syscall.EIO) { // its last user has ended
		w.Error(err)
	}
	return shown.String(), code
}
