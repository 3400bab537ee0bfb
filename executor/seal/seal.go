//go:build linux && (amd64 || arm64)

// Package seal keeps containers from the program that makes them.
//
// A container whose program is /proc/self/exe, or has it as its interpreter,
// executes the file of whoever made it: that is what a process on its way into
// a container is, before its own execve. From there it could open the file for
// writing and change what the machine's root runs next, as runc's was in 2019.
// So the file is executed from a mount of it alone, which is read-only and
// attached nowhere. That costs no copy of it.
package seal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/kernel"
	"github.com/kilnbuild/kiln/executor/nofile"
	"golang.org/x/sys/unix"
)

const self = "/proc/self/exe"

// Self returns in a process that executes its program from a read-only mount.
// In another one it executes the program once more, with the same arguments and
// environment, so it has to come before everything that can't be done twice.
func Self() error {
	err := seal()
	if errors.Is(err, unix.EPERM) {
		return errors.New("protect own program from containers: that needs root")
	}
	if err != nil {
		return fmt.Errorf("protect own program from containers: %w", err)
	}
	return nil
}

func seal() error {
	var fs unix.Statfs_t
	if err := unix.Statfs(self, &fs); err != nil {
		return fmt.Errorf("look at own program: %w", err)
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		// Kernels before 6.14 call a program after the number of its file.
		return os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, self, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone mount of own program: %w", err)
	}
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if errors.Is(err, unix.ENOSYS) {
		return kernel.TooOld()
	}
	if err != nil {
		return fmt.Errorf("make mount of own program read-only: %w", err)
	}
	return execFD(fd, os.Args, os.Environ())
}

// execFD executes the open file.
func execFD(fd int, args, env []string) error {
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return err
	}
	envp, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	empty := []byte{0}
	// The limit of open files that Go raised has to be the original one again.
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: nofile.Limit.Cur, Max: nofile.Limit.Max}); err != nil {
		return fmt.Errorf("restore limit of open files: %w", err)
	}
	_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	runtime.KeepAlive(argv)
	runtime.KeepAlive(envp)
	return fmt.Errorf("execute own program: %w", errno)
}
