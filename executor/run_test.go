//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestExitCodes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		for _, tc := range []struct {
			name   string
			script string
			args   []string
			valid  []int
			code   int // -1: success
			stderr string
		}{
			{name: "success", script: "exit 0", code: -1},
			{name: "failure", script: "exit 7", code: 7},
			{name: "a listed code succeeds", script: "exit 7", valid: []int{3, 7}, code: -1}, // compat: LLB-027
			{name: "zero is not implied", script: "exit 0", valid: []int{7}, code: 0},
			{name: "killed child", script: "sh -c 'kill -9 $$'; exit $?", code: 137},
			{name: "not in path", args: []string{"nonexist"}, code: 127, stderr: `exec: "nonexist": executable file not found in $PATH`},
			{name: "no such file", args: []string{"/nonexist"}, code: 127, stderr: `exec: "/nonexist": `},
			{name: "directory", args: []string{"/bin"}, code: 126, stderr: `exec: "/bin": permission denied`},
			{name: "not executable", args: []string{"/etc/plain"}, code: 126, stderr: `exec: "/etc/plain": permission denied`},
			{name: "found in a later directory", args: []string{"true"}, code: -1},
		} {
			t.Run(tc.name, func(t *testing.T) {
				root := busyboxRoot(t)
				if err := os.WriteFile(filepath.Join(root, "etc/plain"), nil, 0o644); err != nil {
					t.Fatal(err)
				}
				p := process(t, tc.script)
				p.Root, _ = overlay(t, root)
				p.Env, p.ValidExitCodes = []string{"PATH=/none:/etc/passwd:/bin"}, tc.valid
				if tc.args != nil {
					p.Args = tc.args
				}
				r := run(t, e, p)
				var exit *ExitError
				switch {
				case tc.code < 0 && r.err != nil:
					t.Errorf("error %v", r.err)
				case tc.code >= 0 && (!errors.As(r.err, &exit) || exit.Code != tc.code || exit.Cause.Kind == CauseOOM):
					t.Errorf("error %v, want exit code %d", r.err, tc.code)
				}
				if !strings.Contains(r.stderr, tc.stderr) {
					t.Errorf("stderr %q, want %q in it", r.stderr, tc.stderr)
				}
			})
		}
	})
}

func TestStdio(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		t.Run("all three", func(t *testing.T) {
			p := process(t, "read x; echo got $x; echo err >&2")
			p.Stdin = strings.NewReader("hello\n")
			if r := run(t, e, p); r.err != nil || r.stdout != "got hello\n" || r.stderr != "err\n" {
				t.Errorf("%+v", r)
			}
		})
		t.Run("empty stdin", func(t *testing.T) {
			if out := output(t, e, process(t, "wc -c")); strings.TrimSpace(out) != "0" {
				t.Errorf("%q", out)
			}
		})
		t.Run("none", func(t *testing.T) {
			if _, err := e.Run(context.Background(), process(t, "echo lost; echo lost >&2")); err != nil {
				t.Error(err)
			}
		})
		t.Run("one writer for both keeps the order", func(t *testing.T) {
			p := process(t, "for i in 1 2 3 4 5; do echo o$i; echo e$i >&2; done")
			var both bytes.Buffer
			p.Stdout, p.Stderr = &both, &both
			if _, err := e.Run(context.Background(), p); err != nil {
				t.Fatal(err)
			}
			if e.cfg.Binary != "" { // runc copies both through pipes of its own
				if len(both.String()) != 30 {
					t.Errorf("%q", both.String())
				}
				return
			}
			if want := "o1\ne1\no2\ne2\no3\ne3\no4\ne4\no5\ne5\n"; both.String() != want {
				t.Errorf("%q", both.String())
			}
		})
		t.Run("much", func(t *testing.T) {
			if out := output(t, e, process(t, "seq 100000")); len(out) != 588895 {
				t.Errorf("%d bytes", len(out))
			}
		})
		t.Run("stdin that never ends is closed", func(t *testing.T) {
			r, w := io.Pipe()
			defer w.Close()
			p := process(t, "exit 0")
			p.Stdin = r
			if _, err := e.Run(context.Background(), p); err != nil {
				t.Error(err)
			}
			if _, err := w.Write([]byte("x")); err != io.ErrClosedPipe {
				t.Errorf("write to stdin afterwards: %v", err)
			}
		})
		t.Run("failing writer", func(t *testing.T) {
			p := process(t, "while echo x; do :; done")
			p.Stdout = failingWriter{}
			if _, err := e.Run(context.Background(), p); !errors.Is(err, errDiskFull) {
				t.Errorf("error %v", err)
			}
		})
		t.Run("a daemon left in the background doesn't hold the step", func(t *testing.T) {
			if out := output(t, e, process(t, "setsid sleep 1000 & echo done")); out != "done\n" {
				t.Errorf("%q", out)
			}
		})
		t.Run("user opens /dev/stdout", func(t *testing.T) {
			p := process(t, "echo x > /dev/stdout")
			p.User = "builder"
			if out := output(t, e, p); out != "x\n" {
				t.Errorf("%q", out)
			}
		})
	})
}

var errDiskFull = errors.New("disk full")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errDiskFull }

// watch is a writer that tells when a word has been written.
type watch struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	word string
	seen chan struct{}
}

func newWatch(word string) *watch { return &watch{word: word, seen: make(chan struct{})} }

func (w *watch) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := strings.Contains(w.buf.String(), w.word)
	w.buf.Write(p)
	if !before && strings.Contains(w.buf.String(), w.word) {
		close(w.seen)
	}
	return len(p), nil
}

func (w *watch) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

func TestCancel(t *testing.T) {
	cause := errors.New("not wanted any more")
	// Sleeping for a number nobody else sleeps for makes processes findable.
	marker := fmt.Sprintf("%d4711", os.Getpid())
	eachRuntime(t, func(t *testing.T, e *executor) {
		for name, script := range map[string]string{
			"one process":         "echo ready; exec sleep " + marker,
			"daemons":             "setsid sh -c 'setsid sleep " + marker + " & sleep " + marker + "' & sleep " + marker + " & echo ready; wait",
			"deaf to TERM":        "trap '' TERM; echo ready; sleep " + marker,
			"writes all the time": "while echo ready; do :; done",
		} {
			t.Run(name, func(t *testing.T) {
				p := process(t, script)
				out := newWatch("ready")
				p.Stdout = out
				ctx, cancel := context.WithCancelCause(context.Background())
				go func() {
					<-out.seen
					cancel(cause)
				}()
				_, err := e.Run(ctx, p)
				if !errors.Is(err, cause) {
					t.Errorf("error %v", err)
				}
				if pids := processesWith(t, marker); len(pids) > 0 {
					t.Errorf("processes %v are left", pids)
				}
			})
		}
		t.Run("before the start", func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(cause)
			if _, err := e.Run(ctx, process(t, "exit 0")); err != cause {
				t.Errorf("error %v", err)
			}
		})
	})
}

func TestCancelTerminatesFirst(t *testing.T) {
	needRoot(t)
	for name, binary := range runtimes {
		t.Run(name, func(t *testing.T) {
			e := newTest(t, Config{Binary: binary, Grace: time.Minute})
			p := process(t, "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done")
			out := newWatch("ready")
			p.Stdout = out
			ctx, cancel := context.WithCancelCause(context.Background())
			cause := errors.New("not wanted any more")
			go func() {
				<-out.seen
				cancel(cause)
			}()
			_, err := e.Run(ctx, p)
			if !errors.Is(err, cause) || !strings.HasSuffix(out.String(), "bye\n") {
				t.Errorf("error %v, output %q", err, out.String())
			}
		})
	}
}

// processesWith lists processes of this machine with word in their arguments.
func processesWith(t testing.TB, word string) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		args, err := os.ReadFile(f)
		if err == nil && bytes.Contains(args, []byte(word)) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

func TestParallel(t *testing.T) {
	e := newTest(t, Config{})
	lower := busyboxRoot(t)
	var wg sync.WaitGroup
	for i := range 200 {
		root, _ := overlay(t, lower)
		wg.Go(func() {
			var out bytes.Buffer
			p := Process{ID: newID(), Root: root, Args: []string{"sh", "-c", "echo $N; exit $((N % 5))"}, Env: []string{"PATH=/bin", fmt.Sprintf("N=%d", i)}, Stdout: &out}
			if i%3 == 0 {
				p.Network = NetNone
			}
			_, err := e.Run(context.Background(), p)
			var exit *ExitError
			if i%5 == 0 && err != nil || i%5 != 0 && (!errors.As(err, &exit) || exit.Code != i%5) {
				t.Errorf("run %d: %v", i, err)
			}
			if out.String() != fmt.Sprintf("%d\n", i) {
				t.Errorf("run %d printed %q", i, out.String())
			}
		})
	}
	wg.Wait()
}

// No descriptor of this process is seen by a step, and none is left open here.
func TestDescriptors(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "ls /proc/self/fd")
		if out := strings.Fields(output(t, e, p)); len(out) != 4 || out[2] != "2" {
			t.Errorf("a step has descriptors %v; 3 is ls's own", out)
		}
		before := openFiles(t)
		for range 20 {
			p.ID = newID()
			output(t, e, p)
		}
		// Groups made ahead and network namespaces come and go.
		if after := openFiles(t); len(after) > len(before)+20 {
			t.Errorf("from %d open files to %d: %v", len(before), len(after), after)
		}
	})
}

func openFiles(t testing.TB) (files []string) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			files = append(files, e.Name()+" "+target)
		}
	}
	return files
}

func TestInvalidProcess(t *testing.T) {
	e := newTest(t, Config{})
	for name, change := range map[string]func(p *Process){
		"invalid process id":          func(p *Process) { p.ID = "../x" },
		"no command":                  func(p *Process) { p.Args = nil },
		"zero byte":                   func(p *Process) { p.Args = []string{"echo", "a\x00b"} },
		"invalid environment":         func(p *Process) { p.Env = []string{"novalue"} },
		"look up user \"nobodyhere\"": func(p *Process) { p.User = "nobodyhere" },
		"invalid rlimit type":         func(p *Process) { p.Ulimits = []Ulimit{{Name: "bogus"}} },
		"mount at /":                  func(p *Process) { p.Mounts = []Mount{{Dest: "/", Source: bindMount(t.TempDir())}} },
		"open missing": func(p *Process) {
			p.Mounts = []Mount{{Dest: "/x", Source: bindMount(t.TempDir()), Selector: "missing"}}
		},
		"is below that of memory": func(p *Process) { p.Resources = &Resources{Memory: 1<<63 - 1, MemorySwap: 5} },
	} {
		t.Run(name, func(t *testing.T) {
			p := process(t, "true")
			change(&p)
			if _, err := e.Run(context.Background(), p); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// A child that changes its user must not change what this process may do.
func TestDumpable(t *testing.T) {
	e := newTest(t, Config{})
	before, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, "id -u")
	p.User = "1000:1000"
	output(t, e, p)
	if after, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || after != before {
		t.Errorf("dumpable is %d (%v), was %d", after, err, before)
	}
}

func TestClose(t *testing.T) {
	needRoot(t)
	e, err := New(Config{Root: t.TempDir(), CgroupParent: "/kiln/test"})
	if err != nil {
		t.Fatal(err)
	}
	p := process(t, "echo ready; read x; echo got $x")
	r, w := io.Pipe()
	out := newWatch("ready")
	p.Stdin, p.Stdout = r, out
	ended := make(chan error)
	go func() {
		_, err := e.Run(context.Background(), p)
		ended <- err
	}()
	<-out.seen
	closed := make(chan error)
	go func() { closed <- e.Close() }()
	select {
	case <-closed:
		t.Error("Close didn't wait")
	default:
	}
	if _, err := io.WriteString(w, "x\n"); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil || !strings.Contains(out.String(), "got x") {
		t.Errorf("%v, %q", err, out.String())
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := e.Run(context.Background(), process(t, "true")); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("run afterwards: %v", err)
	}
}
