package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/internal/steplog"
	"golang.org/x/sys/unix"
)

// Earlier is a supervisor of an earlier daemon.
type Earlier struct {
	Steps   []Step
	dir     string
	leaving atomic.Bool
}

// Find returns the supervisors that earlier daemons have left in dir, and cleans
// up after those that have died. exec is the executor's configuration, for its
// cgroup parent.
func Find(dir string, exec executor.Config) ([]*Earlier, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for earlier supervisors: %w", err)
	}
	var found []*Earlier
	for _, e := range entries {
		at := filepath.Join(dir, e.Name())
		if earlier, err := ask(at); err == nil {
			found = append(found, earlier)
			continue
		}
		if err := cleanUp(at, exec); err != nil {
			return nil, fmt.Errorf("clean up after the supervisor %s: %w", at, err)
		}
	}
	return found, nil
}

// Pids are the processes of the supervisors in dir that live.
func Pids(dir string) (pids []int) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // there are none, or Find tells
	}
	for _, e := range entries {
		c, err := dial(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		if pid, err := peer(c.UnixConn); err == nil {
			pids = append(pids, pid)
		}
		c.Close()
	}
	return pids
}

// peer is the process at the other end.
func peer(c net.Conn) (pid int, err error) {
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// ask asks the supervisor in dir for its steps.
func ask(dir string) (*Earlier, error) {
	c, err := dial(dir)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.send(request{List: true}); err != nil {
		return nil, err
	}
	var r reply
	if err := c.dec.Decode(&r); err != nil {
		return nil, err
	}
	return &Earlier{Steps: r.Steps, dir: dir}, nil
}

// cleanUp removes what a supervisor has left that doesn't answer: one that is
// just ending is waited for.
func cleanUp(dir string, exec executor.Config) error {
	lock, err := lockDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	exec.Root, exec.Binary = filepath.Join(dir, executorName), ""
	exec.Network = network.Config{} // that is cleaned up with the next one's
	if exec.Log == nil {
		exec.Log = slog.New(slog.DiscardHandler)
	}
	e, err := executor.New(exec)
	if err != nil {
		return err
	}
	return errors.Join(e.Close(), os.RemoveAll(dir))
}

// Leave has steps that are attached to go on without this daemon if their
// contexts end from now on, as Client.Leave does.
func (e *Earlier) Leave() { e.leaving.Store(true) }

// Attach follows the step id: it tells of all that it has printed and will print,
// and returns what Run would have. The error is ErrUnclaimed if the step isn't
// there any more, and ErrLeft if ctx ended after Leave.
func (e *Earlier) Attach(ctx context.Context, id string, printed func(steplog.Extent)) (_ executor.Usage, done func(), err error) {
	return e.attach(ctx, id, &e.leaving, printed)
}

// End ends the step id, if it still runs, and forgets it.
func (e *Earlier) End(ctx context.Context, id string) error {
	gone, cancel := context.WithCancel(context.WithoutCancel(ctx))
	cancel() // so that attaching to it is its end
	_, done, err := e.attach(gone, id, new(atomic.Bool), func(steplog.Extent) {})
	if done != nil {
		done()
	}
	if errors.Is(err, ErrUnclaimed) || errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (e *Earlier) attach(ctx context.Context, id string, leaving *atomic.Bool, printed func(steplog.Extent)) (_ executor.Usage, done func(), err error) {
	c, err := dial(e.dir)
	if err != nil {
		return executor.Usage{}, nil, fmt.Errorf("%w: its supervisor doesn't answer: %w", ErrUnclaimed, err)
	}
	f := &follower{conn: c, dir: e.dir, printed: printed, leaving: leaving, put: func(c *conn) { c.Close() }}
	return f.follow(ctx, request{Attach: id})
}
