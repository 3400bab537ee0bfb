//go:build linux && (amd64 || arm64)

// Package again executes this process's program once more, from a read-only
// mount of it alone (see package seal), before anything else is initialised.
//
// A program that does so in its main function is initialised twice, which is a
// quarter of what a daemon with an empty state directory takes to start. So this
// package imports next to nothing: Go initialises packages as soon as their imports
// are, in the order of their paths. Whoever imports it gets that; if it isn't
// possible, as for an ordinary user, the program just goes on, and package seal
// tries again and says why.
package again

import (
	"syscall"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/nofile"
)

// What syscall doesn't know: numbers and flags of both architectures.
const (
	sysOpenTree     = 428
	sysMountSetattr = 442
	sysExecveat     = 322*amd64 + 281*(1-amd64)

	atFDCWD       = -100
	atEmptyPath   = 0x1000
	openTreeClone = 1
	mountReadOnly = 1
	stReadOnly    = 1
)

const self = "/proc/self/exe\x00"

func init() {
	if syscall.Geteuid() != 0 {
		return
	}
	args, ok := commandLine()
	if !ok {
		return
	}
	Exec(args, syscall.Environ()) // it returns if it can't, or has nothing to do
}

// Error is the step that failed.
type Error struct {
	Step string
	Err  syscall.Errno
}

func (e *Error) Error() string { return e.Step + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Exec executes the program again unless its file is on a read-only mount
// already, in which case it returns nil.
func Exec(args, env []string) *Error {
	var fs syscall.Statfs_t
	path := unsafe.Pointer(unsafe.StringData(self))
	if _, _, errno := syscall.RawSyscall(syscall.SYS_STATFS, uintptr(path), uintptr(unsafe.Pointer(&fs)), 0); errno != 0 {
		return &Error{"look at own program", errno}
	}
	if fs.Flags&stReadOnly != 0 {
		return nil
	}
	cwd := atFDCWD
	fd, _, errno := syscall.RawSyscall(sysOpenTree, uintptr(cwd), uintptr(path), openTreeClone|syscall.O_CLOEXEC)
	if errno != 0 {
		return &Error{"clone mount of own program", errno}
	}
	attr := struct{ set, clear, propagation, userNS uint64 }{set: mountReadOnly}
	empty := unsafe.Pointer(&[1]byte{})
	if _, _, errno := syscall.RawSyscall6(sysMountSetattr, fd, uintptr(empty), atEmptyPath, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0); errno != 0 {
		syscall.Close(int(fd))
		return &Error{"make mount of own program read-only", errno}
	}
	errno = execFD(fd, args, env)
	syscall.Close(int(fd))
	return &Error{"execute own program", errno}
}

// execFD executes the open file. It returns if it can't.
func execFD(fd uintptr, args, env []string) syscall.Errno {
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return syscall.EINVAL
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return syscall.EINVAL
	}
	empty := unsafe.Pointer(&[1]byte{})
	// The limit of open files that Go raised has to be the original one again.
	limit := nofile.Limit
	var raised nofile.Rlimit
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, syscall.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&limit)), uintptr(unsafe.Pointer(&raised)), 0, 0); errno != 0 {
		return errno
	}
	_, _, errno := syscall.RawSyscall6(sysExecveat, fd, uintptr(empty), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])), atEmptyPath, 0)
	syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, syscall.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&raised)), 0, 0, 0)
	return errno
}

// commandLine is what this process was started with.
func commandLine() (args []string, ok bool) {
	fd, err := syscall.Open("/proc/self/cmdline", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	defer syscall.Close(fd)
	var data []byte
	buf := make([]byte, 4096)
	for {
		n, err := syscall.Read(fd, buf)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return nil, false
		}
		if n == 0 {
			break
		}
		data = append(data, buf[:n]...)
	}
	for start, i := 0, 0; i < len(data); i++ {
		if data[i] == 0 {
			args = append(args, string(data[start:i]))
			start = i + 1
		}
	}
	return args, len(args) > 0
}
