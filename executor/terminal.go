package executor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// endOfFile is what is typed at a terminal when there is no more input.
const endOfFile = 4

// terminal is the other end of a process's terminal. The process opens it in
// its own /dev/pts, so that it has a name there, and sends it here. Runtime
// binaries keep it, and copy between it and one of the machine's.
type terminal struct {
	console *os.File  // the process's end of the socket that it is sent through
	socket  int       // ours
	output  io.Writer // gets what the process prints
	master  *os.File  // once it was received
}

// expectTerminal makes the socket.
func (s *stdio) expectTerminal(output io.Writer) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("make socket for terminal: %w", err)
	}
	if output == nil {
		output = io.Discard
	}
	s.socket, s.console, s.output = pair[0], os.NewFile(uintptr(pair[1]), "console"), output
	s.undo.Add(s.console.Close)
	s.undo.Add(func() error { return unix.Close(s.socket) })
	return nil
}

// receiveTerminal takes the terminal, which a process that executed its program
// has sent, and begins to copy.
func (s *stdio) receiveTerminal() error {
	fd, err := receiveFile(s.socket)
	if err != nil {
		return fmt.Errorf("receive terminal: %w", err)
	}
	return s.copyTerminal(fd)
}

// copyTerminal begins to copy what is printed on a terminal.
func (s *stdio) copyTerminal(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return errors.Join(fmt.Errorf("terminal: %w", err), unix.Close(fd))
	}
	s.master = os.NewFile(uintptr(fd), "terminal")
	s.outputs = append(s.outputs, s.master)
	s.writing.Go(func() { s.copyOut(s.output, s.master) })
	return nil
}

// typeInput begins to type input at the terminal.
func (s *stdio) typeInput() {
	if s.master != nil && s.stdin != nil {
		s.reading.Go(func() {
			// An error is the end of the terminal, or of the reader.
			if _, err := io.Copy(s.master, s.stdin); err == nil {
				s.master.Write([]byte{endOfFile}) //nolint:errcheck // likewise
			}
		})
	}
}

// receiveFile takes a file that was sent already.
func receiveFile(socket int) (int, error) {
	data, control := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, data, control, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:n])
	if err != nil {
		return -1, err
	}
	if len(messages) != 1 {
		return -1, fmt.Errorf("internal error: %d control messages instead of one", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// closeInput gives up writing to the terminal, which goes on being read.
func (t *terminal) closeInput() {
	if t.master != nil {
		t.master.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // it is closed, then
	}
}

// resize sets the size. A terminal that is gone is fine.
func (t *terminal) resize(rows, cols uint16) error {
	if t.master == nil {
		return nil
	}
	raw, err := t.master.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	set := func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	}
	if raw.Control(set) != nil {
		return nil // closed
	}
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}
