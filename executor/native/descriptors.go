//go:build linux && (amd64 || arm64)

package native

import (
	"maps"
	"math"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A child starts with a copy of every file that this process has open, among
// them directories of the machine. A path with /proc/self/fd in it, which may
// be a working directory or a symbolic link in something mounted, leads to
// them. So they are closed before the first path is followed that others chose.

// closeBut closes the files from a number on, except those needed.
func (b *builder) closeBut(from int, needed ...int) {
	for _, r := range closeRanges(from, needed) {
		b.Call("close", unix.SYS_CLOSE_RANGE, uintptr(r.first), uintptr(r.last), 0)
	}
}

// fdRange are the files from first to last.
type fdRange struct{ first, last uint32 }

// closeRanges are all numbers that aren't needed, from one on.
func closeRanges(from int, needed []int) (list []fdRange) {
	slices.Sort(needed)
	for _, fd := range needed {
		if fd > from {
			list = append(list, fdRange{uint32(from), uint32(fd - 1)})
		}
		from = max(from, fd+1)
	}
	return append(list, fdRange{uint32(from), math.MaxUint32})
}

// closeForeign leaves a step's child what the container is made from.
func (b *builder) closeForeign() error {
	needed := append([]int{b.c.Root, b.c.Alive}, b.c.Cgroup.Join...)
	if b.c.Netns >= 0 {
		needed = append(needed, b.c.Netns)
	}
	for _, m := range b.c.Cgroup.Mounts {
		needed = append(needed, m.FD)
	}
	for _, m := range b.c.Binds {
		needed = append(needed, m.FD)
	}
	needed = slices.AppendSeq(needed, maps.Values(b.c.Machine))
	needed = append(needed, b.terminalFiles(b.c.Terminal)...)
	b.closeBut(3, needed...)
	return nil
}

// closeAll leaves nothing but standard input, output and error, and what the
// last stages wait for, which is no directory.
func (b *builder) closeAll() error {
	b.closeBut(3, b.c.Alive)
	return nil
}

// stdio makes fds standard input, output and error. One of -1 is left for
// ownNull.
func (b *builder) stdio(fds [3]int) {
	for target, fd := range fds {
		if fd < 0 {
			continue
		}
		b.Call("stdio", unix.SYS_DUP3, uintptr(fd), uintptr(target), 0)
		// So that /dev/stdout can be opened by name. The machine's /dev/null stays
		// its root's.
		if uid := b.spec.Process.User.UID; uid != 0 && !isNull(fd) {
			b.Call("stdio", unix.SYS_FCHOWN, uintptr(target), uintptr(uid), ^uintptr(0)).Tolerate(unix.EPERM, unix.EINVAL, unix.EROFS)
		}
	}
}

// isNull says whether fd is a /dev/null.
func isNull(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// ownNull opens the container's own /dev/null where there is to be one: through
// the machine's, a container could change its owner and mode.
func (b *builder) ownNull(fds [3]int) {
	for target, fd := range fds {
		if fd >= 0 {
			continue
		}
		open := b.Call(os.DevNull, unix.SYS_OPENAT, atCWD, b.String(os.DevNull), unix.O_RDWR|unix.O_CLOEXEC)
		open.Into(b.Call("stdio", unix.SYS_DUP3, 0, uintptr(target), 0), 0)
	}
}
