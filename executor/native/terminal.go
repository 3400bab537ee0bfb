//go:build linux && (amd64 || arm64)

package native

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// terminal opens a terminal in the container's own devpts, sends its master to
// whoever listens at the socket, and makes it standard input, output and
// error. Of a first process it is the container's /dev/console, too.
// reserveTerminal comes before it.
func (b *builder) terminal(t Terminal, first bool) error {
	if t.Socket == nil {
		return nil
	}
	master, peer := b.master, b.peer
	step := b.Call("/dev/ptmx", unix.SYS_OPENAT, atCWD, b.String("/dev/ptmx"), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	step.Into(b.Call("number", unix.SYS_DUP3, 0, uintptr(master), unix.O_CLOEXEC), 0)
	b.Call("unlock", unix.SYS_IOCTL, uintptr(master), unix.TIOCSPTLCK, b.Words(0))
	step = b.Call("open peer", unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	step.Into(b.Call("number", unix.SYS_DUP3, 0, uintptr(peer), unix.O_CLOEXEC), 0)
	if t.Height != 0 || t.Width != 0 {
		b.Call("size", unix.SYS_IOCTL, uintptr(master), unix.TIOCSWINSZ, b.Words(uintptr(t.Height)|uintptr(t.Width)<<16))
	}
	if first {
		const console = "/dev/console"
		b.Call(console, unix.SYS_OPENAT, atCWD, b.String(console), unix.O_CREAT|unix.O_EXCL|unix.O_RDONLY|unix.O_CLOEXEC, 0o666).Tolerate(unix.EEXIST, unix.EROFS)
		tree := b.Call(console, unix.SYS_OPEN_TREE, uintptr(peer), b.String(""), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
		tree.Into(b.attach(-1, console), 0)
	}
	b.Call("control", unix.SYS_IOCTL, uintptr(peer), unix.TIOCSCTTY, 0)
	b.send(int(t.Socket.Fd()), master)
	b.stdio([3]int{peer, peer, peer})
	return nil
}

// reserveTerminal reserves numbers for both ends of a terminal, if there is to be
// one. open is any file that is open.
func (b *builder) reserveTerminal(t Terminal, open int) (err error) {
	if t.Socket == nil {
		return nil
	}
	if b.master, err = b.reserve(open); err == nil {
		b.peer, err = b.reserve(open)
	}
	return err
}

// terminalFiles are those that must be open, or free, when the terminal is made.
func (b *builder) terminalFiles(t Terminal) []int {
	if t.Socket == nil {
		return nil
	}
	return []int{int(t.Socket.Fd()), b.master, b.peer}
}

// send passes a file of the child through a socket, with a name as runc does.
func (b *builder) send(socket, fd int) {
	rights := unix.UnixRights(fd)
	const name = "/dev/ptmx"
	iov := b.Words(b.String(name), uintptr(len(name)))
	msg := unix.Msghdr{Iovlen: 1, Controllen: uint64(len(rights))}
	words := unsafe.Slice((*uintptr)(unsafe.Pointer(&msg)), unsafe.Sizeof(msg)/unsafe.Sizeof(uintptr(0)))
	words[unsafe.Offsetof(msg.Iov)/8], words[unsafe.Offsetof(msg.Control)/8] = iov, b.Bytes(rights)
	b.Call("send to console socket", unix.SYS_SENDMSG, uintptr(socket), b.Words(words...), unix.MSG_NOSIGNAL)
}
