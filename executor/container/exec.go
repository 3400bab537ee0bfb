//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/thread"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ExecOptions are how to run a further process.
type ExecOptions struct {
	IO
	Cgroups map[string]string // by controller, below the container's; "" is all others
	Paused  bool              // allow it in a paused container, where it waits
}

// Exec executes p in the container.
func (c *Container) Exec(ctx context.Context, p *specs.Process, o ExecOptions) (*Process, error) {
	allowed := []Status{Created, Running}
	if o.Paused {
		allowed = append(allowed, Paused)
	}
	if status, err := c.in("exec in", allowed...); err != nil {
		if status == Paused {
			return nil, errors.New("cannot exec in a paused container (use --ignore-paused to override)")
		}
		return nil, err
	}
	if err := CheckProcess(p); err != nil {
		return nil, err
	}
	if err := checkIO(p, o.IO); err != nil {
		return nil, err
	}
	s, err := c.setup(p, o.IO)
	if err != nil {
		return nil, err
	}
	return c.enter(ctx, s, o.Cgroups)
}

// enter starts the process of s in the container's namespaces and cgroups.
func (c *Container) enter(ctx context.Context, s *native.Setup, cgroups map[string]string) (p *Process, err error) {
	pidfd, err := c.open()
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	// The thread makes children in the container's PID namespace from then on.
	thread.Run(func() { p, err = c.enterHere(ctx, s, pidfd, cgroups) })
	return p, err
}

func (c *Container) enterHere(ctx context.Context, s *native.Setup, pidfd *os.File, cgroups map[string]string) (_ *Process, err error) {
	var undo, done cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run(), done.Run()) }()
	child, err := native.Enter(s, native.Target{Pid: c.Pid, PidFD: pidfd})
	if err != nil {
		return nil, err
	}
	done.Add(child.Detach)
	p := &Process{Process: child.Process}
	undo.Add(p.end)
	if err := c.Groups.join(p.Pid, cgroups); err != nil {
		return nil, err
	}
	if err := protect(p.Pid, s.Spec.Process.OOMScoreAdj); err != nil {
		return nil, err
	}
	if err := child.Execute(ctx); err != nil { // in a paused container it waits until that is resumed
		return nil, err
	}
	undo.Keep()
	return p, nil
}

// open opens the container's first process, and makes sure that it is the one.
func (c *Container) open() (*os.File, error) {
	fd, err := unix.PidfdOpen(c.Pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil, &StatusError{Op: "enter", ID: c.ID, Status: Stopped}
		}
		return nil, fmt.Errorf("open process %d of container %s: %w", c.Pid, c.ID, err)
	}
	f := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", c.Pid))
	alive, err := c.alive()
	if err == nil && !alive {
		err = &StatusError{Op: "enter", ID: c.ID, Status: Stopped}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
