//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Signal sends sig to the container's first process, or to all. One that has
// ended is ErrNotRunning, unless all are meant.
func (c *Container) Signal(ctx context.Context, sig unix.Signal, all bool) error {
	allowed := []Status{Created, Running, Paused}
	if all {
		allowed = append(allowed, Stopped)
	}
	status, err := c.in("signal", allowed...)
	if errors.Is(err, ErrNotRunning) {
		return fmt.Errorf("%w: %s", ErrNotRunning, c.ID)
	}
	if err != nil {
		return err
	}
	// Without a PID namespace, nothing else ends with the first process.
	if all || sig == unix.SIGKILL && !c.ownsPids() {
		return c.signalAll(ctx, sig)
	}
	pidfd, err := c.open()
	if errors.Is(err, ErrNotRunning) {
		return fmt.Errorf("%w: %s", ErrNotRunning, c.ID)
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	if err := unix.PidfdSendSignal(int(pidfd.Fd()), sig, nil, 0); err != nil {
		return fmt.Errorf("send %s to container %s: %w", unix.SignalName(sig), c.ID, err)
	}
	if status == Paused && sig == unix.SIGKILL && c.Groups.V2 == "" {
		// A frozen process of version 1 doesn't even die.
		return c.Groups.freeze(ctx, false)
	}
	return nil
}

func (c *Container) ownsPids() bool {
	for _, ns := range c.Spec.Linux.Namespaces {
		if ns.Type == specs.PIDNamespace && ns.Path == "" {
			return true
		}
	}
	return false
}

// signalAll holds the processes while it sends, so that none is missed because
// it was just being made.
func (c *Container) signalAll(ctx context.Context, sig unix.Signal) error {
	paused, err := c.Groups.frozen()
	if err != nil {
		return err
	}
	if err := c.Groups.freeze(ctx, true); err != nil {
		return err
	}
	pids, err := c.Groups.pids()
	for _, pid := range pids {
		if kerr := unix.Kill(pid, sig); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("send %s to process %d of container %s: %w", unix.SignalName(sig), pid, c.ID, kerr))
		}
	}
	if !paused || sig == unix.SIGKILL {
		err = errors.Join(err, c.Groups.freeze(context.WithoutCancel(ctx), false))
	}
	return err
}

// Pause holds all processes of a running container.
func (c *Container) Pause(ctx context.Context) error {
	if _, err := c.in("pause", Running, Created); err != nil {
		return err
	}
	return c.Groups.freeze(ctx, true)
}

// Resume lets a paused container go on.
func (c *Container) Resume(ctx context.Context) error {
	if _, err := c.in("resume", Paused); err != nil {
		return err
	}
	return c.Groups.freeze(ctx, false)
}

// Update changes limits; what r doesn't mention stays.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	if _, err := c.in("update", Created, Running, Paused); err != nil {
		return err
	}
	if err := c.inUnit(ctx, func(units Units) error { return units.Set(ctx, c.Unit, c.Groups.V2 != "", r) }); err != nil {
		return err
	}
	return c.Groups.limit(r)
}

// Processes lists the container's processes by their pids on the machine.
func (c *Container) Processes() ([]int, error) { return c.Groups.pids() }

// Ended waits until the first process has ended, whoever's child it is.
func (c *Container) Ended(ctx context.Context) error {
	pidfd, err := c.open()
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}, pollSlice)
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for process %d of container %s: %w", c.Pid, c.ID, err)
		case n > 0:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// Delete removes a container that has ended or was never started. With force
// it is killed first, and what is left of one that wasn't completely made is
// removed.
func (c *Container) Delete(ctx context.Context, force bool) error {
	if _, err := os.Stat(c.dir); errors.Is(err, fs.ErrNotExist) {
		if force {
			return nil // by a hook that failed, or by another caller
		}
		return fmt.Errorf("%w: %q", ErrNotExist, c.ID)
	}
	status, err := c.Status()
	if err != nil && !force {
		return err
	}
	switch {
	case status == Stopped:
	case status == Created, force && status != Creating:
		if err := c.end(ctx); err != nil {
			return err
		}
	case !force:
		return fmt.Errorf("cannot delete container %s that is not stopped: %s", c.ID, status)
	}
	return c.destroy(ctx)
}

// end kills the first process, and waits for its end.
func (c *Container) end(ctx context.Context) error {
	if err := c.Signal(ctx, unix.SIGKILL, false); err != nil && !errors.Is(err, ErrNotRunning) {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, endTimeout, errors.New("it doesn't end after being killed"))
	defer cancel()
	if err := c.Ended(ctx); err != nil {
		return fmt.Errorf("delete container %s: process %d: %w", c.ID, c.Pid, err)
	}
	return nil
}

// destroy removes everything of an ended container, and runs its poststop hooks
// then.
func (c *Container) destroy(ctx context.Context) error {
	var errs []error
	if len(c.Groups.dirs()) > 0 {
		if frozen, err := c.Groups.frozen(); err == nil && frozen {
			errs = append(errs, c.Groups.freeze(ctx, false))
		}
		errs = append(errs, c.Groups.remove(), c.stopUnit(ctx))
	}
	errs = append(errs, c.removeDir(), c.hooksAfter(ctx))
	return errors.Join(errs...)
}
