//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
)

// needRoot fails a test that can't do without root.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes containers")
	}
}

// busyboxRoot makes a directory with busybox and what a small image has.
func busyboxRoot(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox in /bin: %v", err)
	}
	for name, content := range map[string]string{
		"bin/busybox": string(bin),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\ndaemon:x:2:3::/usr/daemon:/bin/sh\nbuilder:x:1000:1001::/home/builder:/bin/sh\n",
		"etc/group":   "root:x:0:\ndisk:x:6:root\nstaff:x:1001:\nextra:x:2000:builder\nmore:x:2001:builder,root\n",
	} {
		mkdir(t, filepath.Dir(filepath.Join(root, name)))
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, applet := range strings.Fields("sh true false cat ls env id sleep mount ps stat hostname kill touch mkdir mknod dd ip pwd grep seq wc head echo test readlink ln rm ulimit setsid nc sync od") {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	mkdir(t, filepath.Join(root, "tmp"))
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o1777); err != nil {
		t.Fatal(err)
	}
	return root
}

func mkdir(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

// overlay is a writable root on top of lower; what is written lands in upper.
func overlay(t testing.TB, lower string) (mounts []mount.Mount, upper string) {
	t.Helper()
	dir := t.TempDir()
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	mkdir(t, upper)
	mkdir(t, work)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work}}}, upper
}

func bindMount(dir string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind"}}}
}

// runtimes are what the common tests run against.
var runtimes = map[string]string{"builtin": "", "runc": "runc"}

// allRuntimes are what tests run against of which a part is different for each
// of them.
var allRuntimes = map[string]string{"builtin": "", "runc": "runc", "crun": "../hack/crun"}

// ours are the runtimes that must withstand every attack: those made here.
func ours(t testing.TB) map[string]string {
	t.Helper()
	binary, err := kilnrun()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"builtin": "", "kilnrun": binary}
}

// built is the directory of what was built for the tests, if anything was.
var built string

var kilnrun = sync.OnceValues(func() (binary string, err error) {
	if built, err = os.MkdirTemp("", "kiln-executor-test"); err != nil {
		return "", err
	}
	binary = filepath.Join(built, "kilnrun")
	cmd := exec.Command("go", "build", "-o", binary, "../cmd/kilnrun")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0") // as make build has it
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build kilnrun: %w\n%s", err, out)
	}
	return binary, nil
})

// newTest makes an executor that must leave nothing behind.
func newTest(t testing.TB, cfg Config) *executor {
	t.Helper()
	needRoot(t)
	if cfg.Root == "" {
		cfg.Root = t.TempDir()
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = "/kiln/test"
	}
	log := &testLog{}
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("close executor: %v", err)
		}
		checkClean(t, cfg.Root, e.(*executor))
		if s := log.String(); s != "" {
			t.Errorf("the executor logged:\n%s", s)
		}
	})
	return e.(*executor)
}

// checkClean fails if a mount, cgroup or process of e is left.
func checkClean(t testing.TB, root string, e *executor) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), root) {
		t.Errorf("mounts are left below %s:\n%s", root, mounts)
	}
	for _, dir := range e.cgroups.Leftovers() {
		t.Errorf("cgroup %s is left", dir)
	}
}

type testLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// process is a Process that runs a shell script in a fresh root.
func process(t testing.TB, script string) Process {
	t.Helper()
	root, _ := overlay(t, busyboxRoot(t))
	return Process{ID: newID(), Root: root, Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/"}
}

var lastID atomic.Int64

func newID() string { return fmt.Sprintf("t%d", lastID.Add(1)) }

// result is what a run did.
type result struct {
	stdout, stderr string
	usage          Usage
	err            error
}

func run(t testing.TB, e *executor, p Process) result {
	t.Helper()
	var out, errOut bytes.Buffer
	p.Stdout, p.Stderr = &out, &errOut
	u, err := e.Run(context.Background(), p)
	return result{out.String(), errOut.String(), u, err}
}

// output is what a successful run printed.
func output(t testing.TB, e *executor, p Process) string {
	t.Helper()
	r := run(t, e, p)
	if r.err != nil {
		t.Fatalf("run %v: %v\nstdout: %s\nstderr: %s", p.Args, r.err, r.stdout, r.stderr)
	}
	return r.stdout
}

// eachRuntime runs a test against all runtimes.
func eachRuntime(t *testing.T, test func(t *testing.T, e *executor)) { each(t, runtimes, test) }

func each(t *testing.T, runtimes map[string]string, test func(t *testing.T, e *executor)) {
	for name, binary := range runtimes {
		t.Run(name, func(t *testing.T) { test(t, newTest(t, Config{Binary: binary})) })
	}
}

// patience ends a little before the tests' own time does: what never happens is told
// then, and a machine that is busy or slow takes as long as it takes.
func patience(t *testing.T, why string) context.Context {
	deadline, ok := t.Deadline()
	if !ok {
		return t.Context()
	}
	ctx, cancel := context.WithDeadlineCause(t.Context(), deadline.Add(-5*time.Second), errors.New(why))
	t.Cleanup(cancel)
	return ctx
}
