package executor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// killStrays ends the runtime processes that an earlier daemon started with the
// given --root and a crash left: they aren't in the cgroups of steps, and one
// that has just begun would make a container after everything else is cleaned
// up. A daemon that used such a runtime has made the directory state before.
func killStrays(state string) error {
	if _, err := os.Lstat(state); errors.Is(err, os.ErrNotExist) {
		return nil // looking at all processes would take longer than all else here
	}
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range procs {
		if !startedWith(path, state) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return fmt.Errorf("internal error: %s names no process", path)
		}
		if err := killStray(pid, path, state); err != nil {
			errs = append(errs, fmt.Errorf("end runtime process %d of an earlier run: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// startedWith reports whether a command line has the arguments --root state.
func startedWith(cmdline, state string) bool {
	data, err := os.ReadFile(cmdline) // an error means that it has ended
	return err == nil && bytes.Contains(data, []byte("\x00--root\x00"+state+"\x00"))
}

// strayTimeout is how long a killed process may take to end, in milliseconds.
const strayTimeout = 5000

func killStray(pid int, cmdline, state string) error {
	return killIf(pid, func() bool { return startedWith(cmdline, state) })
}

// killIf kills the process pid, and returns when it has ended, if right says that
// it is meant; it is asked when nobody else can get the number any more.
func killIf(pid int, right func() bool) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !right() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	polls := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(polls, strayTimeout)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("it goes on after being killed")
		}
		return err
	}
}
