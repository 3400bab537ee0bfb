package executor

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// newBridge is newStdio for a process that a runtime binary attends to: its
// terminal is the runtime's to copy to and from one of the machine's, which the
// runtime gets for its own.
func newBridge(p Process) (_ *stdio, err error) {
	if !p.Terminal {
		return newStdio(p)
	}
	s := &stdio{child: [3]int{-1, -1, -1}, stdin: p.Stdin, terminal: &terminal{output: p.Stdout}}
	if s.output == nil {
		s.output = io.Discard
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make terminal for OCI runtime: %w", err), s.abort())
		}
	}()
	master, err := os.OpenFile("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer master.Close()
	slave, err := openSlave(int(master.Fd()))
	if err != nil {
		return nil, err
	}
	s.setChild(0, slave)
	s.child[1], s.child[2] = slave, slave
	own, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return s, s.copyTerminal(own)
}

// openSlave opens the other end of a terminal, which passes on what is written as
// it is, as it will once the runtime copies.
func openSlave(master int) (int, error) {
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, fmt.Errorf("unlock: %w", err)
	}
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, fmt.Errorf("open the other end: %w", errno)
	}
	slave := int(fd)
	if err := makeRaw(slave); err != nil {
		return -1, errors.Join(fmt.Errorf("make raw: %w", err), unix.Close(slave))
	}
	return slave, nil
}

// makeRaw is cfmakeraw of the C library.
func makeRaw(fd int) error {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}
