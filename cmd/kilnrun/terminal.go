//go:build linux && (amd64 || arm64)

package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// terminal connects a process's terminal with this one's. All methods of a nil
// one do nothing.
type terminal struct {
	ours, theirs *os.File // a socket pair, for the master
	master       console.Console
	own          console.Console // nil if standard input isn't one
	copied       chan error      // output has ended
}

func newTerminal() (*terminal, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make console socket: %w", err)
	}
	return &terminal{ours: os.NewFile(uintptr(pair[0]), "console"), theirs: os.NewFile(uintptr(pair[1]), "console")}, nil
}

// socket is for the process to send its terminal to.
func (t *terminal) socket() *os.File {
	if t == nil {
		return nil
	}
	return t.theirs
}

// attach receives the terminal and starts to copy.
func (t *terminal) attach() error {
	if t == nil {
		return nil
	}
	f, err := receive(t.ours)
	if err != nil {
		return err
	}
	if t.master, err = console.ConsoleFromFile(f); err != nil {
		return fmt.Errorf("terminal of the process: %w", err)
	}
	// Input that is no terminal is passed on as it is.
	if own, err := console.ConsoleFromFile(os.Stdin); err == nil {
		if err := own.SetRaw(); err != nil {
			return fmt.Errorf("make own terminal raw: %w", err)
		}
		t.own = own
		t.resize()
	}
	t.copied = make(chan error, 1)
	go func() { io.Copy(t.master, os.Stdin) }() //nolint:errcheck // ends with this process: a read from a terminal can't be ended
	go func() {
		_, err := io.Copy(os.Stdout, t.master)
		if errors.Is(err, unix.EIO) { // its last user has ended
			err = nil
		}
		t.copied <- err
	}()
	return nil
}

// receive returns the file that comes through a socket.
func receive(socket *os.File) (*os.File, error) {
	name, oob := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(socket.Fd()), name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive terminal: %d messages came: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive terminal: %d files came: %w", len(fds), err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// resize gives the process's terminal the size of this one.
func (t *terminal) resize() {
	if t == nil || t.own == nil || t.master == nil {
		return
	}
	t.master.ResizeFrom(t.own) //nolint:errcheck // it keeps its size
}

// close waits for the rest of the output.
func (t *terminal) close() error {
	if t == nil {
		return nil
	}
	errs := []error{t.ours.Close(), t.theirs.Close()}
	if t.copied != nil {
		errs = append(errs, <-t.copied)
	}
	if t.own != nil {
		errs = append(errs, t.own.Reset())
	}
	if t.master != nil {
		errs = append(errs, t.master.Close())
	}
	return errors.Join(errs...)
}
