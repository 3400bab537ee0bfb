package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/steplog"
	"golang.org/x/sys/unix"
)

// Config is what a Client is made from.
type Config struct {
	Dir      string   // for the directories of supervisors, this daemon's alone
	Command  []string // that calls Main, with one argument more
	Executor executor.Config
	// Unclaimed is how long a step goes on without a daemon.
	Unclaimed time.Duration
	Log       *slog.Logger
}

// Client is a daemon's end. All methods are safe for concurrent use.
type Client struct {
	cfg     Config
	leaving atomic.Bool

	mu     sync.Mutex // guards the fields below; never held across I/O
	proc   *process   // the supervisor, or the one that has ended last; nil before the first step
	closed bool
}

// process is a supervisor that this daemon has started.
type process struct {
	dir   string
	ready chan struct{} // closed when it listens, or err is set
	gone  chan struct{} // closed when it has ended
	err   error
	life  *os.File
	cmd   *exec.Cmd

	mu   sync.Mutex // guards idle
	idle []*conn
}

// New returns a client whose supervisor is started for its first step: a daemon
// that has none yet does without the memory. Another one is started if it ends.
func New(cfg Config) *Client {
	cfg.Executor.Log = nil
	return &Client{cfg: cfg}
}

// launch starts a supervisor, without waiting for it.
func (c *Client) launch() *process {
	p := &process{ready: make(chan struct{}), gone: make(chan struct{})}
	go func() {
		defer close(p.gone)
		err := p.start(c.cfg)
		p.err = err
		close(p.ready)
		if p.cmd == nil || p.cmd.Process == nil {
			return
		}
		werr := p.cmd.Wait()
		if err == nil && werr != nil {
			c.cfg.Log.Error("the supervisor of steps has ended", "error", werr, "log", lastLines(p.dir))
		}
	}()
	return p
}

// start starts the supervisor and waits until it is ready. If it has returned an
// error, p.cmd is nil or is being killed.
func (p *process) start(cfg Config) (err error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return fmt.Errorf("directory for supervisors: %w", err)
	}
	if p.dir, err = os.MkdirTemp(dir, ""); err != nil {
		return fmt.Errorf("directory for the supervisor: %w", err)
	}
	arg, err := json.Marshal(config{Dir: p.dir, Executor: cfg.Executor, Unclaimed: cfg.Unclaimed})
	if err != nil {
		return fmt.Errorf("encode configuration of the supervisor: %w", err)
	}
	out, err := os.Create(filepath.Join(p.dir, logName))
	if err != nil {
		return fmt.Errorf("log of the supervisor: %w", err)
	}
	defer out.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("lifeline of the supervisor: %w", err)
	}
	p.life = os.NewFile(uintptr(pair[0]), "lifeline")
	theirs := os.NewFile(uintptr(pair[1]), "lifeline")
	defer theirs.Close()
	p.cmd = exec.Command(cfg.Command[0], append(cfg.Command[1:len(cfg.Command):len(cfg.Command)], string(arg))...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = "/", out, out
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start the supervisor: %w", err)
	}
	theirs.Close() // so that its end is seen
	answer, err := bufio.NewReader(p.life).ReadString('\n')
	if answer = strings.TrimSpace(answer); answer != ready {
		p.cmd.Process.Kill() //nolint:errcheck // it has ended, then
		return fmt.Errorf("the supervisor has ended at its start: %s %s", answer, lastLines(p.dir))
	}
	return err
}

// lastLines are those of a supervisor's log.
func lastLines(dir string) string {
	data, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil {
		return ""
	}
	const most = 2 << 10
	return strings.TrimSpace(string(data[max(0, len(data)-most):]))
}

// Expect starts the supervisor if there is none, and doesn't wait for it: a step
// is to run soon. What goes wrong, the step meets.
func (c *Client) Expect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.currentLocked()
	}
}

// currentLocked returns the supervisor, which may still be starting.
func (c *Client) currentLocked() *process {
	if c.proc == nil || c.proc.ended() {
		c.proc = c.launch()
	}
	return c.proc
}

// use returns a supervisor that runs.
func (c *Client) use(ctx context.Context) (*process, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, errors.New("internal error: a step for a supervisor that was closed")
	}
	p := c.currentLocked()
	c.mu.Unlock()
	select {
	case <-p.ready:
		return p, p.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *process) ended() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

func (p *process) conn() (*conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle); n > 0 {
		c := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return c, nil
	}
	return dial(p.dir)
}

func (p *process) put(c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = append(p.idle, c)
}

// ErrLeft: the daemon is ending, and has left the step to the next one.
var ErrLeft = errors.New("the step goes on and is left to the next daemon")

// Leave has steps whose contexts end from now on go on without this daemon.
func (c *Client) Leave() { c.leaving.Store(true) }

// Run is executor.Run, in the supervisor. What the process prints is stored, and
// printed is called when it has grown; the process doesn't wait for that. If ctx
// ends after Leave, the error is ErrLeft. The caller calls done when what the
// process made is safe: until then another daemon can take it over.
func (c *Client) Run(ctx context.Context, p executor.Process, note []byte, printed func(steplog.Extent)) (_ executor.Usage, done func(), err error) {
	if p.Stdin != nil || p.Stdout != nil || p.Stderr != nil {
		return executor.Usage{}, nil, errors.New("internal error: a process with streams of its own for a supervisor")
	}
	proc, err := c.use(ctx)
	if err != nil {
		return executor.Usage{}, nil, err
	}
	cn, err := proc.conn()
	if err != nil {
		return executor.Usage{}, nil, fmt.Errorf("connect to the supervisor: %w", err)
	}
	f := &follower{conn: cn, dir: proc.dir, printed: printed, leaving: &c.leaving, put: proc.put}
	return f.follow(ctx, request{Run: &runRequest{Process: p, Note: note}})
}

// follower follows a step over a connection.
type follower struct {
	conn    *conn
	dir     string
	printed func(steplog.Extent)
	parts   int // of the log, whose files have come
	leaving *atomic.Bool
	put     func(*conn) // takes the connection back
}

func (f *follower) follow(ctx context.Context, begin request) (_ executor.Usage, done func(), err error) {
	if err := f.conn.send(begin); err != nil {
		return executor.Usage{}, nil, errors.Join(fmt.Errorf("ask the supervisor to run a step: %w", err), f.conn.Close())
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		if f.leaving.Load() || f.conn.send(request{Cancel: true}) != nil {
			f.conn.Close() // an error is that it was closed
		}
	})
	x, err := f.read()
	if !stop() {
		<-interrupted
	}
	switch {
	case err != nil && ctx.Err() != nil && f.leaving.Load():
		return executor.Usage{}, nil, fmt.Errorf("%w: %w", ErrLeft, context.Cause(ctx))
	case err != nil:
		return executor.Usage{}, nil, errors.Join(f.died(err), context.Cause(ctx), f.conn.Close())
	}
	done = func() {
		if f.conn.send(request{Done: true}) != nil {
			f.conn.Close()
			return
		}
		f.put(f.conn)
	}
	err = x.result()
	if err != nil {
		done()
		done = nil
	}
	if err != nil && ctx.Err() != nil {
		if _, exited := errors.AsType[*executor.ExitError](err); !exited {
			err = context.Cause(ctx)
		}
	}
	return x.Usage, done, err
}

// died is the error for a supervisor that can't be read from.
func (f *follower) died(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		err = errors.New("it was killed, or has crashed; kilnd's log says how, and a new build starts another")
	}
	if said := lastLines(f.dir); said != "" {
		err = fmt.Errorf("%w; its last words: %s", err, said)
	}
	return fmt.Errorf("the supervisor has ended, and the step with it: %w", err)
}

// read tells of what the step prints, until it has ended.
func (f *follower) read() (*exit, error) {
	for {
		var r reply
		if err := f.conn.dec.Decode(&r); err != nil {
			return nil, err
		}
		if r.Log != nil {
			files, err := f.conn.take(len(r.Log.Parts) - f.parts)
			if err != nil {
				return nil, err
			}
			f.parts = len(r.Log.Parts)
			f.printed(r.Log.With(files))
			for _, file := range files {
				file.Close() // it was read only
			}
		}
		if r.Exit != nil {
			return r.Exit, nil
		}
	}
}

// endTimeout is how long a supervisor without steps may take to end.
const endTimeout = 30 * time.Second

// Close ends the supervisor and waits for that, unless it has steps left.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	p := c.proc
	c.mu.Unlock()
	if p == nil {
		return nil
	}
	<-p.ready
	if p.life != nil {
		p.life.Close() // it can't fail
	}
	p.mu.Lock()
	for _, cn := range p.idle {
		cn.Close()
	}
	p.mu.Unlock()
	if c.leaving.Load() {
		return nil
	}
	timer := time.NewTimer(endTimeout)
	defer timer.Stop()
	select {
	case <-p.gone:
		return nil
	case <-timer.C:
		p.cmd.Process.Kill() //nolint:errcheck // it has just ended, then
		<-p.gone
		return fmt.Errorf("the supervisor of steps did not end within %s and was killed: %s", endTimeout, lastLines(p.dir))
	}
}
