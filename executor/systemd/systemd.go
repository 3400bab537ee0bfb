//go:build linux && (amd64 || arm64)

// Package systemd has the machine's systemd make the cgroups of containers, as
// transient units, over D-Bus.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// manager is a connection.
type manager struct{ conn *dbus.Conn }

// Connect connects to systemd by the system bus or, if there is none, directly.
func Connect(ctx context.Context) (container.Units, error) {
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to systemd over D-Bus: %w; is it running on this machine? Without it, leave out --systemd-cgroup", err)
	}
	return &manager{conn}, nil
}

func (m *manager) Close() { m.conn.Close() }

// jobTimeout is how long systemd may take for anything.
const jobTimeout = 30 * time.Second

// bounded gives what systemd does a limit of time.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, jobTimeout, fmt.Errorf("systemd doesn't answer within %s", jobTimeout))
}

func (m *manager) Start(ctx context.Context, u container.Unit) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	props, err := properties(u)
	if err != nil {
		return err
	}
	start := func(done chan<- string) error {
		_, err := m.conn.StartTransientUnitContext(ctx, u.Name, "replace", props, done)
		return err
	}
	err = wait(ctx, start)
	if isError(err, "org.freedesktop.systemd1.UnitExists") {
		// One that failed is kept until somebody has looked at it.
		if rerr := m.conn.ResetFailedUnitContext(ctx, u.Name); rerr == nil {
			err = wait(ctx, start)
		}
	}
	if err != nil {
		return fmt.Errorf("start unit %s: %w", u.Name, err)
	}
	return nil
}

func (m *manager) Set(ctx context.Context, name string, v2 bool, r *specs.LinuxResources) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	props := limits(v2, r)
	if len(props) == 0 {
		return nil
	}
	if err := m.conn.SetUnitPropertiesContext(ctx, name, true, props...); err != nil {
		return fmt.Errorf("set properties of unit %s: %w", name, err)
	}
	return nil
}

const noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"

func (m *manager) Stop(ctx context.Context, name string) error {
	ctx, cancel := bounded(ctx)
	defer cancel()
	err := wait(ctx, func(done chan<- string) error {
		_, err := m.conn.StopUnitContext(ctx, name, "replace", done)
		return err
	})
	if isError(err, noSuchUnit) {
		err = nil // it went away with its last process
	}
	if err != nil {
		return fmt.Errorf("stop unit %s: %w", name, err)
	}
	if err := m.conn.ResetFailedUnitContext(ctx, name); err != nil && !isError(err, noSuchUnit) {
		return fmt.Errorf("reset unit %s: %w", name, err)
	}
	return nil
}

func isError(err error, name string) bool {
	var derr godbus.Error
	return errors.As(err, &derr) && derr.Name == name
}

// wait begins a job and waits until systemd has done it.
func wait(ctx context.Context, begin func(done chan<- string) error) error {
	done := make(chan string, 1)
	if err := begin(done); err != nil {
		return err
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("systemd says that the job ended as %q; see its journal", result)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
