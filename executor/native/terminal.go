//go:build linux && (amd64 || arm64)

package native

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// terminal opens a terminal in the container's own devpts, sends its master to
// whoever listens at the socket, and makes it standard input, output and
// error. Of a first process it is the container's /dev/console, too.
func (m *member) terminal(first bool) error {
	t := m.s.Terminal
	if t.Socket == nil {
		return nil
	}
	master, err := m.reserve()
	if err != nil {
		return err
	}
	peer, err := m.reserve()
	if err != nil {
		return err
	}
	open := m.Call("/dev/ptmx", unix.SYS_OPENAT, atCWD, m.String("/dev/ptmx"), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	open.Into(m.Call("number", unix.SYS_DUP3, 0, uintptr(master), unix.O_CLOEXEC), 0)
	m.Call("unlock", unix.SYS_IOCTL, uintptr(master), unix.TIOCSPTLCK, m.Words(0))
	open = m.Call("open peer", unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	open.Into(m.Call("number", unix.SYS_DUP3, 0, uintptr(peer), unix.O_CLOEXEC), 0)
	if t.Height != 0 || t.Width != 0 {
		m.Call("size", unix.SYS_IOCTL, uintptr(master), unix.TIOCSWINSZ, m.Words(uintptr(t.Height)|uintptr(t.Width)<<16))
	}
	if first {
		const console = "/dev/console"
		m.Call(console, unix.SYS_OPENAT, atCWD, m.String(console), unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o666).Tolerate(unix.EEXIST, unix.EROFS)
		tree := m.Call(console, unix.SYS_OPEN_TREE, uintptr(peer), m.String(""), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		tree.Into(m.attach(-1, console), 0)
	}
	m.Call("control", unix.SYS_IOCTL, uintptr(peer), unix.TIOCSCTTY, 0)
	m.send(int(t.Socket.Fd()), master)
	m.stdio([3]int{peer, peer, peer})
	return nil
}

// send passes a file of the child through a socket, with a name as runc does.
func (m *member) send(socket, fd int) {
	rights := unix.UnixRights(fd)
	const name = "/dev/ptmx"
	iov := m.Words(m.String(name), uintptr(len(name)))
	msg := unix.Msghdr{Iovlen: 1, Controllen: uint64(len(rights))}
	words := unsafe.Slice((*uintptr)(unsafe.Pointer(&msg)), unsafe.Sizeof(msg)/unsafe.Sizeof(uintptr(0)))
	words[unsafe.Offsetof(msg.Iov)/8], words[unsafe.Offsetof(msg.Control)/8] = iov, m.Bytes(rights)
	m.Call("send to console socket", unix.SYS_SENDMSG, uintptr(socket), m.Words(words...), unix.MSG_NOSIGNAL)
}
