package executor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/internal/cleanup"
	"golang.org/x/sys/unix"
)

// stdio connects a process to readers and writers through pipes.
type stdio struct {
	child     [3]int        // the process's ends; -1 is its own /dev/null
	undo      cleanup.Stack // closes the process's ends
	inputs    []*os.File    // our ends
	outputs   []*os.File
	stdin     io.Reader
	reading   sync.WaitGroup // copies stdin
	*terminal                // instead of pipes
	writing   sync.WaitGroup // copy stdout and stderr

	mu  sync.Mutex // guards err
	err error      // of a writer
}

// copyBuffers are for output; most steps print little.
var copyBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// newStdio makes the pipes of p, or what its terminal will come through. The
// caller must call started or abort.
func newStdio(p Process) (_ *stdio, err error) {
	s := &stdio{child: [3]int{-1, -1, -1}, stdin: p.Stdin, terminal: &terminal{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make pipes: %w", err), s.abort())
		}
	}()
	if p.Terminal {
		return s, s.expectTerminal(p.Stdout)
	}
	if p.Stdin != nil {
		if err := s.pipe(0); err != nil {
			return nil, err
		}
	}
	for i, w := range []io.Writer{1: p.Stdout, 2: p.Stderr} {
		switch {
		case w == nil: // so is standard input here
		case i == 2 && sameWriter(p.Stdout, p.Stderr):
			s.child[2] = s.child[1] // keeps the order, and the writer sees one write at a time
		default:
			if err = s.pipe(i); err == nil {
				out := s.outputs[len(s.outputs)-1]
				s.writing.Go(func() { s.copyOut(w, out) })
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return s, nil
}

// sameWriter compares like os/exec: not all writers can be compared.
func sameWriter(a, b io.Writer) (same bool) {
	defer func() { recover() }() //nolint:errcheck // of incomparable types
	return a != nil && a == b
}

func (s *stdio) setChild(i, fd int) {
	s.child[i] = fd
	s.undo.Add(func() error { return unix.Close(fd) })
}

// pipe makes our end non-blocking and leaves the process's as programs expect
// it.
func (s *stdio) pipe(i int) error {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	theirs, ours := fds[1], fds[0]
	if i == 0 {
		theirs, ours = ours, theirs
	}
	s.setChild(i, theirs)
	if err := unix.SetNonblock(ours, true); err != nil {
		return errors.Join(err, unix.Close(ours))
	}
	f := os.NewFile(uintptr(ours), fmt.Sprintf("stdio%d", i))
	if i == 0 {
		s.inputs = append(s.inputs, f)
	} else {
		s.outputs = append(s.outputs, f)
	}
	return nil
}

// copyOut copies what the process prints to w.
func (s *stdio) copyOut(w io.Writer, r *os.File) {
	defer r.Close() // after an error of w, so that the process gets SIGPIPE instead of blocking
	conn, err := r.SyscallConn()
	if err == nil {
		err = copyAll(w, conn)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if err = r.SetReadDeadline(time.Time{}); err == nil {
			err = copyRest(w, conn)
		}
	}
	// A terminal that nobody has open any more ends with EIO.
	if err == nil || r == s.master && errors.Is(err, unix.EIO) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = errors.Join(s.err, fmt.Errorf("copy output: %w", err))
}

func copyAll(w io.Writer, r syscall.RawConn) error {
	for {
		if n, err := copySome(w, r, true); n == 0 || err != nil {
			return err
		}
	}
}

// restSize is more than what is in a pipe when its last writer has ended; a writer
// that isn't the process could go on for ever.
const restSize = 1 << 20

// copyRest copies what is in r, without waiting for more: the last words of a
// process that was told to end.
func copyRest(w io.Writer, r syscall.RawConn) error {
	for rest := restSize; rest > 0; {
		n, err := copySome(w, r, false)
		if errors.Is(err, unix.EAGAIN) || n == 0 && err == nil {
			return nil
		}
		if err != nil {
			return err
		}
		rest -= n
	}
	return nil
}

// copySome copies what can be read at once, which is nothing at r's end. Only
// while there is something does it have a buffer: many steps can run, and most are
// silent most of the time.
func copySome(w io.Writer, r syscall.RawConn, wait bool) (n int, err error) {
	var buf *[32 << 10]byte
	release := func() {
		copyBuffers.Put(buf)
		buf = nil
	}
	var rerr error
	err = r.Read(func(fd uintptr) bool {
		buf = copyBuffers.Get().(*[32 << 10]byte)
		n, rerr = unix.Read(int(fd), buf[:])
		for rerr == unix.EINTR {
			n, rerr = unix.Read(int(fd), buf[:])
		}
		if rerr == unix.EAGAIN && wait {
			release()
			return false
		}
		return true
	})
	if buf == nil { // it ended waiting
		return 0, err
	}
	defer release()
	if err = errors.Join(err, rerr); err != nil || n == 0 {
		return 0, err
	}
	_, err = w.Write(buf[:n])
	return n, err
}

// started closes the process's ends, which it has copies of, and starts to
// feed it.
func (s *stdio) started() error {
	if s.console != nil {
		if err := s.receiveTerminal(); err != nil {
			return errors.Join(err, s.undo.Run())
		}
	}
	s.typeInput()
	for _, in := range s.inputs {
		s.reading.Go(func() {
			// An error is the process's choice not to read, or the reader's end.
			io.Copy(in, s.stdin) //nolint:errcheck
			in.Close()
		})
	}
	return s.undo.Run()
}

// ended waits until all output has been handed over. When ctx has ended, that is
// what has been written until now.
func (s *stdio) ended(ctx context.Context) error {
	for _, in := range s.inputs {
		in.Close()
	}
	s.closeInput()
	if c, ok := s.stdin.(io.Closer); ok {
		c.Close() // ends a blocked Read
		s.reading.Wait()
	}
	stop := context.AfterFunc(ctx, func() {
		for _, out := range s.outputs {
			out.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // closed already
		}
	})
	s.writing.Wait()
	stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// files are copies of the process's ends, which undo closes; nil where it is to
// have its own /dev/null.
func (s *stdio) files(undo *cleanup.Stack) (files [3]*os.File, err error) {
	for i, fd := range s.child {
		if fd < 0 {
			continue
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return files, err
		}
		files[i] = os.NewFile(uintptr(dup), "stdio")
		undo.Add(files[i].Close)
	}
	return files, nil
}

// abort gives up pipes that no process got.
func (s *stdio) abort() error {
	err := s.undo.Run()
	for _, in := range s.inputs {
		err = errors.Join(err, in.Close())
	}
	s.writing.Wait() // the outputs have no writer left
	return err
}
