//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with loopback up. Whoever takes one from a
// Provider ends its use with either Release or Discard, once.
type Namespace struct {
	file    *os.File
	sockets *os.File // sockstat, as a process in the namespace reads it
	path    string   // where it is mounted; "" is nowhere
	// disconnect removes what connects it to other networks; nil if nothing does.
	disconnect func() error
	port       *port // in place of disconnect, on the bridge
	named      bool  // by the user of the process that it was made for
	asks       bool  // nobody waits for the process that has it
	pool       *pool
}

// FD is open on the namespace as long as it is in use.
func (n *Namespace) FD() int { return int(n.file.Fd()) }

// Path is where other programs find the namespace.
func (n *Namespace) Path() string {
	if n.path != "" {
		return n.path
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD())
}

// Release gives the namespace back after all processes in it have ended. They
// must not have been able to change its links, addresses or rules.
func (n *Namespace) Release() { n.pool.put(n, !n.named) }

// Discard gives it back so that it is never used again.
func (n *Namespace) Discard() { n.pool.put(n, false) }

// empty reports whether no socket is left: none that was handed to a process
// elsewhere, and no connection that lives on for a while after its process.
func (n *Namespace) empty() bool {
	buf := make([]byte, 512)
	k, err := n.sockets.ReadAt(buf, 0)
	if k == 0 || err != nil && k == len(buf) {
		return false
	}
	return noSockets(buf[:k])
}

// noSockets reads a sockstat: of all kinds and of those without a file.
func noSockets(stat []byte) bool {
	used, waiting := -1, -1
	for line := range bytes.Lines(stat) {
		fields := bytes.Fields(line)
		switch {
		case len(fields) == 3 && string(fields[0]) == "sockets:" && string(fields[1]) == "used":
			used = number(fields[2])
		case len(fields) > 1 && string(fields[0]) == "TCP:":
			for i := 1; i+1 < len(fields); i += 2 {
				if string(fields[i]) == "tw" {
					waiting = number(fields[i+1])
				}
			}
		}
	}
	return used == 0 && waiting == 0
}

func number(text []byte) int {
	n, err := strconv.Atoi(string(text))
	if err != nil {
		return -1
	}
	return n
}

// remove unmakes the namespace.
func (n *Namespace) remove() (err error) {
	if n.disconnect != nil {
		err = n.disconnect()
	}
	return errors.Join(err, n.close())
}

// close lets go of the namespace, which ends when nothing is in it.
func (n *Namespace) close() error { return errors.Join(n.sockets.Close(), n.file.Close()) }

// create makes a namespace on a thread that ends with it, so that no other
// goroutine ever finds itself there. Then it calls inside on this thread.
func create(inside func(*Namespace) error) (n *Namespace, err error) {
	thread.Run(func() {
		if n, err = unshare(); err != nil {
			return
		}
		if err = inside(n); err != nil {
			err = errors.Join(err, n.close())
		}
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return n, nil
}

func unshare() (_ *Namespace, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return nil, fmt.Errorf("set loopback up: %w", err)
	}
	n := &Namespace{}
	if n.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	if n.sockets, err = os.Open("/proc/thread-self/net/sockstat"); err != nil {
		return nil, errors.Join(err, n.file.Close())
	}
	return n, nil
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}
