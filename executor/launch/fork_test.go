//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"unsafe"

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

// A program that forks again goes on in the second process, which leads a
// session and is a child of this one.
func TestRefork(t *testing.T) {
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p := new(Program)
	p.Stage("again")
	p.Refork(unix.CLONE_NEWPID | unix.CLONE_NEWUTS)
	p.Stage("stdio")
	p.Call("stdout", unix.SYS_DUP3, w.Fd(), 1, 0)
	p.Stage("exec")
	p.Call("busybox", unix.SYS_EXECVE, p.String("/bin/busybox"), p.Strings([]string{"sh", "-c", "echo $$; exec /bin/busybox sleep 1000"}), p.Strings(nil))
	child, err := Fork(p, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	pid := make([]byte, 8)
	if n, err := out.Read(pid); err != nil || string(pid[:n]) != "1\n" {
		t.Errorf("it says that its pid is %q, %v", pid[:n], err)
	}
	if sid, err := unix.Getsid(child.Pid); err != nil || sid != child.Pid {
		t.Errorf("session %d of process %d, %v", sid, child.Pid, err)
	}
	if err := errors.Join(child.Err(), child.Signal(unix.SIGKILL)); err != nil {
		t.Error(err)
	}
	if s, err := child.Wait(context.Background(), 0); err != nil || s.Code() != 137 {
		t.Errorf("status %v, %v", s, err)
	}
	if err := child.Forget(); err != nil {
		t.Error(err)
	}
}

// What fails before the second process is there fails Fork.
func TestReforkFails(t *testing.T) {
	p := new(Program)
	p.Stage("before")
	p.Call("/nowhere", unix.SYS_CHDIR, p.String("/nowhere"))
	p.Refork(0)
	var step *StepError
	if _, err := Fork(p, 0); !errors.As(err, &step) || step.What != "/nowhere" {
		t.Errorf("error %v", err)
	}
}

// A child under a filter that refuses whatever it does, its exit as well, ends.
func TestForkMayNotExit(t *testing.T) {
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.EPERM)}} // SECCOMP_RET_ERRNO
	p := new(Program)
	p.Stage("filter")
	p.Call("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1)
	code := p.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&filter[0])), unsafe.Sizeof(filter[0])))
	p.Call("filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, p.Words(uintptr(len(filter)), code))
	p.Call("pid", unix.SYS_GETPID)
	child, err := Fork(p, 0)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := child.Wait(context.Background(), 0); err != nil || s.Code() < 128 {
		t.Errorf("status %v, %v", s, err)
	}
	var step *StepError
	if err := child.Err(); !errors.As(err, &step) || step.What != "pid" || step.Errno != unix.EPERM {
		t.Errorf("error %v", err)
	}
	if err := child.Forget(); err != nil {
		t.Error(err)
	}
}
