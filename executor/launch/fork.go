//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Forked is a child with memory of its own.
type Forked struct {
	*Process
	p      *Program
	shared []byte // steps and outcome
}

// Fork starts p in a new process that has a copy of this process's memory and
// files, and returns at once. namespaces are CLONE_NEW* flags. The child is a
// child of the calling thread as far as PR_SET_PDEATHSIG is concerned, and is
// in the namespaces that the thread is in.
//
// Its program should end with an execve; before that it may wait in a step, for
// as long as it likes, whether this process lives or not.
func Fork(p *Program, namespaces uint64) (*Forked, error) {
	p.end()
	size := len(p.steps)*int(stepSize) + int(unsafe.Sizeof(outcome{}))
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map memory for a program: %w", err)
	}
	steps := unsafe.Slice((*step)(unsafe.Pointer(&mem[0])), len(p.steps))
	copy(steps, p.steps)
	p.steps = steps
	p.out = (*outcome)(unsafe.Pointer(&mem[len(steps)*int(stepSize)]))
	p.out.pidfd = -1
	if p.again != nil {
		p.again.parentTID = uint64(uintptr(unsafe.Pointer(&p.out.second)))
	}
	p.link()
	p.args = &cloneArgs{
		flags:      unix.CLONE_CLEAR_SIGHAND | unix.CLONE_PIDFD | namespaces,
		pidfd:      uint64(uintptr(unsafe.Pointer(&p.out.pidfd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	pid := clone(p.args, &p.steps[0], p.out)
	runtime.KeepAlive(p)
	if pid < 0 {
		return nil, errors.Join(fmt.Errorf("clone: %w", unix.Errno(-pid)), unix.Munmap(mem))
	}
	proc, err := newProcess(int(pid), int(p.out.pidfd))
	if err != nil {
		return nil, errors.Join(err, unix.Kill(int(pid), unix.SIGKILL), unix.Munmap(mem))
	}
	if p.again != nil {
		if proc, err = p.second(proc); err != nil {
			return nil, errors.Join(err, unix.Munmap(mem))
		}
	}
	return &Forked{Process: proc, p: p, shared: mem}, nil
}

// Refork adds steps by which a program that is forked goes on in another
// process, in new namespaces, and the one so far ends. It is for namespaces that
// have to belong to a user namespace that the first process has joined: a
// thread of this process can't join one, and a process can't enter a new PID
// namespace itself. The other process is a child of this one, too, and leads a
// session.
func (p *Program) Refork(namespaces uint64) {
	p.again = &cloneArgs{flags: unix.CLONE_PARENT | unix.CLONE_PARENT_SETTID | unix.CLONE_CLEAR_SIGHAND | namespaces}
	// Who leads a session already can't begin one: so each knows who it is.
	p.Call("setsid", unix.SYS_SETSID)
	p.Call("clone", unix.SYS_CLONE3, uintptr(unsafe.Pointer(p.again)), unsafe.Sizeof(*p.again))
	p.Call("setsid", unix.SYS_SETSID).Tolerate(unix.EPERM).Skip(1)
	p.Call("end", unix.SYS_EXIT_GROUP, 0)
}

// reforkTimeout is how long a process may take to its Refork, which is a few
// system calls.
const reforkTimeout = 30 * time.Second

// second waits for the end of the first process and returns the second.
func (p *Program) second(first *Process) (*Process, error) {
	ctx := context.Background()
	_, err := first.Wait(ctx, reforkTimeout)
	if errors.Is(err, ErrTimeout) {
		err = errors.Join(fmt.Errorf("clone: %w", err), first.Signal(unix.SIGKILL))
		_, werr := first.Wait(ctx, 0)
		err = errors.Join(err, werr)
	}
	pid := int(atomic.LoadInt32(&p.out.second))
	if pid == 0 {
		if err == nil {
			err = p.err()
		}
		if err == nil {
			err = errors.New("clone: the process was killed before it")
		}
		return nil, err
	}
	if err != nil {
		return nil, errors.Join(err, unix.Kill(pid, unix.SIGKILL))
	}
	// It is this process's child, so its number stays its own until it is
	// waited for.
	return Child(pid)
}

// Err says what failed so far: a *StepError, ErrNotExecuted, or nil.
func (f *Forked) Err() error { return f.p.err() }

// Results is Program.Results, as far as the child got.
func (f *Forked) Results(stage string) []unix.Errno { return f.p.Results(stage) }

// Forget lets go of the results; the process goes on.
func (f *Forked) Forget() error {
	f.p.steps, f.p.out = nil, nil
	return unix.Munmap(f.shared)
}

// Release closes what waiting needs, of a process that somebody else waits for.
func (p *Process) Release() error { return p.pidfd.Close() }

// PidFD is the open pidfd; it stays the process's.
func (p *Process) PidFD() *os.File { return p.pidfd }
