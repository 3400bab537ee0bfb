//go:build linux && (amd64 || arm64)

package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// seal makes sure that this process executes its program from a read-only
// mount that no container can see, by executing it once more if need be.
//
// A container whose program is /proc/self/exe executes this file: what a
// process on its way into a container is, before its own execve. From there it
// could open the file for writing and change what the machine's root runs
// next. A mount of the file alone, attached nowhere and read-only, costs no
// copy of it.
func seal() error {
	const self = "/proc/self/exe"
	var fs unix.Statfs_t
	if err := unix.Statfs(self, &fs); err != nil {
		return fmt.Errorf("look at own program: %w", err)
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		return nil
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, self, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err == nil {
		err = execFD(fd, os.Args, os.Environ())
	}
	if errors.Is(err, unix.EPERM) {
		return errors.New("protect own program from containers: kilnrun needs root")
	}
	return fmt.Errorf("protect own program from containers: %w", err)
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
	if err := restoreFileLimit(); err != nil {
		return err
	}
	_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(&empty[0])),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envp[0])), unix.AT_EMPTY_PATH, 0)
	runtime.KeepAlive(argv)
	runtime.KeepAlive(envp)
	return errno
}
