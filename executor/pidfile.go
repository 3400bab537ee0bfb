package executor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pidFile is a file that a runtime writes the number of a process to once that
// has been started.
type pidFile struct {
	name   string
	events *os.File // of its directory
}

// expectPid watches for the file, which isn't there yet.
func expectPid(name string) (*pidFile, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch for %s: %w", name, err)
	}
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(name), unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO); err != nil {
		return nil, errors.Join(fmt.Errorf("watch for %s: %w", name, err), unix.Close(fd))
	}
	return &pidFile{name, os.NewFile(uintptr(fd), "inotify")}, nil
}

// wait waits for the file to be written, or for close.
func (f *pidFile) wait() (pid int, err error) {
	for buf := make([]byte, 4096); pid == 0 && err == nil; {
		if _, err = f.events.Read(buf); err == nil {
			pid, err = f.read()
		}
	}
	return pid, err
}

// read returns what the file says, 0 if it isn't there yet.
func (f *pidFile) read() (int, error) {
	b, err := os.ReadFile(f.name)
	if text := strings.TrimSpace(string(b)); err == nil && text != "" {
		return strconv.Atoi(text)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return 0, err
}

// close ends a wait that is under way.
func (f *pidFile) close() error { return f.events.Close() }

// openBelow opens the process pid, which ancestor or what it has started is the
// parent of as long as ancestor runs: nobody else can have the number. It is -1
// for one that has ended.
func openBelow(pid, ancestor int) (pidfd int, err error) {
	pidfd, err = unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	for p := pid; p != ancestor; {
		if p = parentOf(p); p <= 1 { // it has ended, and the number may be another's
			return -1, unix.Close(pidfd)
		}
	}
	return pidfd, nil
}

// parentOf is the parent of the process pid, 0 if it has ended.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// pid (any name) state parent
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return 0
	}
	return parent
}
