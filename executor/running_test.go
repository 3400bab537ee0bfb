//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// started is a first process that runs until its stdin is closed.
type started struct {
	Running
	stdin io.Closer
	done  chan error
}

// startFirst starts the first process of a container: one that waits.
func startFirst(ctx context.Context, t *testing.T, e *executor, p Process) *started {
	t.Helper()
	r, w := io.Pipe()
	if p.Stdin == nil {
		p.Stdin = r
	}
	s := &started{stdin: w, done: make(chan error, 1)}
	up := make(chan Running, 1)
	p.Started = func(r Running) { up <- r }
	go func() {
		_, err := e.Run(ctx, p)
		s.done <- err
	}()
	select {
	case s.Running = <-up:
	case err := <-s.done:
		t.Fatalf("the first process ended: %v", err)
	}
	t.Cleanup(func() { w.Close() })
	return s
}

// sh runs a script in the container.
func (s *started) sh(t *testing.T, script string, change ...func(*Process)) (string, error) {
	t.Helper()
	var out bytes.Buffer
	p := Process{Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Stdout: &out, Stderr: &out}
	for _, c := range change {
		c(&p)
	}
	err := s.Exec(t.Context(), p)
	return out.String(), err
}

// line collects output and tells when it contains something.
type screen struct {
	mu   sync.Mutex // guards the fields below
	text string
	want string
	seen chan struct{}
}

func watchFor(want string) *screen { return &screen{want: want, seen: make(chan struct{})} }

func (w *screen) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	had := strings.Contains(w.text, w.want)
	w.text += string(p)
	if !had && strings.Contains(w.text, w.want) {
		close(w.seen)
	}
	return len(p), nil
}

func (w *screen) wait(t *testing.T) {
	t.Helper()
	select {
	case <-w.seen:
	case <-time.After(30 * time.Second):
		w.mu.Lock()
		defer w.mu.Unlock()
		t.Fatalf("no %q in %q", w.want, w.text)
	}
}

func wantExit(t *testing.T, err error, code int) {
	t.Helper()
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != code {
		t.Errorf("error %v, want exit code %d", err, code)
	}
}

func TestFurtherProcesses(t *testing.T) {
	each(t, allRuntimes, furtherProcesses)
}

func furtherProcesses(t *testing.T, e *executor) {
	p := process(t, "echo from the first > /file; hostname > /name; cat > /proc/self/fd/1")
	p.Hostname, p.Network = "box", NetNone
	s := startFirst(t.Context(), t, e, p)
	for _, c := range []struct {
		name, script, want string
		change             func(*Process)
	}{
		{"sees files and names", "cat /file; hostname", "from the first\nbox\n", nil},
		{"sees the first process", "cat /proc/1/comm; test $$ -ne 1 && echo another", "cat\nanother\n", nil},
		{"environment", "echo $A $HOME", "b /home/builder\n", func(p *Process) { p.Env, p.User = append(p.Env, "A=b"), "builder" }},
		{"user", "id -u; id -G", "1000\n1001 2000 2001\n", func(p *Process) { p.User = "builder" }},
		{"working directory", "pwd", "/tmp\n", func(p *Process) { p.Cwd = "/tmp" }},
		{"standard input", "cat", "hello", func(p *Process) { p.Stdin = strings.NewReader("hello") }},
		{"no network", "ip -o link | wc -l", "1\n", nil},
		{"confined", "grep Seccomp: /proc/self/status; grep CapEff /proc/self/status", "Seccomp:\t2\nCapEff:\t00000000a80425fb\n", nil},
		{"in its cgroup", "busybox cmp /proc/self/cgroup /proc/1/cgroup && echo same", "same\n", nil},
		{"no files of the daemon", "ls /proc/self/fd | wc -l", "4\n", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			change := c.change
			if change == nil {
				change = func(*Process) {}
			}
			if out, err := s.sh(t, c.script, change); err != nil || out != c.want {
				t.Errorf("printed %q (%v), want %q", out, err, c.want)
			}
		})
	}
	t.Run("insecure", func(t *testing.T) {
		out, err := s.sh(t, "grep Seccomp: /proc/self/status", func(p *Process) { p.Security = SecurityInsecure })
		if e.cfg.Binary == "" && (err != nil || out != "Seccomp:\t0\n") {
			t.Errorf("printed %q (%v)", out, err)
		}
		if e.cfg.Binary != "" && (err == nil || !strings.Contains(err.Error(), "needs the built-in runtime")) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("exit code", func(t *testing.T) {
		_, err := s.sh(t, "exit 9")
		wantExit(t, err, 9)
	})
	t.Run("no such program", func(t *testing.T) {
		if leavesOrphans(t, e) {
			return
		}
		out, err := s.sh(t, "", func(p *Process) { p.Args = []string{"nope"} })
		wantExit(t, err, 127)
		if !strings.Contains(out, "nope") || !strings.Contains(out, "not found in $PATH") {
			t.Errorf("printed %q", out)
		}
	})
	t.Run("no such directory", func(t *testing.T) {
		if leavesOrphans(t, e) {
			return
		}
		if _, err := s.sh(t, "", func(p *Process) { p.Cwd = "/nope" }); err == nil || !strings.Contains(err.Error(), "/nope") || e.cfg.Binary == "" && !errors.Is(err, unix.ENOENT) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		boom := errors.New("boom")
		ctx, cancel := context.WithCancelCause(t.Context())
		err := s.Exec(ctx, Process{Args: []string{"/bin/sleep", "1000"}, Started: func(Running) { cancel(boom) }})
		if !errors.Is(err, boom) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("signal", func(t *testing.T) {
		err := s.Exec(t.Context(), Process{Args: []string{"/bin/sleep", "1000"}, Started: func(r Running) {
			if err := r.Signal(unix.SIGINT); err != nil {
				t.Error(err)
			}
		}})
		wantExit(t, err, 130)
	})
	t.Run("ends with the first", func(t *testing.T) {
		ended := make(chan error, 1)
		up := make(chan struct{})
		go func() {
			ended <- s.Exec(t.Context(), Process{Args: []string{"/bin/sleep", "1000"}, Started: func(Running) { close(up) }})
		}()
		<-up
		s.stdin.Close()
		if err := <-s.done; err != nil {
			t.Errorf("first process: %v", err)
		}
		wantExit(t, <-ended, 137)
		if _, err := s.sh(t, "true"); !errors.Is(err, ErrEnded) {
			t.Errorf("error %v, want %v", err, ErrEnded)
		}
		if err := s.Signal(unix.SIGTERM); err != nil {
			t.Errorf("signal to a process that has ended: %v", err)
		}
		if err := s.Resize(1, 1); err != nil {
			t.Errorf("resize of what has no terminal: %v", err)
		}
	})
}

// What the processes of a container made of its devices leads a further process
// to none of the daemon's files.
func TestFurtherProcessIsNotLed(t *testing.T) {
	e := newTest(t, Config{})
	secret, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	s := startFirst(t.Context(), t, e, process(t, "cat"))
	for _, device := range []string{"null", "ptmx"} {
		script := fmt.Sprintf("rm /dev/%s && ln -s /proc/self/fd/%d /dev/%s", device, secret.Fd(), device)
		if out, err := s.sh(t, script, func(p *Process) { p.Stdin = strings.NewReader("") }); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		_, err := s.sh(t, "busybox readlink /proc/self/fd/0", func(p *Process) { p.Terminal = device == "ptmx" })
		if err == nil || !strings.Contains(err.Error(), device) {
			t.Errorf("a process started with /dev/%s that leads to a file of the daemon: %v", device, err)
		}
	}
	s.stdin.Close()
	if err := <-s.done; err != nil {
		t.Error(err)
	}
}

// A container that is cancelled takes everything in it along, even what
// nobody reads from.
func TestCancelledContainer(t *testing.T) {
	each(t, allRuntimes, cancelledContainer)
}

func cancelledContainer(t *testing.T, e *executor) {
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	s := startFirst(ctx, t, e, process(t, "cat; sleep 1000"))
	full := make(chan struct{})
	var once sync.Once
	ended := make(chan error, 1)
	execCtx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		ended <- s.Exec(execCtx, Process{Args: []string{"/bin/busybox", "yes"}, Stdout: writerFunc(func(p []byte) (int, error) {
			once.Do(func() { close(full) })
			<-execCtx.Done() // as a connection that nobody reads from
			return 0, execCtx.Err()
		})})
	}()
	<-full
	cancel(boom)
	for _, ch := range []chan error{s.done, ended} {
		if err := <-ch; !errors.Is(err, boom) {
			t.Errorf("error %v", err)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// leavesOrphans reports whether e's runtime leaves further processes that could
// not be executed to the machine's init: the container's end waits until that
// reaps them, and here it may be anything. The end-to-end tests have one that does.
func leavesOrphans(t *testing.T, e *executor) bool {
	t.Helper()
	if strings.HasSuffix(e.cfg.Binary, "crun") {
		t.Log("not with crun, which leaves such processes to the machine's init")
		return true
	}
	return false
}

func TestTerminal(t *testing.T) { eachRuntime(t, terminals) }

// crun gives up what is still to be read from a terminal when its process ends.
func TestTerminalWithCrun(t *testing.T) {
	e := newTest(t, Config{Binary: allRuntimes["crun"]})
	first := startFirst(t.Context(), t, e, process(t, "cat"))
	sizeAndInterrupt(t, e, first)
	first.stdin.Close()
	if err := <-first.done; err != nil {
		t.Error(err)
	}
}

func terminals(t *testing.T, e *executor) {
	first := startFirst(t.Context(), t, e, process(t, "cat"))
	// script, as the first process of a container and as a further one.
	both := func(t *testing.T, script string, change func(*Process)) (string, error) {
		t.Helper()
		one := func(run func(Process) error) (string, error) {
			var out bytes.Buffer
			p := process(t, script)
			p.Terminal, p.Stdout = true, &out
			if change != nil {
				change(&p)
			}
			err := run(p)
			return out.String(), err
		}
		out, err := one(func(p Process) error { _, err := e.Run(t.Context(), p); return err })
		again, aerr := one(func(p Process) error { return first.Exec(t.Context(), p) })
		if out != again || (err == nil) != (aerr == nil) {
			t.Errorf("the first process printed %q (%v), a further one %q (%v)", out, err, again, aerr)
		}
		return out, err
	}
	t.Run("is one", func(t *testing.T) {
		out, err := both(t, "test -t 0 && test -t 1 && test -t 2 && busybox tty | grep -c /dev/pts/", nil)
		if err != nil || out != "1\r\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("of a user", func(t *testing.T) {
		out, err := both(t, "echo x > $(busybox tty) && id -u", func(p *Process) { p.User = "builder" })
		if err != nil || out != "x\r\n1000\r\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("exit code", func(t *testing.T) {
		_, err := both(t, "exit 5", nil)
		wantExit(t, err, 5)
	})
	t.Run("input and its end", func(t *testing.T) {
		out, err := both(t, "busybox stty -echo; echo ready; read x; echo got $x; cat; echo over", func(p *Process) {
			ready := watchFor("ready")
			p.Stdout = io.MultiWriter(p.Stdout, ready)
			p.Stdin = io.MultiReader(readerFunc(func([]byte) (int, error) { ready.wait(t); return 0, io.EOF }), strings.NewReader("line\n"))
		})
		if err != nil || out != "ready\r\ngot line\r\nover\r\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("much", func(t *testing.T) {
		out, err := both(t, "seq 20000", nil)
		if err != nil || len(out) != 108894+20000 || !strings.HasSuffix(out, "20000\r\n") {
			t.Errorf("%d bytes, %v", len(out), err)
		}
	})
	t.Run("no such program", func(t *testing.T) {
		for _, run := range []func(Process) error{
			func(p Process) error { _, err := e.Run(t.Context(), p); return err },
			func(p Process) error { return first.Exec(t.Context(), p) },
		} {
			p := process(t, "")
			p.Terminal, p.Args = true, []string{"nope"}
			wantExit(t, run(p), 127)
		}
	})
	t.Run("size and interrupt", func(t *testing.T) { sizeAndInterrupt(t, e, first) })
	first.stdin.Close()
	if err := <-first.done; err != nil {
		t.Error(err)
	}
}

func sizeAndInterrupt(t *testing.T, e *executor, first *started) {
	t.Helper()
	for _, exec := range []bool{false, true} {
		ready, sized := watchFor("ready"), watchFor("33 44")
		in, out := io.Pipe()
		p := process(t, `trap 'busybox stty size' WINCH; trap 'exit 7' INT; echo ready; while true; do sleep 1000 & wait; done`)
		p.Terminal, p.Stdin, p.Stdout = true, in, io.MultiWriter(ready, sized)
		up := make(chan Running, 1)
		p.Started = func(r Running) { up <- r }
		done := make(chan error, 1)
		go func() {
			if exec {
				done <- first.Exec(t.Context(), p)
				return
			}
			_, err := e.Run(t.Context(), p)
			done <- err
		}()
		r := <-up
		ready.wait(t)
		if err := r.Resize(33, 44); err != nil {
			t.Error(err)
		}
		sized.wait(t)
		if _, err := out.Write([]byte{3}); err != nil { // ^C
			t.Error(err)
		}
		wantExit(t, <-done, 7)
		if err := r.Resize(1, 1); err != nil {
			t.Errorf("resize of a terminal that is gone: %v", err)
		}
	}
}
