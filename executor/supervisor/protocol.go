package supervisor

import (
	"encoding/gob"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/steplog"
)

// request is what a daemon sends. One of the fields is set. After Run and
// Attach the connection is the step's until Done.
type request struct {
	Run    *runRequest
	Attach string // id of a step
	Cancel bool   // end the step of this connection
	Done   bool   // forget the step of this connection; its exit has been taken
	List   bool
}

type runRequest struct {
	Process executor.Process // without stdin and writers
	Note    []byte
}

// reply is what a supervisor sends.
type reply struct {
	Log    *steplog.Extent // what the step has printed so far
	Exit   *exit
	Steps  []Step
	Listed bool
}

// Step is a step that a supervisor has.
type Step struct {
	ID      string
	Note    []byte
	Started time.Time
}

// exit is how a run ended: what executor.Run returned.
type exit struct {
	Usage   executor.Usage
	Failed  *failed // an executor.ExitError
	Err     string  // another error
	Errno   syscall.Errno
	Unknown bool // there is no such step, or it ended since nobody asked for it
}

type failed struct {
	Code  int
	Cause executor.Cause
	Err   string
}

func newExit(u executor.Usage, err error) *exit {
	x := &exit{Usage: u}
	if err == nil {
		return x
	}
	if f, ok := errors.AsType[*executor.ExitError](err); ok {
		x.Failed = &failed{Code: f.Code, Cause: f.Cause}
		if f.Err != nil {
			x.Failed.Err = f.Err.Error()
		}
		return x
	}
	x.Err = err.Error()
	if no, ok := errors.AsType[syscall.Errno](err); ok {
		x.Errno = no
	}
	x.Unknown = errors.Is(err, ErrUnclaimed)
	return x
}

// ErrUnclaimed: the step is not there, or was ended because no daemon asked for
// it in time.
var ErrUnclaimed = errors.New("the step ended because no daemon asked for it in time")

// result is what Run returns for x.
func (x *exit) result() error {
	switch {
	case x.Unknown:
		return ErrUnclaimed
	case x.Failed != nil:
		e := &executor.ExitError{Code: x.Failed.Code, Cause: x.Failed.Cause}
		if x.Failed.Err != "" {
			e.Err = errors.New(x.Failed.Err)
		}
		return e
	case x.Err != "":
		return &remoteError{x.Err, x.Errno}
	}
	return nil
}

// remoteError is an error of an executor in another process.
type remoteError struct {
	text  string
	errno syscall.Errno
}

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// conn is a connection between the two. Gob tells types once, so connections are
// used again.
type conn struct {
	net.Conn
	dec *gob.Decoder

	mu  sync.Mutex // guards enc; held while a message is written
	enc *gob.Encoder
}

func newConn(c net.Conn) *conn {
	return &conn{Conn: c, dec: gob.NewDecoder(c), enc: gob.NewEncoder(c)}
}

func (c *conn) send(message any) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.enc.Encode(message)
}

// A supervisor's directory.
const (
	socketName   = "s"
	executorName = "executor"
	logName      = "log"
)

// socketAt calls fn with a path of the socket in dir that is short enough to be
// the address of one.
func socketAt(dir string, fn func(path string) error) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return fn(filepath.Join(fmt.Sprintf("/proc/self/fd/%d", d.Fd()), socketName))
}

func dial(dir string) (*conn, error) {
	var c net.Conn
	err := socketAt(dir, func(path string) (err error) {
		c, err = net.Dial("unix", path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return newConn(c), nil
}

// lockDir waits until no supervisor uses dir, and keeps others off as long as the
// file is open. It is os.ErrNotExist if dir was removed meanwhile.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory of the supervisor: %w", err)
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if err != syscall.EINTR {
			break
		}
	}
	if err == nil {
		_, err = os.Stat(dir)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock directory of the supervisor: %w", err), f.Close())
	}
	return f, nil
}
