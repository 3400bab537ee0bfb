//go:build e2e

// Package criu has kilnrun write containers down, and make them again, with a
// criu that knows this machine's kernel. `make criu` finds one and runs it, as
// root; without one it fails.
package criu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/kilnbuild/kiln/hack/harness"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// patience is how long anything may take.
const patience = 60 * time.Second

// world is a bundle, and where its containers are kept.
type world struct {
	*testing.T
	dir  string
	spec *specs.Spec
}

func start(t *testing.T, script string) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it runs containers")
	}
	w := &world{t, t.TempDir(), container.Example()}
	if _, err := os.Stat(w.criu()); err != nil {
		t.Fatalf("%v: run make criu", err)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v: run make deps", err)
	}
	bin := w.path("rootfs/bin")
	err = errors.Join(os.MkdirAll(bin, 0o755), os.WriteFile(filepath.Join(bin, "busybox"), busybox, 0o755))
	for _, applet := range []string{"sh", "cat", "sleep", "hostname", "tr"} {
		err = errors.Join(err, os.Symlink("busybox", filepath.Join(bin, applet)))
	}
	if err != nil {
		t.Fatal(err)
	}
	w.must(exec.Command("go", "build", "-o", w.path("kilnrun"), "../../cmd/kilnrun"))
	w.spec.Process.Terminal, w.spec.Root.Readonly = false, false
	w.spec.Process.Args = []string{"sh", "-c", script}
	w.spec.Process.Env = []string{"PATH=/bin"}
	w.write()
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) criu() string {
	w.Helper()
	file, err := filepath.Abs("../../bin/criu")
	if err != nil {
		w.Fatal(err)
	}
	return file
}

func (w *world) write() {
	w.Helper()
	text, err := json.Marshal(w.spec)
	if err != nil {
		w.Fatal(err)
	}
	if err := os.WriteFile(w.path("config.json"), text, 0o644); err != nil {
		w.Fatal(err)
	}
}

func (w *world) kilnrun(args ...string) *exec.Cmd {
	cmd := exec.Command(w.path("kilnrun"), append([]string{"--root", w.path("state"), "--criu", w.criu()}, args...)...)
	// What criu mounts while it works is nobody else's business.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return cmd
}

func (w *world) must(cmd *exec.Cmd) string {
	w.Helper()
	out := &harness.Output{}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = out, out, patience
	if code := w.background(cmd)(); code != 0 {
		w.Fatalf("%s: exit code %d: %s", strings.Join(cmd.Args, " "), code, out)
	}
	return out.String()
}

// background starts cmd; what it returns waits for its exit code.
func (w *world) background(cmd *exec.Cmd) (wait func() int) {
	w.Helper()
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	return func() int {
		w.Helper()
		timer := time.AfterFunc(patience, func() { cmd.Process.Kill() }) //nolint:errcheck // told by how it ends
		defer timer.Stop()
		if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
			w.Fatal(err)
		}
		return cmd.ProcessState.ExitCode()
	}
}

// box is a container whose first command is attended to.
type box struct {
	*world
	id   string
	out  *harness.Output
	wait func() int
}

// attend has a command make a container and stay with it.
func (w *world) attend(id string, args ...string) *box {
	w.Helper()
	b := &box{world: w, id: id, out: &harness.Output{}}
	cmd := w.kilnrun(append(args, "--bundle", w.dir, id)...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = b.out, b.out, patience
	b.wait = w.background(cmd)
	w.Cleanup(func() {
		if out, err := w.kilnrun("delete", "--force", id).CombinedOutput(); err != nil {
			w.Errorf("delete %s: %v: %s", id, err, out)
		}
	})
	return b
}

// counting prints one number after the other, and ends when it is told to.
const counting = `trap 'echo bye; exit 7' TERM; echo from memory >/dev/shm/file; exec 3</dev/shm/file
	i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done`

// numbers returns the first and the last number that b has printed, all of
// which follow each other.
func (b *box) numbers() (first, last int, err error) {
	lines := strings.Split(b.out.String(), "\n")
	for i, line := range lines[:len(lines)-1] {
		n, err := strconv.Atoi(line)
		if err != nil || i > 0 && n != last+1 {
			return 0, 0, fmt.Errorf("it counts %q", lines)
		}
		if last = n; i == 0 {
			first = n
		}
	}
	return first, last, nil
}

// counted waits until b runs and has printed some numbers.
func (b *box) counted() (first, last int) {
	b.Helper()
	const enough = 5
	if err := harness.WaitFor(patience, func() (err error) {
		if first, last, err = b.numbers(); err != nil {
			b.Fatal(err)
		}
		if last < first+enough {
			return fmt.Errorf("it has counted from %d to %d: %q", first, last, b.out)
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	// What is made again prints before that is written down.
	if err := harness.WaitFor(patience, func() error {
		if state := b.state(b.id); state.Status != specs.StateRunning {
			return fmt.Errorf("container %s is %s", b.id, state.Status)
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	return first, last
}

func (w *world) state(id string) (state specs.State) {
	w.Helper()
	if err := json.Unmarshal([]byte(w.must(w.kilnrun("state", id))), &state); err != nil {
		w.Fatal(err)
	}
	return state
}

// save writes the container down, whose process ends.
func (b *box) save(images string, flags ...string) {
	b.Helper()
	b.must(b.kilnrun(append(append([]string{"checkpoint", "--image-path", b.path(images)}, flags...), b.id)...))
}

// A container that was written down goes on where it was: with its memory, open
// files, pid, host name, limits and output; and can be written down again.
func TestGoesOn(t *testing.T) {
	w := start(t, counting)
	limit := int64(64 << 20)
	w.spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit}
	w.spec.Hostname = "counter"
	w.write()
	b := w.attend("box", "run")
	if first, _ := b.counted(); first != 1 {
		t.Errorf("it begins at %d", first)
	}
	for _, images := range []string{"images1", "images2"} {
		b.save(images)
		b.wait()
		_, before, err := b.numbers() // all that was printed
		if err != nil {
			t.Fatal(err)
		}
		if out := w.must(w.kilnrun("list", "--quiet")); out != "" {
			t.Errorf("there is a container: %q", out)
		}
		b = w.attend("box", "restore", "--image-path", w.path(images))
		if first, _ := b.counted(); first != before+1 {
			t.Errorf("after %d comes %d", before, first)
		}
	}
	if out := w.must(w.kilnrun("exec", "box", "sh", "-c", "hostname; cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/1/fd/3")); !strings.HasPrefix(out, "counter\nsh -c trap") || !strings.HasSuffix(out, "from memory\n") {
		t.Errorf("inside: %q", out)
	}
	if out := w.must(w.kilnrun("events", "--stats", "box")); !strings.Contains(out, fmt.Sprintf(`"limit":%d`, limit)) {
		t.Errorf("stats %s", out)
	}
	w.must(w.kilnrun("pause", "box"))
	w.must(w.kilnrun("resume", "box"))
	w.must(w.kilnrun("kill", "box", "TERM"))
	if code := b.wait(); code != 7 || !strings.HasSuffix(b.out.String(), "bye\n") {
		t.Errorf("exit code %d, output %q", code, b.out)
	}
}

// One that is left running runs, and what was written down is a copy of it, with
// the files and the network of others that it had.
func TestCopy(t *testing.T) {
	w := start(t, counting)
	w.write()
	network := w.attend("network", "run")
	network.counted()
	if err := errors.Join(os.Mkdir(w.path("data"), 0o755), os.WriteFile(w.path("data/file"), []byte("of the machine\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	w.spec.Mounts = append(w.spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: w.path("data"), Options: []string{"rbind"}})
	for i := range w.spec.Linux.Namespaces {
		if ns := &w.spec.Linux.Namespaces[i]; ns.Type == specs.NetworkNamespace {
			ns.Path = w.netns("network")
		}
	}
	w.write()
	b := w.attend("box", "run")
	b.counted()
	b.save("images", "--leave-running")
	_, before := b.counted()
	w.must(w.kilnrun("kill", "box", "TERM"))
	if code := b.wait(); code != 7 {
		t.Errorf("exit code %d", code)
	}
	again := w.attend("copy", "restore", "--image-path", w.path("images"))
	if first, _ := again.counted(); first < 2 || first > before+1 {
		t.Errorf("the copy begins at %d, the other one had counted to %d", first, before)
	}
	for _, place := range []string{"/sys/fs/cgroup/box", "/sys/fs/cgroup/*/box"} {
		if made, err := filepath.Glob(place); err != nil || len(made) > 0 {
			t.Errorf("cgroups of the container that has ended were made again: %v, %v", made, err)
		}
	}
	if out := w.must(w.kilnrun("exec", "copy", "cat", "/data/file")); out != "of the machine\n" {
		t.Errorf("mounted: %q", out)
	}
	if ours, theirs := w.links("copy"), w.links("network"); ours != theirs {
		t.Errorf("network namespace %s, want %s", ours, theirs)
	}
}

// netns is the network namespace of a container's process.
func (w *world) netns(id string) string {
	w.Helper()
	return fmt.Sprintf("/proc/%d/ns/net", w.state(id).Pid)
}

func (w *world) links(id string) string {
	w.Helper()
	link, err := os.Readlink(w.netns(id))
	if err != nil {
		w.Fatal(err)
	}
	return link
}
