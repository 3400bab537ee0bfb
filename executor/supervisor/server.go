package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/footprint"
	"github.com/kilnbuild/kiln/internal/steplog"
)

// config is what a supervisor is started with.
type config struct {
	Dir       string
	Executor  executor.Config // Root and Log are the supervisor's own
	Unclaimed time.Duration
}

// server is a supervisor.
type server struct {
	cfg  config
	log  *slog.Logger
	exec executor.Executor
	// memory is given back some time after the last step began or ended.
	memory *footprint.Keeper

	mu      sync.Mutex // guards the fields below; never held across I/O
	steps   map[string]*step
	closing bool          // the daemon has gone: no new steps
	empty   chan struct{} // closed when closing and there are no steps
	running sync.WaitGroup
}

// lifeline is the file descriptor by which a supervisor knows that its daemon is
// there. It says over it that it is ready, or why it can't be.
const lifeline = 3

// Main is the main function of a supervisor. Its arguments are those that Start
// has given it.
func Main(args []string) error {
	// What a terminal or an init system sends is for the daemon. The signals are
	// caught and not ignored, for what is ignored stays so in programs that a
	// runtime starts.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	daemon, err := net.FileConn(os.NewFile(lifeline, "lifeline"))
	if err != nil {
		return fmt.Errorf("a supervisor is started by the daemon only: %w", err)
	}
	err = serve(args, daemon)
	if err != nil {
		fmt.Fprintln(daemon, err) //nolint:errcheck // the exit code says that it failed
	}
	return errors.Join(err, daemon.Close())
}

func serve(args []string, daemon net.Conn) (err error) {
	if len(args) != 1 {
		return fmt.Errorf("a supervisor takes its configuration as one argument, not %d", len(args))
	}
	s := &server{steps: map[string]*step{}, empty: make(chan struct{})}
	if err := json.Unmarshal([]byte(args[0]), &s.cfg); err != nil {
		return fmt.Errorf("configuration of the supervisor: %w", err)
	}
	lock, err := lockDir(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	s.log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	s.cfg.Executor.Root, s.cfg.Executor.Log = filepath.Join(s.cfg.Dir, executorName), s.log
	if s.exec, err = executor.New(s.cfg.Executor); err != nil {
		return fmt.Errorf("set up the executor: %w", err)
	}
	var l net.Listener
	err = socketAt(s.cfg.Dir, func(path string) (err error) {
		l, err = net.Listen("unix", path)
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("listen: %w", err), s.exec.Close())
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	s.slim()
	defer s.memory.Close()
	go s.accept(l)
	if _, err := fmt.Fprintln(daemon, ready); err != nil {
		s.log.Warn("the daemon has gone before it was told that all is ready", "error", err)
	}
	daemon.Read(make([]byte, 1)) //nolint:errcheck // the end of the connection is what is waited for
	s.close()
	<-s.empty
	s.running.Wait()
	return errors.Join(l.Close(), s.exec.Close(), os.RemoveAll(s.cfg.Dir))
}

const ready = "ready"

// heapGrowth is by how much, in percent, the heap grows before garbage is
// collected. What a supervisor has in use is small, so that collecting often costs
// little, and it should be small beside the daemon.
const heapGrowth = 25

// restAfter is when memory that only set-up, start or end of a step took is given
// back: steps can run for long, and many at once.
const restAfter = 2 * time.Second

// slim has the supervisor be small beside the daemon, beginning with what set-up
// has left, most of it by packages that only the daemon uses.
func (s *server) slim() {
	debug.SetGCPercent(heapGrowth)
	s.memory = footprint.Keep(restAfter, footprint.Config{
		Busy: func() bool { return false }, // a step that runs needs none of it
		Rest: func() {},
		Tell: func(err error) { s.log.Warn("memory of the supervisor stays larger than it needs to be", "error", err) },
	})
}

func (s *server) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed, at the end
		}
		go s.talk(newConn(c))
	}
}

// talk serves a connection to its end.
func (s *server) talk(c *conn) {
	var telling sync.WaitGroup
	defer telling.Wait()
	defer c.Close()
	var st *step // that of the connection
	defer func() {
		if st != nil {
			st.detach(c)
		}
	}()
	for {
		var req request
		if err := c.dec.Decode(&req); err != nil {
			return
		}
		var err error
		switch {
		case req.Run != nil:
			if st, err = s.start(c, *req.Run); err == nil {
				telling.Go(func() { st.tell(c) })
			}
		case req.Attach != "":
			if st = s.find(req.Attach); st != nil {
				st.attach(c)
				telling.Go(func() { st.tell(c) })
			} else {
				err = ErrUnclaimed
			}
		case req.Cancel && st != nil:
			st.cancel(context.Canceled)
		case req.Done && st != nil:
			s.forget(st)
			st = nil
		case req.List:
			err = c.send(reply{Steps: s.list(), Listed: true})
		}
		if err != nil {
			err = c.send(reply{Exit: newExit(executor.Usage{}, err)})
		}
		if err != nil {
			return
		}
	}
}

// start begins a run that c follows.
func (s *server) start(c *conn, r runRequest) (*step, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	st := &step{
		Step: Step{ID: r.Process.ID, Note: r.Note, Started: time.Now()}, srv: s, cancel: cancel, conn: c, over: make(chan struct{}),
	}
	st.changed.L = &st.mu
	st.log = steplog.NewWriter(s.cfg.Dir, st.printed)
	if err := s.add(st); err != nil {
		cancel(nil)
		return nil, err
	}
	p := r.Process
	p.Stdout, p.Stderr = st.log.Stream(1), st.log.Stream(2)
	s.running.Go(func() {
		defer cancel(nil)
		st.ended(newExit(s.exec.Run(ctx, p)))
		s.memory.Used(restAfter)
	})
	s.memory.Used(restAfter)
	return st, nil
}

func (s *server) add(st *step) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		return errors.New("internal error: a step for a supervisor whose daemon has gone")
	case s.steps[st.ID] != nil:
		return fmt.Errorf("internal error: a step %s is there already", st.ID)
	}
	s.steps[st.ID] = st
	return nil
}

func (s *server) find(id string) *step {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.steps[id]
}

func (s *server) list() (out []Step) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.steps {
		out = append(out, st.Step)
	}
	return out
}

func (s *server) forget(st *step) {
	s.mu.Lock()
	if s.steps[st.ID] == st {
		delete(s.steps, st.ID)
		s.emptyLocked()
	}
	s.mu.Unlock()
	if err := st.close(); err != nil {
		s.log.Warn("close the log of a step", "step", st.ID, "error", err)
	}
}

// close has the supervisor end after its last step.
func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	s.emptyLocked()
}

func (s *server) emptyLocked() {
	if s.closing && len(s.steps) == 0 {
		close(s.empty)
	}
}
