package executor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"golang.org/x/sys/unix"
)

// runcContainer is a container of an OCI runtime binary. Each of its processes
// has a command of the runtime that attends to it: run for the first, exec for
// further ones.
type runcContainer struct {
	*runcRuntime
	*shared
	group  *cgroup.Group
	bundle string
	starts atomic.Int64 // names the files of each start
}

// runcRunning is one process of it.
type runcRunning struct {
	*runcContainer
	*attendant
}

func (r *runcRunning) Signal(sig unix.Signal) error { return r.signal(sig) }

// Resize sets the size of the runtime's terminal, from which runc takes over its
// process's, and that of the process, as crun doesn't do so.
func (r *runcRunning) Resize(rows, cols uint16) error {
	return errors.Join(r.io.resize(rows, cols), r.resize(rows, cols))
}

// start starts a command that attends to p. pid says whether the process itself
// will be asked for.
func (c *runcContainer) start(p Process, command string, args []string, pid bool) (_ *attendant, err error) {
	file := filepath.Join(c.bundle, command+strconv.FormatInt(c.starts.Add(1), 10))
	args = append([]string{"--log", file + ".log", "--log-format", "json", command}, args...)
	var expected *pidFile
	if pid {
		if expected, err = expectPid(file + ".pid"); err != nil {
			return nil, err
		}
		args = append(args, "--pid-file", expected.name)
	}
	io, err := newBridge(p)
	if err != nil {
		if expected != nil {
			err = errors.Join(err, expected.close())
		}
		return nil, err
	}
	a, err := attendTo(c.command(append(args, c.task.p.ID)...), io, expected)
	if err == nil {
		a.log = file + ".log"
	}
	return a, err
}

// attend sees a process that was started through to its end.
func (c *runcContainer) attend(ctx context.Context, a *attendant, t *task, kill func(), exit *exit) error {
	var started func()
	if t.p.Started != nil {
		started = func() { t.p.Started(&runcRunning{c, a}) }
	}
	err := a.wait(ctx, started, kill, exit)
	if t == c.task {
		c.shut()
		c.execs.Wait()
	}
	return errors.Join(err, a.io.ended(ctx))
}

// kill sends TERM, then KILL, and at last kills whatever there is. Errors of
// the first two are of a container that isn't or is no longer there.
func (c *runcContainer) kill(a *attendant) {
	id := c.task.p.ID
	a.kill(c.grace,
		func() { c.group.Signal(unix.SIGTERM) },                             //nolint:errcheck
		func() { c.command("kill", id, "KILL").Run() },                      //nolint:errcheck
		func() { unix.Kill(-a.cmd.Process.Pid, unix.SIGKILL) },              //nolint:errcheck
		func() { c.group.Kill(); c.command("delete", "--force", id).Run() }, //nolint:errcheck
	)
	c.group.Kill() //nolint:errcheck // removing it fails, then
}

// exec runs a further process.
func (c *runcContainer) exec(ctx context.Context, t *task) (exit exit, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	if t.p.Security != c.task.p.Security {
		return exit, fmt.Errorf("a process that is confined in another way than the first one of its container needs the built-in runtime, not %s", c.binary)
	}
	user, err := rootfs.New(t.root.FD()).User(t.p.User)
	if err != nil {
		return exit, err
	}
	own, err := makeSpec(t.p, user, nil, c.confinement)
	if err != nil {
		return exit, err
	}
	own.Process.Terminal = t.p.Terminal
	file := filepath.Join(c.bundle, "process"+strconv.FormatInt(c.starts.Add(1), 10))
	if err := writeJSON(file, own.Process); err != nil {
		return exit, err
	}
	a, err := c.start(t.p, "exec", []string{"--process", file}, true)
	if err != nil {
		return exit, err
	}
	err = c.attend(ctx, a, t, func() {
		a.kill(c.grace,
			func() { a.signal(unix.SIGTERM) },                      //nolint:errcheck // KILL follows
			func() { a.signal(unix.SIGKILL) },                      //nolint:errcheck // its attendant's follows
			func() { unix.Kill(-a.cmd.Process.Pid, unix.SIGKILL) }, //nolint:errcheck // it isn't waited for yet
		)
	}, &exit)
	if err != nil || exit.code == 0 || exit.killed {
		return exit, err
	}
	return exit, a.startError(t, exit)
}
