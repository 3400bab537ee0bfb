//go:build linux

// Package orphans waits for processes that nobody else waits for: those that
// became children of this process because it is the first one of its PID
// namespace, as a daemon in a container may be.
//
// Such a process is told from one that this process has started by what is open
// here: os.StartProcess and package launch hold a pidfd of each child from when
// it is made until it was waited for. So nobody's exit status is taken.
package orphans

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// delay is how long after the end of a child its orphans are looked for: who
// waits for its own is done by then, and there is mostly nothing to look at.
const delay = time.Second

// Reap waits for orphans until ctx ends. It returns at once unless this process
// is the first of its PID namespace.
func Reap(ctx context.Context, log *slog.Logger) {
	if os.Getpid() != 1 {
		return
	}
	if err := check(); err != nil {
		log.Warn("processes whose parents have ended are not waited for", "error", err)
		return
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	look := time.NewTimer(0) // it may have been another program before
	defer look.Stop()
	waits := true // for look
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			if !waits {
				waits = true
				look.Reset(delay)
			}
		case <-look.C:
			var err error
			if waits, err = reap(); err != nil {
				log.Warn("wait for processes whose parents have ended", "error", err)
			}
			if waits {
				look.Reset(delay)
			}
		}
	}
}

// check fails where children can't be told apart.
func check() error {
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		return err
	}
	defer self.Release() //nolint:errcheck // it holds nothing but memory
	if err := self.WithHandle(func(uintptr) {}); err != nil {
		return fmt.Errorf("no pidfds: %w", err)
	}
	_, err = children()
	return err
}

// reap waits for orphans that have ended. It says whether a child that has ended
// is left: one that somebody else waits for, or one that the list of children
// lacked, as others were waited for while it was read.
func reap() (again bool, err error) {
	if ended, err := anyEnded(); err != nil || !ended {
		return false, err
	}
	// In this order: a child that is made in between isn't in the list, and for one
	// that is in it the pidfd is there, or it was waited for.
	pids, err := children()
	if err != nil {
		return false, err
	}
	held, err := held()
	if err != nil {
		return false, err
	}
	for _, pid := range pids {
		if held[pid] {
			continue
		}
		if _, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); err != nil && !errors.Is(err, unix.ECHILD) && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("wait for process %d: %w", pid, err)
		}
	}
	return anyEnded()
}

// anyEnded says whether there is a child to wait for.
func anyEnded() (bool, error) {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	switch {
	case errors.Is(err, unix.ECHILD):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for ended processes: %w", err)
	}
	return info.Signo != 0, nil
}

// children lists the pids of this process's children.
func children() (pids []int, err error) {
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil || len(files) == 0 {
		return nil, errors.New("/proc has no lists of children: the kernel has no CONFIG_PROC_CHILDREN, or no /proc is mounted")
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a thread that has ended
		}
		if err != nil {
			return nil, err
		}
		for field := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// held are the processes that this one has pidfds of.
func held() (map[int]bool, error) {
	const dir = "/proc/self/fdinfo"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	pids := map[int]bool{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			if text, ok := strings.CutPrefix(line, "Pid:"); ok {
				pid, err := strconv.Atoi(strings.TrimSpace(text))
				if err != nil {
					return nil, fmt.Errorf("%s/%s: %w", dir, e.Name(), err)
				}
				pids[pid] = true
			}
		}
	}
	return pids, nil
}
