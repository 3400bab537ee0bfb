//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newLauncher(t testing.TB) *Launcher {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces")
	}
	l, err := New(2, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// busybox adds the steps that make a directory with busybox the root.
func busybox(t testing.TB, p *Program) {
	t.Helper()
	root := t.TempDir()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "busybox"), bin, 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, root, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		t.Fatal(err)
	}
	p.Stage("root")
	dot := p.String(".")
	p.Call("move", unix.SYS_MOVE_MOUNT, uintptr(fd), p.String(""), atCWD, p.String(Staging), unix.MOVE_MOUNT_F_EMPTY_PATH)
	p.Call("enter", unix.SYS_FCHDIR, uintptr(fd))
	p.Call("pivot", unix.SYS_PIVOT_ROOT, dot, dot)
	p.Call("detach", unix.SYS_UMOUNT2, dot, unix.MNT_DETACH)
}

const atCWD = ^uintptr(99) // AT_FDCWD, -100

func exec(p *Program, args ...string) {
	p.Stage("exec")
	p.Call(args[0], unix.SYS_EXECVE, p.String("/busybox"), p.Strings(args), p.Strings([]string{"A=b"}))
}

var newNS = Options{Namespaces: unix.CLONE_NEWNS | unix.CLONE_NEWPID, CgroupFD: -1}

func TestRun(t *testing.T) {
	l := newLauncher(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := new(Program)
	busybox(t, p)
	p.Stage("stdio")
	p.Call("stdout", unix.SYS_DUP3, w.Fd(), 1, 0)
	exec(p, "sh", "-c", "echo $A $$; exit 7")
	proc, err := l.Launch(context.Background(), p, newNS)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != "b 1\n" {
		t.Errorf("output %q", out)
	}
	status, err := proc.Wait(context.Background(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if status.Code() != 7 {
		t.Errorf("exit code %d, want 7", status.Code())
	}
	var names []string
	for _, s := range p.Times() {
		names = append(names, s.Stage)
	}
	if len(names) != 2 { // exec leaves no result
		t.Errorf("stages with times: %v", names)
	}
}

func TestFailureNamesStage(t *testing.T) {
	l := newLauncher(t)
	p := new(Program)
	p.Stage("fine")
	p.Call("pid", unix.SYS_GETPID)
	p.Stage("mount")
	p.Call("/nowhere", unix.SYS_MOUNT, p.String("x"), p.String("/nowhere"), p.String("tmpfs"))
	exec(p, "true")
	_, err := l.Launch(context.Background(), p, newNS)
	var step *StepError
	if !errors.As(err, &step) || step.Stage != "mount" || step.What != "/nowhere" || step.Errno != unix.ENOENT {
		t.Fatalf("error %v", err)
	}
}

func TestStepKinds(t *testing.T) {
	l := newLauncher(t)
	nowhere := func(p *Program) Step { return p.Call("/nowhere", unix.SYS_CHDIR, p.String("/nowhere")) }
	for name, tc := range map[string]struct {
		build func(p *Program)
		fails bool
	}{
		"tolerated":     {build: func(p *Program) { nowhere(p).Tolerate(unix.EACCES, unix.ENOENT) }},
		"not tolerated": {build: func(p *Program) { nowhere(p).Tolerate(unix.EACCES) }, fails: true},
		"skipped": {build: func(p *Program) {
			p.Call("", unix.SYS_GETPID).Skip(2)
			nowhere(p)
			nowhere(p)
		}},
		"skip is only on success": {build: func(p *Program) {
			nowhere(p).Tolerate(unix.ENOENT).Skip(1)
			nowhere(p)
		}, fails: true},
		"zero":     {build: func(p *Program) { p.Call("", unix.SYS_UMASK, 0); p.Call("", unix.SYS_UMASK, 0).MustBeZero() }},
		"not zero": {build: func(p *Program) { p.Call("", unix.SYS_GETPID).MustBeZero() }, fails: true},
		"result fed to a later step": {build: func(p *Program) {
			open := p.Call("/", unix.SYS_OPENAT, atCWD, p.String("/"), unix.O_PATH|unix.O_DIRECTORY)
			open.Into(p.Call("", unix.SYS_FCHDIR, ^uintptr(0)), 0)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := new(Program)
			p.Stage("test")
			tc.build(p)
			busybox(t, p)
			exec(p, "true")
			proc, err := l.Launch(context.Background(), p, newNS)
			if tc.fails {
				var step *StepError
				if !errors.As(err, &step) || step.Stage != "test" {
					t.Fatalf("error %v, want one of stage test", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s, err := proc.Wait(context.Background(), 0); err != nil || s.Code() != 0 {
				t.Fatalf("%v, code %d", err, s.Code())
			}
		})
	}
}

func TestNotExecuted(t *testing.T) {
	l := newLauncher(t)
	p := new(Program)
	p.Stage("exec")
	for _, path := range []string{"/a", "/root"} {
		p.Call(path, unix.SYS_EXECVE, p.String(path), p.Strings(nil), p.Strings(nil)).Tolerate(unix.ENOENT, unix.EACCES)
	}
	_, err := l.Launch(context.Background(), p, newNS)
	if !errors.Is(err, ErrNotExecuted) {
		t.Fatalf("error %v", err)
	}
	if r := p.Results("exec"); len(r) != 2 || r[0] != unix.ENOENT || r[1] != unix.EACCES {
		t.Errorf("results %v", r)
	}
}

// A child that hangs in a step dies when the context ends.
func TestCancelWhileSettingUp(t *testing.T) {
	l := newLauncher(t)
	p := new(Program)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	buf := make([]byte, 1)
	p.Stage("hang")
	p.Call("tell", unix.SYS_WRITE, w.Fd(), p.Bytes([]byte{1}), 1)
	p.Call("ppoll", unix.SYS_PPOLL)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		r.Read(buf)
		cancel()
	}()
	l.grace = time.Millisecond
	if _, err := l.Launch(ctx, p, newNS); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
}

func TestWait(t *testing.T) {
	l := newLauncher(t)
	p := new(Program)
	busybox(t, p)
	exec(p, "sleep", "1000")
	proc, err := l.Launch(context.Background(), p, newNS)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	cancel(cause)
	if _, err := proc.Wait(ctx, 0); err != cause {
		t.Errorf("wait with an ended context: %v", err)
	}
	if _, err := proc.Wait(context.Background(), time.Millisecond); err != ErrTimeout {
		t.Errorf("wait with a limit: %v", err)
	}
	if err := proc.Signal(unix.SIGKILL); err != nil {
		t.Error(err)
	}
	s, err := proc.Wait(context.Background(), 0)
	if err != nil || s.Code() != 137 {
		t.Errorf("%v, code %d", err, s.Code())
	}
}

func TestLayout(t *testing.T) {
	var s step
	var o outcome
	if stepSize != 104 || unsafe.Offsetof(s.tolerate) != 56 || unsafe.Offsetof(s.next) != 64 || unsafe.Offsetof(s.store) != 72 ||
		unsafe.Offsetof(s.mustZero) != 80 || unsafe.Offsetof(s.result) != 88 || unsafe.Offsetof(s.ticks) != 96 || unsafe.Offsetof(o.start) != 8 ||
		unsafe.Sizeof(cloneArgs{}) != 88 {
		t.Error("the assembly knows another layout of step, outcome or cloneArgs")
	}
}

func BenchmarkLaunch(b *testing.B) {
	l := newLauncher(b)
	for b.Loop() {
		p := new(Program)
		busybox(b, p)
		exec(p, "true")
		proc, err := l.Launch(context.Background(), p, newNS)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := proc.Wait(context.Background(), 0); err != nil {
			b.Fatal(err)
		}
	}
}
