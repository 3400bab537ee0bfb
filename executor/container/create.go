//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/thread"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// IO is what a process has for standard input, output and error, and beyond.
type IO struct {
	Stdio    [3]*os.File
	Console  *os.File // connected socket that the terminal's master is sent to
	Preserve int      // how many further files of this process, from 3 on, it inherits
}

// Options are how to create a container.
type Options struct {
	IO
	Bundle       string // absolute
	NoNewKeyring bool
	NoPivot      bool // for machines whose root is a ramdisk, which can't be pivoted from
	Systemd      bool // cgroups are made by systemd; cgroupsPath is slice:prefix:name
}

// Create makes the container id from the spec of a bundle, up to where its
// program would be executed. The process is a child of this one, and outlives
// it.
func (r *Runtime) Create(ctx context.Context, id string, spec *specs.Spec, o Options) (_ *Container, _ *Process, err error) {
	c, err := r.reserve(id)
	if err != nil {
		return nil, nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(func() error {
		if !c.hooked {
			return nil
		}
		return c.hooksAfter(context.WithoutCancel(ctx))
	})
	undo.Add(func() error { return os.RemoveAll(c.dir) })
	c.Bundle, c.Spec, c.Created = o.Bundle, spec, time.Now().UTC()
	if err := checkIO(spec.Process, o.IO); err != nil {
		return nil, nil, err
	}
	if !o.NoNewKeyring {
		c.Keyring = "_ses." + id
	}
	tree, err := cgroup.Detect()
	if err != nil {
		return nil, nil, err
	}
	path, err := c.cgroupsPath(o.Systemd)
	if err != nil {
		return nil, nil, err
	}
	if c.Groups, err = newGroups(tree, path, id); err != nil {
		return nil, nil, err
	}
	// So that what there is can be deleted if this process is killed.
	if err := c.save(); err != nil {
		return nil, nil, err
	}
	undo.Add(func() error {
		if !c.started {
			return nil
		}
		return c.stopUnit(context.WithoutCancel(ctx))
	})
	undo.Add(c.Groups.remove)
	// On version 2 a cgroup that systemd manages is made by it, around the
	// process. On version 1 the mounts of the container need it before that.
	if !o.Systemd || c.Groups.V2 == "" {
		if err := c.Groups.make(tree); err != nil {
			return nil, nil, err
		}
	}
	if !o.Systemd {
		if err := c.confine(); err != nil {
			return nil, nil, err
		}
	}
	var p *Process
	// Namespaces that the container shares with others are entered by a thread
	// that nothing else runs on.
	thread.Run(func() { p, err = c.launch(ctx, o, tree) })
	if err != nil {
		return nil, nil, err
	}
	undo.Keep()
	return c, p, nil
}

// reserve makes the container's directory, by which the id is taken.
func (r *Runtime) reserve(id string) (*Container, error) {
	dir, err := r.dir(id)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(r.root, 0o711); err != nil {
		return nil, fmt.Errorf("make directory for containers: %w", err)
	}
	if err := os.Mkdir(dir, 0o711); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: %q", ErrExist, id)
	} else if err != nil {
		return nil, fmt.Errorf("make directory of container %s: %w", id, err)
	}
	return &Container{dir: dir, systemd: r.Systemd, warn: r.Warn, record: record{ID: id}}, nil
}

func checkIO(p *specs.Process, o IO) error {
	switch {
	case p.Terminal && o.Console == nil:
		return errors.New("cannot allocate a terminal without a console socket to send it to")
	case !p.Terminal && o.Console != nil:
		return errors.New("a console socket was given, but the process has no terminal")
	}
	return nil
}

// confine applies limits and device rules.
func (c *Container) confine() error {
	r := c.Spec.Linux.Resources
	if r == nil {
		return nil
	}
	if err := c.Groups.limit(r); err != nil {
		return err
	}
	return c.Groups.allowDevices(r.Devices)
}

// launch starts the process and sees it through its set-up.
func (c *Container) launch(ctx context.Context, o Options, tree *cgroup.Tree) (_ *Process, err error) {
	var undo, done cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run(), done.Run()) }()
	gate, err := c.makeGate()
	if err != nil {
		return nil, err
	}
	done.Add(gate.Close)
	if err := joinNamespaces(c.Spec); err != nil {
		return nil, err
	}
	s, err := c.setup(c.Spec.Process, o.IO)
	if err != nil {
		return nil, err
	}
	s.Gate, s.Hold, s.NoPivot = gate, holds(c.Spec.Hooks), o.NoPivot
	child, err := native.Create(s)
	if err != nil {
		return nil, err
	}
	done.Add(child.Leave)
	p := &Process{child.Process, child}
	undo.Add(p.end)
	if native.MakesClocks(c.Spec) {
		if err := c.await(child); err != nil {
			return nil, err
		}
	}
	if err := c.adopt(ctx, child, tree); err != nil {
		return nil, err
	}
	if err := child.Continue(); err != nil {
		return nil, err
	}
	if s.Hold {
		if err := c.await(child); err != nil {
			return nil, err
		}
		if err := c.hooksBeforePivot(ctx); err != nil {
			return nil, err
		}
		if err := child.Continue(); err != nil {
			return nil, err
		}
	}
	if err := c.await(child); err != nil {
		return nil, err
	}
	if err := c.save(); err != nil {
		return nil, err
	}
	undo.Keep()
	return p, nil
}

// makeGate makes the FIFO that the process waits at.
func (c *Container) makeGate() (*os.File, error) {
	if err := unix.Mkfifo(c.gate(), 0o600); err != nil {
		return nil, fmt.Errorf("make start gate: %w", err)
	}
	// With a writer, the process itself, a read waits.
	fd, err := unix.Open(c.gate(), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open start gate: %w", err)
	}
	return os.NewFile(uintptr(fd), c.gate()), nil
}

// joinNamespaces moves the thread to the namespaces of others that the spec
// names.
func joinNamespaces(spec *specs.Spec) (err error) {
	files, flags, err := native.Joins(spec)
	if err != nil {
		return err
	}
	for i, f := range files {
		if serr := unix.Setns(int(f.Fd()), flags[i]); serr != nil && err == nil {
			err = fmt.Errorf("join namespace %s: %w", f.Name(), serr)
		}
		err = errors.Join(err, f.Close())
	}
	return err
}

// setup is what processes of the container have in common.
func (c *Container) setup(p *specs.Process, io IO) (*native.Setup, error) {
	p, err := c.grant(p)
	if err != nil {
		return nil, err
	}
	spec := *c.Spec
	spec.Process = p
	s := &native.Setup{Spec: &spec, Bundle: c.Bundle, Stdio: io.Stdio, Preserve: io.Preserve, Keyring: c.Keyring, Cgroups: c.Groups.views(), CopyUp: copyTree}
	if s.Filter, err = filter(c.Spec); err != nil {
		return nil, err
	}
	s.Terminal.Socket = io.Console
	if size := p.ConsoleSize; size != nil {
		s.Terminal.Height, s.Terminal.Width = uint16(size.Height), uint16(size.Width)
	}
	root, err := os.OpenFile(rootDir(c.Spec, c.Bundle), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open root.path: %w", err)
	}
	spec.Process, err = withEnv(p, int(root.Fd()))
	return s, errors.Join(err, root.Close())
}

// adopt does what only the outside can do for the new process.
func (c *Container) adopt(ctx context.Context, child *native.Child, tree *cgroup.Tree) error {
	c.Pid = child.Pid
	var err error
	if _, c.StartTime, err = processStat(c.Pid); err != nil {
		return fmt.Errorf("look at new process: %w", err)
	}
	if c.Unit != "" {
		// Systemd sets the limits that it knows of when it starts a unit.
		for _, do := range []func() error{func() error { return c.startUnit(ctx) }, func() error { return c.Groups.make(tree) }, c.confine} {
			if err := do(); err != nil {
				return err
			}
		}
	}
	if err := c.Groups.join(c.Pid, nil); err != nil {
		return err
	}
	if err := protect(c.Pid, c.Spec.Process.OOMScoreAdj); err != nil {
		return err
	}
	if l := c.Spec.Linux; native.MakesUsers(c.Spec) {
		err = native.WriteMappings(c.Pid, l.UIDMappings, l.GIDMappings)
	}
	return errors.Join(err, setClocks(c.Pid, c.Spec.Linux.TimeOffsets))
}

// setClocks sets those of the time namespace that the process is about to
// enter.
func setClocks(pid int, offsets map[string]specs.LinuxTimeOffset) error {
	for clock, o := range offsets {
		line := fmt.Sprintf("%s %d %d", clock, o.Secs, o.Nanosecs)
		if err := writeControl(fmt.Sprintf("/proc/%d/timens_offsets", pid), line); err != nil {
			return fmt.Errorf("set linux.timeOffsets %q: %w", line, err)
		}
	}
	return nil
}

// await waits for the child's next gate.
func (c *Container) await(child *native.Child) error {
	done, err := child.Await()
	if err == nil && done {
		err = fmt.Errorf("the process of container %s was killed during its set-up; its memory limit may be too low", c.ID)
		if c.Spec.Linux.Seccomp != nil {
			err = fmt.Errorf("%w, or its seccomp profile kills for what every start of a program needs, such as execve", err)
		}
	}
	return err
}

// Process is a process of a container and child of this process. Wait must be
// called once, or Release.
type Process struct {
	*launch.Process
	child *native.Child // until it is known how it ended; nil if it has executed its program
}

// Failure says why a process that was started has not executed its program; nil
// if it has. It isn't for one that was waited for.
func (p *Process) Failure() error {
	if p.child == nil {
		return nil
	}
	return p.child.Failure()
}

// Wait is that of launch.Process.
func (p *Process) Wait(ctx context.Context, limit time.Duration) (launch.Status, error) {
	status, err := p.Process.Wait(ctx, limit)
	if err == nil {
		err = p.forget()
	}
	return status, err
}

// Release lets go of a process that somebody else waits for.
func (p *Process) Release() error { return errors.Join(p.Process.Release(), p.forget()) }

func (p *Process) forget() error {
	if p.child == nil {
		return nil
	}
	child := p.child
	p.child = nil
	return child.Forget()
}

// end kills the process and waits for it.
func (p *Process) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	err := p.Signal(unix.SIGKILL)
	_, werr := p.Wait(ctx, 0)
	return errors.Join(err, werr)
}

// endTimeout is how long a killed process may take to end.
const endTimeout = 10 * time.Second

// Start lets a created container's process execute its program. A hook that
// fails deletes the container.
func (c *Container) Start(ctx context.Context) error {
	if _, err := c.in("start", Created); err != nil {
		return err
	}
	gate, err := os.OpenFile(c.gate(), os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open start gate of container %s: %w", c.ID, err)
	}
	defer gate.Close()
	if err := c.startHooks(ctx); err != nil {
		return errors.Join(err, c.Delete(ctx, true))
	}
	// Who removes the name is who starts it.
	if err := os.Remove(c.gate()); errors.Is(err, fs.ErrNotExist) {
		return &StatusError{Op: "start", ID: c.ID, Status: Running}
	} else if err != nil {
		return fmt.Errorf("take start gate of container %s: %w", c.ID, err)
	}
	if _, err := gate.Write([]byte{0}); err != nil {
		return fmt.Errorf("open start gate of container %s: %w", c.ID, err)
	}
	if err := waitExecuted(ctx, gate); err != nil {
		return err
	}
	if err := c.runHooks(ctx, "poststart", c.hooks().Poststart, Running); err != nil {
		return errors.Join(err, c.Delete(ctx, true))
	}
	return nil
}

// waitExecuted returns when nobody reads from the gate any more: the process
// has executed its program, or ended.
func waitExecuted(ctx context.Context, gate *os.File) error {
	raw, err := gate.SyscallConn()
	if err != nil {
		return fmt.Errorf("start gate: %w", err)
	}
	for {
		fds := []unix.PollFd{{}}
		var n int
		if err := raw.Control(func(fd uintptr) {
			fds[0].Fd = int32(fd)
			n, err = unix.Poll(fds, pollSlice)
		}); err != nil {
			return fmt.Errorf("start gate: %w", err)
		}
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait at start gate: %w", err)
		case n > 0:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// pollSlice is after how many milliseconds a wait looks whether it is still
// wanted.
const pollSlice = 200

// Dir is where the container's state is.
func (c *Container) Dir() string { return filepath.Clean(c.dir) }
