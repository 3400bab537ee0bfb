//go:build linux && (amd64 || arm64)

package executor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

// builtinContainer is a container of the built-in runtime.
type builtinContainer struct {
	*builtin
	*shared
	group *cgroup.Group
	first *launch.Process
	stop  context.CancelCauseFunc // ends ctx, for the further processes; Run's own goes on

	mounts string // name of the mount namespace
}

// running is one process of a container.
type running struct {
	*builtinContainer
	proc *launch.Process
	io   *stdio
}

func (r *running) Signal(sig unix.Signal) error {
	if err := r.proc.Signal(sig); err != nil {
		return fmt.Errorf("send signal %d: %w", sig, err)
	}
	return nil
}

func (r *running) Resize(rows, cols uint16) error { return r.io.resize(rows, cols) }

// end is called when the process has ended, and waits for its output to be
// handed over. With the first process of a container the others have ended, too,
// and are waited for.
func (r *running) end(ctx context.Context) error {
	var left error
	if r.proc == r.first {
		r.shut()
		if r.machinePIDs {
			r.stop(ErrEnded)
			left = endAmong(r.mounts)
		}
		r.execs.Wait()
	}
	return errors.Join(left, r.io.ended(ctx))
}

func (c *builtinContainer) exec(ctx context.Context, t *task) (exit exit, err error) {
	p := t.p
	io, err := newStdio(p)
	if err != nil {
		return exit, err
	}
	proc, err := c.join(ctx, p, io)
	if err != nil {
		notExecuted(p, err)
		return exit, errors.Join(err, io.abort())
	}
	return exit, c.attend(ctx, &running{c, proc, io}, p.Started, &exit)
}

// join starts a further process.
func (c *builtinContainer) join(ctx context.Context, p Process, io *stdio) (proc *launch.Process, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	user, err := rootfs.New(c.task.root.FD()).User(p.User)
	if err != nil {
		return nil, err
	}
	own, err := makeSpec(p, user, nil, c.confinement)
	if err != nil {
		return nil, err
	}
	spec := *c.task.spec
	spec.Process = own.Process
	s := &native.Setup{Spec: &spec, Keyring: "_ses." + c.task.p.ID, Terminal: native.Terminal{Socket: io.console}}
	if own.Linux.Seccomp != nil {
		s.Filter = c.filter
	}
	if io.console == nil {
		if s.Stdio, err = io.files(&undo); err != nil {
			return nil, fmt.Errorf("copy streams: %w", err)
		}
	}
	// The thread makes children in the container's PID namespace from then on.
	thread.Run(func() { proc, err = c.joinHere(ctx, s) })
	return proc, err
}

// target is the first process, with a file of its own: to use that of the
// process by number would make it blocking.
func (c *builtinContainer) target() (native.Target, error) {
	raw, err := c.first.PidFD().SyscallConn()
	if err != nil {
		return native.Target{}, ErrEnded
	}
	var fd int
	if raw.Control(func(own uintptr) { fd, err = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 3) }) != nil {
		return native.Target{}, ErrEnded // closed, since it was waited for
	}
	if err != nil {
		return native.Target{}, fmt.Errorf("copy pidfd: %w", err)
	}
	return native.Target{Pid: c.first.Pid, PidFD: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// joinHere starts the process of s on the calling thread, with whose end it
// ends until it executes its program.
func (c *builtinContainer) joinHere(ctx context.Context, s *native.Setup) (_ *launch.Process, err error) {
	var undo, done cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run(), done.Run()) }()
	target, err := c.target()
	if err != nil {
		return nil, err
	}
	done.Add(target.PidFD.Close)
	child, err := native.Enter(s, target)
	if err != nil {
		return nil, err
	}
	done.Add(child.Detach)
	undo.Add(func() error {
		err := child.Signal(unix.SIGKILL)
		_, werr := child.Wait(context.WithoutCancel(ctx), killTimeout)
		return errors.Join(err, werr)
	})
	if err := c.group.Join(child.Pid); err != nil {
		return nil, err
	}
	if err := child.Execute(ctx); err != nil {
		return nil, err
	}
	undo.Keep()
	return child.Process, nil
}
