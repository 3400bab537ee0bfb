//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a child that executed its program. Wait must be called once.
type Process struct {
	Pid   int
	pidfd *os.File // non-blocking, so that waiting costs no thread
}

func newProcess(pid, pidfd int) (*Process, error) {
	if _, err := unix.FcntlInt(uintptr(pidfd), unix.F_SETFL, unix.O_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("make pidfd of %d non-blocking: %w", pid, err), unix.Close(pidfd))
	}
	return &Process{Pid: pid, pidfd: os.NewFile(uintptr(pidfd), fmt.Sprintf("pidfd:%d", pid))}, nil
}

// Child is a child of this process that something else has started.
func Child(pid int) (*Process, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return newProcess(pid, pidfd)
}

// Status is how a process ended and what it and the descendants that were
// waited for used.
type Status struct {
	unix.WaitStatus
	CPU time.Duration
}

// Code is the exit code as a shell gives it: 128+n for signal n.
func (s Status) Code() int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// ErrTimeout: the process has not ended when the deadline passed.
var ErrTimeout = errors.New("process still runs")

// Wait waits until the process ends. It returns ErrTimeout if it hasn't within
// limit, where 0 is no limit, and the cause if ctx ends first; then Wait has to be called again.
func (p *Process) Wait(ctx context.Context, limit time.Duration) (Status, error) {
	var deadline time.Time
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	if err := p.pidfd.SetReadDeadline(deadline); err != nil {
		return Status{}, fmt.Errorf("set deadline on pidfd of %d: %w", p.Pid, err)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		p.pidfd.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // it worked above; the wait goes on otherwise
	})
	status, err := p.wait()
	if !stop() {
		<-interrupted // so that a late deadline can't hit the next Wait
	}
	switch {
	case err == nil:
		return status, p.pidfd.Close()
	case errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil:
		return Status{}, context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return Status{}, ErrTimeout
	}
	return Status{}, fmt.Errorf("wait for process %d: %w", p.Pid, err)
}

func (p *Process) wait() (status Status, err error) {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return Status{}, err
	}
	pollErr := raw.Read(func(uintptr) bool {
		var ru unix.Rusage
		var pid int
		for {
			pid, err = unix.Wait4(p.Pid, &status.WaitStatus, unix.WNOHANG, &ru)
			if err != unix.EINTR {
				break
			}
		}
		status.CPU = time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
		return err != nil || pid != 0
	})
	return status, errors.Join(err, pollErr)
}

// Signal sends sig; a process that has ended already is fine.
func (p *Process) Signal(sig unix.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	if raw.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), sig, nil, 0) }) != nil {
		return nil // closed: it was waited for
	}
	if errors.Is(err, unix.ESRCH) {
		err = nil
	}
	return err
}
