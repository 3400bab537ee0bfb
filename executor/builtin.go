//go:build linux && (amd64 || arm64)

package executor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/executor/seccomp"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"golang.org/x/sys/unix"
)

// killTimeout is how long a killed process may take to end: only one that the
// kernel holds, for example on a dead disk, takes longer than milliseconds.
const killTimeout = 30 * time.Second

// builtin is the built-in runtime.
type builtin struct {
	launcher *launch.Launcher
	cgroups  *cgroup.Manager
	confinement
	open   openView
	filter []unix.SockFilter // of confined processes
	alive  int               // pidfd of this process
	grace  time.Duration
}

func newBuiltin(cfg Config, cgroups *cgroup.Manager, confined confinement, open openView) (_ *builtin, err error) {
	profile, err := seccompProfile()
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	b := &builtin{cgroups: cgroups, confinement: confined, open: open, grace: cfg.Grace}
	if b.filter, err = seccomp.Compile(profile); err != nil {
		return nil, fmt.Errorf("compile seccomp profile: %w", err)
	}
	// A thread is suspended while its child is being set up.
	threads := min(max(runtime.NumCPU(), 2), 8)
	if b.launcher, err = launch.New(threads, cfg.Root); err != nil {
		return nil, err
	}
	if b.alive, err = unix.PidfdOpen(os.Getpid(), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("open own pidfd: %w", err), b.launcher.Close())
	}
	return b, nil
}

func (b *builtin) close() error {
	return errors.Join(b.launcher.Close(), unix.Close(b.alive))
}

func (b *builtin) opener(Process, *cleanup.Stack) (openView, error) { return b.open, nil }

func (b *builtin) run(ctx context.Context, t *task) (exit exit, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	group, err := b.cgroups.Take(ctx, cgroupSpec(t.p))
	if err != nil {
		return exit, err
	}
	undo.AddFunc(group.Release)
	io, err := newStdio(t.p)
	if err != nil {
		return exit, err
	}
	c := &builtinContainer{builtin: b, shared: &shared{task: t}, group: group}
	c.further = c.exec
	c.ctx, c.stop = context.WithCancelCause(ctx)
	undo.AddFunc(func() { c.stop(nil) })
	proc, times, err := b.start(ctx, t, group, io, &c.mounts)
	if err != nil {
		notExecuted(t.p, err)
		return exit, errors.Join(err, io.abort())
	}
	exit.times = times
	c.first = proc
	err = b.attend(ctx, &running{c, proc, io}, t.p.Started, &exit)
	usage, uerr := group.Usage()
	exit.account(usage)
	return exit, errors.Join(err, uerr)
}

// notExecuted tells p's readers of a program that can't be executed, as a shell
// would.
func notExecuted(p Process, err error) {
	var exec *native.ExecError
	if errors.As(err, &exec) && p.Stderr != nil {
		fmt.Fprintln(p.Stderr, exec) //nolint:errcheck // the error carries it, too
	}
}

// attend sees a process that was started through to its end.
func (b *builtin) attend(ctx context.Context, r *running, started func(Running), exit *exit) error {
	if err := r.io.started(); err != nil {
		return errors.Join(err, r.kill(ctx, exit), r.end(ctx))
	}
	if started != nil {
		started(r)
	}
	status, err := r.proc.Wait(ctx, 0)
	switch {
	case err == nil:
		exit.status(status)
	case ctx.Err() != nil:
		err = r.kill(ctx, exit)
	default:
		err = errors.Join(err, r.kill(ctx, exit))
	}
	return errors.Join(err, r.end(ctx))
}

// start starts the container's process.
func (b *builtin) start(ctx context.Context, t *task, group *cgroup.Group, io *stdio, mounts *string) (_ *launch.Process, times []launch.StageTime, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	closing := func(fd int) int {
		undo.Add(func() error { return unix.Close(fd) })
		return fd
	}
	c := &native.Container{Spec: t.spec, Netns: -1, Stdio: io.child, Terminal: native.Terminal{Socket: io.console}, Alive: b.alive}
	if t.spec.Linux.Seccomp != nil {
		c.Filter = b.filter
	}
	root, _, err := detach(t.root.FD(), "", 0)
	if err != nil {
		return nil, nil, fmt.Errorf("root: %w", err)
	}
	c.Root = closing(root)
	for _, s := range t.sources {
		bind, err := s.bind()
		if err != nil {
			return nil, nil, err
		}
		closing(bind.FD)
		bind.Make = t.makePoints[s.dest]
		c.Binds = append(c.Binds, bind)
	}
	if t.netns != nil {
		c.Netns = t.netns.FD()
	}
	if c.Machine, err = b.machineMounts(t, &undo); err != nil {
		return nil, nil, err
	}
	c.Cgroup = native.Cgroup{Join: group.JoinFDs(), Dir: group.CloneFD()}
	for _, m := range group.Mounts() {
		c.Cgroup.Mounts = append(c.Cgroup.Mounts, native.CgroupMount(m))
	}
	if b.machinePIDs {
		c.MountsName = mounts
	}
	proc, prog, err := native.Start(ctx, b.launcher, c)
	if err != nil {
		return nil, nil, explainHidden(err)
	}
	if t.observed {
		times = prog.Times()
	}
	return proc, times, nil // and the program, which takes more memory than all the rest of a running step, is garbage
}

// kill ends a process that is no longer wanted: TERM, and when the grace has
// passed KILL. With the first one of a container goes all that is in its group.
// The first process of a PID namespace gets no signal that it has no handler
// for, so that of a shell only what it runs ends by TERM, and then the shell.
func (r *running) kill(ctx context.Context, exit *exit) error {
	ctx = context.WithoutCancel(ctx)
	exit.killed = true
	signal := r.proc.Signal
	switch {
	case r.proc == r.first && r.cgroups.HasGroups():
		signal = r.group.Signal
	case r.proc == r.first:
		signal = func(sig unix.Signal) error { return signalTree(r.first.Pid, sig) }
	}
	err := signal(unix.SIGTERM)
	status, werr := r.proc.Wait(ctx, r.grace)
	if errors.Is(werr, launch.ErrTimeout) {
		// A first process's PID namespace ends with it, with all its processes.
		err = errors.Join(err, r.proc.Signal(unix.SIGKILL))
		status, werr = r.proc.Wait(ctx, killTimeout)
	}
	if werr == nil {
		exit.status(status)
	}
	if r.proc == r.first {
		err = errors.Join(err, r.group.Kill())
	}
	return errors.Join(err, werr)
}
