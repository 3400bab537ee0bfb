package supervisor

import (
	"bufio"
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/steplog"
	"golang.org/x/sys/unix"
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
	Log    *steplog.Extent // what the step has printed so far; the files of new parts come with it
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
	*net.UnixConn
	dec   *gob.Decoder
	files []*os.File // that came with what dec has read; of who reads

	mu  sync.Mutex // guards the fields below; held while a message is written
	enc *gob.Encoder
	buf bytes.Buffer // what enc writes to
}

func newConn(c net.Conn) *conn {
	out := &conn{UnixConn: c.(*net.UnixConn)}
	// Each running step has a connection: a small buffer, not gob's own of 4 KiB.
	out.dec, out.enc = gob.NewDecoder(bufio.NewReaderSize(out, 512)), gob.NewEncoder(&out.buf)
	return out
}

// send sends a message, and files with it.
func (c *conn) send(message any, files ...*os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Reset()
	if err := c.enc.Encode(message); err != nil {
		return err
	}
	if len(files) == 0 {
		_, err := c.UnixConn.Write(c.buf.Bytes())
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	n, _, err := c.WriteMsgUnix(c.buf.Bytes(), unix.UnixRights(fds...), nil)
	if err == nil && n < c.buf.Len() {
		_, err = c.UnixConn.Write(c.buf.Bytes()[n:])
	}
	runtime.KeepAlive(files)
	return err
}

// maxFiles is how many files come with a message at most: a log has fewer parts.
const maxFiles = 8

// Read reads for dec, and keeps the files that come with it.
func (c *conn) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, _, _, err := c.ReadMsgUnix(p, oob)
	if oobn > 0 {
		messages, perr := unix.ParseSocketControlMessage(oob[:oobn])
		err = errors.Join(err, perr)
		for _, m := range messages {
			fds, perr := unix.ParseUnixRights(&m)
			err = errors.Join(err, perr)
			for _, fd := range fds {
				c.files = append(c.files, os.NewFile(uintptr(fd), "file of the supervisor"))
			}
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

// take returns the next n files. Those of later messages may be there already, for
// dec reads ahead.
func (c *conn) take(n int) ([]*os.File, error) {
	if n < 0 || n > len(c.files) {
		return nil, fmt.Errorf("internal error: %d files came with a message, not %d", len(c.files), n)
	}
	files := c.files[:n:n]
	c.files = c.files[n:]
	return files, nil
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
