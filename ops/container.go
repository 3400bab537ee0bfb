package ops

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// ContainerRequest describes a container in which a frontend runs processes
// (GW-050).
type ContainerRequest struct {
	Name string // for people
	// Mounts are like those of an exec op; Input is an index into Inputs, or
	// pb.Empty. What is written is thrown away with the container (GW-051).
	Mounts       []*pb.Mount
	Inputs       []*cache.Ref // the caller's; nil is empty
	Network      pb.NetMode
	Hostname     string
	ExtraHosts   []*pb.HostIP
	Platform     *pb.Platform // nil: the daemon's default
	Entitlements map[string]bool
	Group        session.Group // asked for secrets and the like
}

// Container is a place where processes run. The first of them makes it, and the
// others end with it. Its methods are safe for concurrent use.
type Container struct {
	req    ContainerRequest
	set    mountSet
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	// release closes set, once nothing uses it.
	release func() error

	mu      sync.Mutex // guards the fields below, and that running isn't added to once it is closed
	status  containerStatus
	changed chan struct{}    // closed and replaced when status changes
	first   executor.Running // while status is containerUp
	running sync.WaitGroup   // what uses set
}

type containerStatus int

const (
	containerNew      containerStatus = iota // no process has run
	containerStarting                        // somebody starts the first one
	containerUp                              // the first one runs
	containerOver                            // it has ended
	containerClosed
)

var errContainerClosed = errors.New("the container was released")

// NewContainer prepares the container's mounts. ctx bounds how long that may
// take; the container itself lasts until Close, or until life ends.
func (l *Loader) NewContainer(ctx, life context.Context, req ContainerRequest) (_ *Container, err error) {
	op := &pb.ExecOp{Meta: &pb.Meta{Args: []string{req.Name}, Cwd: pb.RootMount, ExtraHosts: req.ExtraHosts}, Network: req.Network}
	for i, m := range req.Mounts {
		if m == nil {
			return nil, invalid(fmt.Sprintf("exec.mounts[%d]", i), "it is missing")
		}
		m = m.CloneVT()
		m.Output, m.ResultID, m.ContentCache = int64(pb.SkipOutput), "", pb.MountContentCache_DEFAULT
		op.Mounts = append(op.Mounts, m)
	}
	if _, err := checkExec(op, len(req.Inputs)); err != nil {
		return nil, err
	}
	if err := checkEntitlements(op, req.Entitlements); err != nil {
		return nil, err
	}
	c := &Container{req: req, changed: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(life)
	c.set = mountSet{
		ops: l, platform: l.platform(req.Platform), group: req.Group, list: op.Mounts, cwd: pb.RootMount, inputs: req.Inputs,
		user: "container " + req.Name, readable: true,
	}
	c.release = sync.OnceValue(func() error { return c.set.close(c.ctx) })
	stop := context.AfterFunc(ctx, func() { c.cancel(context.Cause(ctx)) })
	err = c.set.prepare(c.ctx)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	c.set.inputs = nil // the caller's
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// ContainerProcess is a process to run in a container.
type ContainerProcess struct {
	Meta      *pb.Meta
	SecretEnv []*pb.SecretEnv
	Security  pb.SecurityMode
	Terminal  bool
	Stdin     io.Reader // an io.Closer is closed when the process ends
	Stdout    io.Writer
	Stderr    io.Writer
	Started   func(executor.Running) // as for executor.Process
}

// Run runs a process to its end. It carries the exit code of one that fails, as
// a step's error does. A further process waits until the first one runs.
func (c *Container) Run(ctx context.Context, p ContainerProcess) error {
	if err := c.check(p); err != nil {
		return err
	}
	if err := c.enter(); err != nil {
		return err
	}
	defer c.running.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(context.Cause(c.ctx)) })()
	proc, err := c.process(ctx, p)
	if err != nil {
		return err
	}
	first, err := c.turn(ctx)
	if err != nil {
		return err
	}
	if first != nil {
		return withExitCode(first.Exec(ctx, proc))
	}
	return withExitCode(c.runFirst(ctx, proc))
}

func (c *Container) check(p ContainerProcess) error {
	if err := checkMeta(p.Meta); err != nil {
		return err
	}
	op := &pb.ExecOp{Meta: p.Meta, Secretenv: p.SecretEnv, Security: p.Security}
	if err := checkModes(op); err != nil {
		return err
	}
	return checkEntitlements(op, c.req.Entitlements)
}

// process is p with what the container has for all of its processes.
func (c *Container) process(ctx context.Context, p ContainerProcess) (proc executor.Process, err error) {
	env := plainEnv(p.Meta)
	if p.Terminal && !hasVariable(env, "TERM") {
		env = append(env, "TERM=xterm")
	}
	secrets, err := c.set.ops.secretEnv(ctx, c.set.group, p.SecretEnv)
	if err != nil {
		return proc, err
	}
	meta := p.Meta.CloneVT()
	meta.ExtraHosts = slices.Concat(c.req.ExtraHosts, meta.ExtraHosts)
	if c.req.Hostname != "" {
		meta.Hostname = c.req.Hostname
	}
	proc = c.set.process(meta, append(env, secrets...))
	proc.Ulimits = withoutCores(proc.Ulimits, c.set.list, p.SecretEnv)
	proc.Network, proc.Security = netMode(c.req.Network), securityMode(p.Security)
	proc.Terminal, proc.Started = p.Terminal, p.Started
	proc.Stdin, proc.Stdout, proc.Stderr = p.Stdin, p.Stdout, p.Stderr
	return proc, nil
}

// turn returns the first process once it runs, or nil if the caller is to run
// it.
func (c *Container) turn(ctx context.Context) (executor.Running, error) {
	for {
		c.mu.Lock()
		status, first, changed := c.status, c.first, c.changed
		if status == containerNew {
			c.setLocked(containerStarting)
		}
		c.mu.Unlock()
		switch status {
		case containerNew:
			return nil, nil
		case containerUp:
			return first, nil
		case containerOver:
			return nil, fmt.Errorf("start another process in container %s: %w", c.req.Name, executor.ErrEnded)
		case containerClosed:
			return nil, errContainerClosed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// runFirst runs the first process. If it could not be started, another may be
// the first.
func (c *Container) runFirst(ctx context.Context, p executor.Process) error {
	started := p.Started
	up := false
	p.Started = func(r executor.Running) {
		up = true
		c.mu.Lock()
		c.first = r
		c.setLocked(containerUp)
		c.mu.Unlock()
		if started != nil {
			started(r)
		}
	}
	_, err := c.set.ops.cfg.Executor.Run(ctx, p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.first = nil
	if up {
		c.setLocked(containerOver)
	} else {
		c.setLocked(containerNew)
	}
	return err
}

// setLocked changes the status, of which closed is the last.
func (c *Container) setLocked(s containerStatus) {
	if c.status == containerClosed {
		return
	}
	c.status = s
	close(c.changed)
	c.changed = make(chan struct{})
}

// enter counts a use of the mounts that Close waits for.
func (c *Container) enter() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status == containerClosed {
		return errContainerClosed
	}
	c.running.Add(1)
	return nil
}

// View opens what the mount with the given index in the request shows, as
// processes see it now, and says which path in it. Close waits until release is
// called.
func (c *Container) View(index int) (v *snapshot.View, selector string, release func() error, err error) {
	if index < 0 || index >= len(c.set.sources) {
		return nil, "", nil, invalid("MountIndex", "container %s has no mount %d, it has %d of them", c.req.Name, index, len(c.set.sources))
	}
	src := c.set.sources[index]
	if src.mounts == nil {
		return nil, "", nil, invalid("MountIndex", "mount %d of container %s, of something optional, is not there", index, c.req.Name)
	}
	if err := c.enter(); err != nil {
		return nil, "", nil, err
	}
	if v, err = snapshot.Open(src.mounts); err != nil {
		c.running.Done()
		return nil, "", nil, err
	}
	return v, src.selector, func() error { defer c.running.Done(); return v.Close() }, nil
}

// Close ends all processes, and gives back what the container holds. It may be
// called again.
func (c *Container) Close() error {
	c.mu.Lock()
	c.setLocked(containerClosed)
	c.mu.Unlock()
	c.cancel(errContainerClosed)
	c.running.Wait()
	return c.release()
}
