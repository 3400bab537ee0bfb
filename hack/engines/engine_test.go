//go:build e2e

// Package engines has Debian's Podman and Docker run containers with kilnrun in
// runc's place. `make engines` installs what it needs and runs it, as root.
package engines

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
)

// patience is how long anything may take.
const patience = 60 * time.Second

// engine is a Podman or Docker with directories of its own.
type engine struct {
	*testing.T
	dir     string
	command []string // the program with what leads it there
	env     []string

	notFound int    // exit code of an exec of a program that isn't there
	limit    string // what a container reads of a limit of 32 MiB
}

// in is e for a part of its test.
func (e *engine) in(t *testing.T) *engine {
	one := *e
	one.T = t
	return &one
}

// cgroups are the directories of a group in all hierarchies.
func cgroups(name string) (dirs []string) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		found, err := filepath.Glob(pattern + name)
		if err != nil {
			panic(err) // of the pattern alone
		}
		dirs = append(dirs, found...)
	}
	return slices.DeleteFunc(dirs, func(name string) bool { // control files
		info, err := os.Stat(name)
		return err != nil || !info.IsDir()
	})
}

// removeCgroups removes the parent of containers' cgroups, in which nothing may
// stay: what attends to containers may just be ending.
func (e *engine) removeCgroups(parent string) {
	e.Helper()
	for _, dir := range cgroups(parent) {
		if err := harness.WaitFor(patience, func() error { return os.Remove(dir) }); err != nil {
			e.Errorf("a cgroup is left: %v", err)
		}
	}
}

// newEngine makes the directory, builds kilnrun into it, behind a wrapper that
// writes down what it is called with, and makes the root file system of an image.
func newEngine(t *testing.T) *engine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it runs containers")
	}
	dir, err := os.MkdirTemp("", "kiln-en-") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{T: t, dir: dir}
	t.Cleanup(func() { e.leaveNothing() })
	e.succeeds(exec.Command("go", "build", "-o", e.path("kilnrun"), "../../cmd/kilnrun"))
	e.write("runtime", fmt.Sprintf("#!/bin/sh\necho \"$*\" >>%[1]s/calls\nexec %[1]s/kilnrun \"$@\"\n", dir))
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox in /bin: %v", err)
	}
	e.write("image/bin/busybox", string(busybox))
	for _, applet := range strings.Fields("sh cat sleep ps id echo test hostname true head grep touch stty tty dd") {
		if err := os.Symlink("busybox", e.path("image/bin/"+applet)); err != nil {
			t.Fatal(err)
		}
	}
	e.succeeds(exec.Command("tar", "-C", e.path("image"), "-cf", e.path("image.tar"), "."))
	return e
}

// leaveNothing removes the directory, and fails the test if something is mounted
// there: it can't be removed then.
func (e *engine) leaveNothing() {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		e.Error(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, e.dir) {
			e.Errorf("it is still mounted: %s", line)
			return
		}
	}
	if err := os.RemoveAll(e.dir); err != nil {
		e.Error(err)
	}
}

func (e *engine) path(name string) string { return filepath.Join(e.dir, name) }

func (e *engine) write(name, text string) {
	e.Helper()
	if err := os.MkdirAll(filepath.Dir(e.path(name)), 0o755); err != nil {
		e.Fatal(err)
	}
	if err := os.WriteFile(e.path(name), []byte(text), 0o755); err != nil {
		e.Fatal(err)
	}
}

// cmd is a command of the engine.
func (e *engine) cmd(args ...string) *exec.Cmd {
	cmd := exec.Command(e.command[0], append(append([]string{}, e.command[1:]...), args...)...)
	cmd.Env, cmd.Dir = append(os.Environ(), e.env...), e.dir // where conmon writes of a lack of memory
	return cmd
}

// try runs cmd, and returns its exit code and what it prints.
func (e *engine) try(cmd *exec.Cmd) (int, string) {
	e.Helper()
	out := &harness.Output{}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = out, out, patience
	if err := cmd.Start(); err != nil {
		e.Fatalf("%v: run make engines", err)
	}
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() }) // an error means that it has ended
	err := cmd.Wait()
	if !timer.Stop() {
		e.Errorf("%q still ran after %s: %s", cmd.Args, patience, out)
	}
	if err != nil && cmd.ProcessState == nil {
		e.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

func (e *engine) succeeds(cmd *exec.Cmd) string {
	e.Helper()
	code, out := e.try(cmd)
	if code != 0 {
		e.Fatalf("%q: exit code %d: %s", cmd.Args, code, out)
	}
	return out
}

// must is what a command of the engine prints that succeeds.
func (e *engine) must(args ...string) string {
	e.Helper()
	return e.succeeds(e.cmd(args...))
}

// ends runs a command of the engine, which must end with code and print want.
func (e *engine) ends(code int, want string, args ...string) {
	e.Helper()
	if got, out := e.try(e.cmd(args...)); got != code || !strings.Contains(out, want) {
		e.Errorf("%q: exit code %d, want %d; printed %q, want %q", args, got, code, out, want)
	}
}

// becomes waits until a command of the engine prints want.
func (e *engine) becomes(want string, args ...string) {
	e.Helper()
	if err := harness.WaitFor(patience, func() error {
		if out := e.must(args...); !strings.Contains(out, want) {
			return fmt.Errorf("%q prints %q, not %q", args, out, want)
		}
		return nil
	}); err != nil {
		e.Error(err)
	}
}

// called fails the test unless the engine called each of kilnrun's commands.
func (e *engine) called(commands ...string) {
	e.Helper()
	calls, err := os.ReadFile(e.path("calls"))
	if err != nil {
		e.Fatal(err)
	}
	for _, c := range commands {
		if !slices.Contains(strings.Fields(string(calls)), c) {
			e.Errorf("%s was never called", c)
		}
	}
}
