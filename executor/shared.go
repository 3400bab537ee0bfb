package executor

import (
	"context"
	"sync"
)

// shared is a running container in which further processes can be started. They
// share its namespaces and its cgroup, so its first process's end is theirs.
type shared struct {
	ctx  context.Context // the further processes end with it
	task *task
	// further runs a further process of the container to its end.
	further func(ctx context.Context, t *task) (exit, error)

	mu    sync.Mutex // guards over, and that execs isn't added to once it is
	over  bool
	execs sync.WaitGroup
}

// enter counts an Exec that the container waits for.
func (c *shared) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.over {
		c.execs.Add(1)
	}
	return !c.over
}

// shut ends entering, once the first process has ended.
func (c *shared) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
}

// Exec is that of every Running of the container.
func (c *shared) Exec(ctx context.Context, p Process) error {
	p.ID = c.task.p.ID
	if err := validate(p); err != nil {
		return err
	}
	if !c.enter() {
		return ErrEnded
	}
	defer c.execs.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(context.Cause(c.ctx)) })()
	t := *c.task
	p.Network = t.p.Network
	ctx, t.p, t.watch = watched(ctx, p)
	defer t.watch.stop()
	exit, err := c.further(ctx, &t)
	return t.result(ctx, &t, exit, err)
}
