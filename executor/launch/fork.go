//go:build linux && (amd64 || arm64)

package launch

import (
	"errors"
	"fmt"
	"os"
	"runtime"
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
	return &Forked{Process: proc, p: p, shared: mem}, nil
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
