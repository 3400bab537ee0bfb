//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A forked child waits in a step while its parent goes on, and its results are
// seen here.
func TestForkWaits(t *testing.T) {
	gate, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(gate[0])
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := new(Program)
	p.Stage("gate")
	p.Call("tell", unix.SYS_WRITE, uintptr(gate[1]), p.Bytes([]byte{1}), 1)
	wait := p.Call("wait", unix.SYS_READ, uintptr(gate[1]), p.Bytes(make([]byte, 1)), 1)
	p.Stage("stdio")
	p.Call("stdout", unix.SYS_DUP3, w.Fd(), 1, 0)
	p.Stage("exec")
	p.Call("busybox", unix.SYS_EXECVE, p.String("/bin/busybox"), p.Strings([]string{"sh", "-c", "echo $A; exit 3"}), p.Strings([]string{"A=b"}))
	child, err := Fork(p, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	unix.Close(gate[1])
	buf := make([]byte, 1)
	if n, err := unix.Read(gate[0], buf); n != 1 || err != nil {
		t.Fatalf("read %d, %v", n, err)
	}
	if wait.Ran() {
		t.Error("the child didn't wait")
	}
	if _, err := unix.Write(gate[0], buf); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(out)
	if err != nil || string(text) != "b\n" {
		t.Errorf("output %q, %v", text, err)
	}
	if !wait.Ran() || child.Err() != nil {
		t.Errorf("after the gate: ran %v, error %v", wait.Ran(), child.Err())
	}
	if s, err := child.Wait(context.Background(), 0); err != nil || s.Code() != 3 {
		t.Errorf("status %v, %v", s, err)
	}
	if err := child.Forget(); err != nil {
		t.Error(err)
	}
}

func TestForkFailureNamesStage(t *testing.T) {
	p := new(Program)
	p.Stage("enter")
	open := p.Call("/", unix.SYS_OPENAT, atCWD, p.String("/"), unix.O_PATH|unix.O_DIRECTORY)
	open.Into(p.Call("", unix.SYS_FCHDIR, ^uintptr(0)), 0)
	p.Call("/nowhere", unix.SYS_CHDIR, p.String("/nowhere"))
	child, err := Fork(p, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := child.Wait(context.Background(), 0); err != nil {
		t.Fatal(err)
	}
	var step *StepError
	if err := child.Err(); !errors.As(err, &step) || step.What != "/nowhere" || step.Errno != unix.ENOENT {
		t.Errorf("error %v", err)
	}
	if err := child.Forget(); err != nil {
		t.Error(err)
	}
}
