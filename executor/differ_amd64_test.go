package executor

import "golang.org/x/sys/unix"

// riskyNames are risky calls that other architectures don't have.
func riskyNames() []uintptr {
	return []uintptr{unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_PAUSE, unix.SYS_SELECT, unix.SYS_ALARM, unix.SYS_URETPROBE, unix.SYS_UPROBE}
}
