//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with loopback up. Whoever takes one from a
// Provider ends its use with either Release or Discard, once.
type Namespace struct {
	file    *os.File
	sockets *os.File // sockstat, as a process in the namespace reads it
	devices *os.File // as with sockets, what each link has sent and received
	sent    string   // by each link, when the process got the namespace
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

// use remembers the state in which a process gets the namespace.
func (n *Namespace) use() { n.sent = sent(read(n.devices)) }

// untouched reports whether nothing was sent since use, not even to loopback.
// Whatever was leaves something behind for those who come later: whom it went to,
// which the kernel remembers and tells anybody (tcp_metrics, neighbors, routes),
// connections that live on for a while after their process, and answers that are
// still under way to this address. What is received unasked leaves nothing.
func (n *Namespace) untouched() bool { return n.sent != "" && n.sent == sent(read(n.devices)) }

// empty reports whether no socket is left, not even one that was handed to a
// process elsewhere.
func (n *Namespace) empty() bool { return noSockets(read(n.sockets)) }

// read returns a file of the kernel from its beginning, or nothing.
func read(f *os.File) []byte {
	for size := 1 << 10; ; size *= 4 {
		buf := make([]byte, size)
		switch n, err := f.ReadAt(buf, 0); {
		case errors.Is(err, io.EOF):
			return buf[:n]
		case err != nil:
			return nil
		}
	}
}

// sent is what each link has sent, and tried to, as /proc/net/dev tells. It is ""
// for what can't be read.
func sent(devices []byte) string {
	var out strings.Builder
	for line := range bytes.Lines(devices) {
		name, counters, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue // a heading
		}
		const received = 8 // counters before those of what was sent
		fields := bytes.Fields(counters)
		if len(fields) <= received {
			return ""
		}
		fmt.Fprintf(&out, "%s %s\n", name, bytes.Join(fields[received:], []byte(" ")))
	}
	return out.String()
}

// noSockets reads a sockstat.
func noSockets(stat []byte) bool {
	for line := range bytes.Lines(stat) {
		fields := bytes.Fields(line)
		if len(fields) == 3 && string(fields[0]) == "sockets:" && string(fields[1]) == "used" {
			return string(fields[2]) == "0"
		}
	}
	return false
}

// remove unmakes the namespace.
func (n *Namespace) remove() (err error) {
	if n.disconnect != nil {
		err = n.disconnect()
	}
	return errors.Join(err, n.close())
}

// close lets go of the namespace, which ends when nothing is in it.
func (n *Namespace) close() error {
	return errors.Join(n.devices.Close(), n.sockets.Close(), n.file.Close())
}

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
	if n.devices, err = os.Open("/proc/thread-self/net/dev"); err != nil {
		return nil, errors.Join(err, n.sockets.Close(), n.file.Close())
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
