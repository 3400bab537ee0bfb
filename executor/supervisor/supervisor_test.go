//go:build linux && (amd64 || arm64)

package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
	"github.com/kilnbuild/kiln/internal/steplog"
	"golang.org/x/sys/unix"
)

// asSupervisor has the test's program be a supervisor.
const asSupervisor = "be-a-supervisor"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asSupervisor {
		if err := Main(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func testConfig(t testing.TB) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes containers")
	}
	return Config{
		Dir: t.TempDir(), Command: []string{os.Args[0], asSupervisor}, Executor: executor.Config{CgroupParent: "/kiln/test"},
		Unclaimed: time.Minute, Log: slog.New(slog.DiscardHandler),
	}
}

func newClient(t testing.TB, cfg Config) *Client {
	t.Helper()
	c := New(cfg)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// A supervisor is there before the step that is expected.
func TestExpect(t *testing.T) {
	c := newClient(t, testConfig(t))
	c.Expect()
	c.Expect()
	early := c.proc
	if early == nil {
		t.Fatal("no supervisor was started")
	}
	if p, err := c.use(t.Context()); err != nil || p != early {
		t.Errorf("a step doesn't run where it was expected: %v", err)
	}
	closed := New(testConfig(t))
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	if closed.Expect(); closed.proc != nil {
		t.Error("a supervisor was started for nobody")
	}
}

// newProcess is a Process that runs a shell script in a directory with busybox.
func newProcess(t testing.TB, id, script string) (p executor.Process, root string) {
	t.Helper()
	root = t.TempDir()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox in /bin: %v", err)
	}
	for _, dir := range []string{"bin", "etc", "proc", "sys", "dev", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields("sh true echo cat head mkfifo sleep seq") {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "go-on"), 0o600); err != nil {
		t.Fatal(err)
	}
	return executor.Process{
		ID: id, Root: []mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind"}}}, Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}, Cwd: "/",
	}, root
}

// reading returns what reads the log of a step as it grows.
func reading(t testing.TB, stdout, stderr io.Writer) func(steplog.Extent) {
	log, off := new(steplog.Log), int64(0)
	t.Cleanup(func() { log.Close() }) // it was read only
	return func(x steplog.Extent) {
		if err := log.Grow(x); err != nil {
			t.Error(err)
			return
		}
		for {
			c, next, err := log.Next(off)
			if errors.Is(err, io.EOF) {
				return
			}
			var data []byte
			if err == nil {
				data, err = log.Data(c, c.Size)
			}
			if err != nil {
				t.Error(err)
				return
			}
			[]io.Writer{1: stdout, 2: stderr}[c.Stream].Write(data)
			off = next
		}
	}
}

// goOn has the process in root that reads /go-on read to its end.
func goOn(t testing.TB, root string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(root, "go-on"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// heard is a writer that tells when a word has been written.
type heard struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	word string
	seen chan struct{}
}

func listen(word string) *heard { return &heard{word: word, seen: make(chan struct{})} }

func (h *heard) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := strings.Contains(h.buf.String(), h.word)
	h.buf.Write(p)
	if !before && strings.Contains(h.buf.String(), h.word) {
		close(h.seen)
	}
	return len(p), nil
}

func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.buf.String()
}

func TestRun(t *testing.T) {
	c := newClient(t, testConfig(t))
	for i, tc := range []struct {
		script, stdout, stderr string
		code                   int
		cause                  executor.CauseKind
	}{
		{script: "echo a; echo b >&2", stdout: "a\n", stderr: "b\n"},
		{script: "exit 7", code: 7},
		{script: "nonesuch", code: 127, stderr: "sh: nonesuch: not found\n", cause: executor.CauseNoProgram},
		{script: "printf '\\377\\000x'", stdout: "\xff\x00x"},
	} {
		p, _ := newProcess(t, fmt.Sprint("run", i), tc.script)
		p.Env = append(p.Env, "BYTES=\xff\xfe")
		var out, errs bytes.Buffer
		usage, done, err := c.Run(context.Background(), p, nil, reading(t, &out, &errs))
		var exit *executor.ExitError
		if tc.code != 0 && (!errors.As(err, &exit) || exit.Code != tc.code || exit.Cause.Kind != tc.cause) || tc.code == 0 && err != nil {
			t.Errorf("%s: %v", tc.script, err)
		}
		if out.String() != tc.stdout || errs.String() != tc.stderr || usage.MemoryPeak > 0 != cgrouptest.CountsPeak(t) {
			t.Errorf("%s: stdout %q, stderr %q, usage %+v", tc.script, out.String(), errs.String(), usage)
		}
		if (done == nil) != (err != nil) {
			t.Errorf("%s: done %v", tc.script, done == nil)
		}
		if done != nil {
			done()
		}
	}
	p, _ := newProcess(t, "bad", "true")
	p.Root[0].Source = "/no/such/root"
	if _, _, err := c.Run(context.Background(), p, nil, nil); !errors.Is(err, unix.ENOENT) {
		t.Errorf("of a root that isn't there: %v", err)
	}
}

func TestCancel(t *testing.T) {
	c := newClient(t, testConfig(t))
	p, _ := newProcess(t, "cancel", "echo ready; cat /go-on")
	out := listen("ready")
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("not wanted any more")
	go func() {
		<-out.seen
		cancel(cause)
	}()
	if _, _, err := c.Run(ctx, p, nil, reading(t, out, io.Discard)); !errors.Is(err, cause) {
		t.Errorf("error %v", err)
	}
}

// leave has a client leave a step that has printed ready.
func leave(t *testing.T, cfg Config, p executor.Process, note string) {
	t.Helper()
	c := New(cfg)
	out := listen("ready")
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-out.seen
		c.Leave()
		cancel()
	}()
	if _, _, err := c.Run(ctx, p, []byte(note), reading(t, out, io.Discard)); !errors.Is(err, ErrLeft) {
		t.Errorf("run: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// patience ends a little before the tests' own time does. What never happens is
// told then, and a machine that is busy or slow takes as long as it takes.
func patience(t *testing.T) context.Context {
	deadline, ok := t.Deadline()
	if !ok {
		return t.Context()
	}
	ctx, cancel := context.WithDeadline(t.Context(), deadline.Add(-5*time.Second))
	t.Cleanup(cancel)
	return ctx
}

// empty waits until no supervisor is left in dir.
func empty(t *testing.T, dir string) {
	t.Helper()
	ctx := patience(t)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the supervisor hasn't ended: %s\n%s", entries[0].Name(), lastLines(filepath.Join(dir, entries[0].Name())))
		case <-tick.C:
		}
	}
}

// A step outlives its daemon; the next one finds it, gets its log from the start
// and its status, whether it asks before or after its end.
func TestStepOutlivesDaemon(t *testing.T) {
	for _, when := range []string{"while it runs", "after its end"} {
		t.Run(when, func(t *testing.T) {
			cfg := testConfig(t)
			p, root := newProcess(t, "long", "echo ready; echo warned >&2; cat /go-on; echo went on; : > /ended; exit 5")
			leave(t, cfg, p, "the note")
			found, err := Find(cfg.Dir, cfg.Executor)
			if err != nil || len(found) != 1 || len(found[0].Steps) != 1 || string(found[0].Steps[0].Note) != "the note" {
				t.Fatalf("found %+v, %v", found, err)
			}
			if when == "after its end" {
				goOn(t, root)
			}
			var out, errs bytes.Buffer
			type result struct {
				usage executor.Usage
				err   error
			}
			ended := make(chan result, 1)
			go func() {
				u, _, err := found[0].Attach(context.Background(), "long", reading(t, &out, &errs))
				ended <- result{u, err}
			}()
			if when == "while it runs" {
				goOn(t, root)
			}
			r := <-ended
			var exit *executor.ExitError
			if !errors.As(r.err, &exit) || exit.Code != 5 || r.usage.MemoryPeak > 0 != cgrouptest.CountsPeak(t) {
				t.Errorf("ended with %v, usage %+v", r.err, r.usage)
			}
			if out.String() != "ready\nwent on\n" || errs.String() != "warned\n" {
				t.Errorf("stdout %q, stderr %q", out.String(), errs.String())
			}
			empty(t, cfg.Dir)
			if _, _, err := found[0].Attach(context.Background(), "long", nil); !errors.Is(err, ErrUnclaimed) {
				t.Errorf("attach to what isn't there: %v", err)
			}
		})
	}
}

// A daemon that has gone on with a step leaves it again to the next one, and ends
// it if it is told to.
func TestStepIsLeftAgain(t *testing.T) {
	cfg := testConfig(t)
	p, root := newProcess(t, "long", "echo ready; cat /go-on; echo went on")
	leave(t, cfg, p, "the note")
	find := func() *Earlier {
		t.Helper()
		found, err := Find(cfg.Dir, cfg.Executor)
		if err != nil || len(found) != 1 || len(found[0].Steps) != 1 {
			t.Fatalf("found %+v, %v", found, err)
		}
		return found[0]
	}
	for range 2 {
		e := find()
		ctx, cancel := context.WithCancel(context.Background())
		out := listen("ready")
		go func() {
			<-out.seen
			e.Leave()
			cancel()
		}()
		if _, _, err := e.Attach(ctx, "long", reading(t, out, io.Discard)); !errors.Is(err, ErrLeft) {
			t.Errorf("attach: %v", err)
		}
	}
	last := find()
	var out bytes.Buffer
	goOn(t, root)
	_, done, err := last.Attach(context.Background(), "long", reading(t, &out, io.Discard))
	if err != nil || out.String() != "ready\nwent on\n" {
		t.Errorf("ended with %v, printed %q", err, out.String())
	}
	if done != nil {
		done()
	}
	empty(t, cfg.Dir)

	p, _ = newProcess(t, "long", "echo ready; cat /go-on")
	leave(t, cfg, p, "the note")
	last = find()
	last.Leave()
	if err := last.End(context.Background(), "long"); err != nil {
		t.Error(err)
	}
	empty(t, cfg.Dir)
	if err := last.End(context.Background(), "long"); err != nil {
		t.Errorf("end what has ended: %v", err)
	}
}

// A step that nobody asks for ends after a while, and with it its supervisor.
func TestUnclaimed(t *testing.T) {
	for name, script := range map[string]string{"runs": "echo ready; cat /go-on", "has ended": "echo ready"} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			cfg.Unclaimed = 50 * time.Millisecond
			p, _ := newProcess(t, "long", script)
			if name == "runs" {
				leave(t, cfg, p, "")
			} else {
				// Its daemon dies before it has made safe what the step made.
				c := New(cfg)
				proc, err := c.use(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				cn, err := proc.conn()
				if err != nil {
					t.Fatal(err)
				}
				f := &follower{conn: cn, leaving: &c.leaving, printed: reading(t, io.Discard, io.Discard)}
				if _, _, err := f.follow(context.Background(), request{Run: &runRequest{Process: p}}); err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(cn.Close(), proc.life.Close()); err != nil {
					t.Fatal(err)
				}
			}
			empty(t, cfg.Dir)
		})
	}
}

// A daemon that doesn't read doesn't hold a step up: it ends, with all of its
// output stored for whoever asks later.
func TestStepDoesNotWaitForDaemon(t *testing.T) {
	cfg := testConfig(t)
	const printed = 32 << 20
	p, root := newProcess(t, "much", fmt.Sprintf("cat /dev/zero | head -c %d; : > /ended; cat /go-on; echo end", printed))
	c := New(cfg)
	end := make(chan error, 1)
	stuck := make(chan struct{})
	reads := false
	var out bytes.Buffer
	read := reading(t, &out, io.Discard)
	go func() {
		_, done, err := c.Run(context.Background(), p, nil, func(x steplog.Extent) {
			if !reads { // once, at the first output, and for all of it
				<-stuck
				reads = true
			}
			read(x)
		})
		if err == nil {
			done()
		}
		end <- err
	}()
	ctx := patience(t)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(filepath.Join(root, "ended")); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatal("the step waits for a daemon that doesn't read")
		case <-tick.C:
		}
	}
	close(stuck)
	goOn(t, root)
	if err := <-end; err != nil {
		t.Error(err)
	}
	if out.Len() != printed+len("end\n") || !strings.HasSuffix(out.String(), "\x00end\n") {
		t.Errorf("%d bytes were stored", out.Len())
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// What a supervisor leaves that was killed is cleaned up.
func TestSupervisorIsKilled(t *testing.T) {
	cfg := testConfig(t)
	c := New(cfg)
	p, _ := newProcess(t, "long", "echo ready; cat /go-on")
	out := listen("ready")
	go func() {
		<-out.seen
		c.proc.cmd.Process.Kill()
	}()
	if _, _, err := c.Run(context.Background(), p, nil, reading(t, out, io.Discard)); err == nil || !strings.Contains(err.Error(), "the supervisor has ended, and the step with it: it was killed") {
		t.Errorf("run: %v", err)
	}
	<-c.proc.gone
	q, _ := newProcess(t, "next", "exit 0")
	if _, done, err := c.Run(context.Background(), q, nil, nil); err != nil {
		t.Errorf("with another supervisor: %v", err)
	} else {
		done()
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	found, err := Find(cfg.Dir, cfg.Executor)
	if err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
	empty(t, cfg.Dir)
}
