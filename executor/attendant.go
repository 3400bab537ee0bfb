package executor

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attendant is a command of a runtime, run or exec, that starts a process, copies
// its terminal, and ends as it does.
type attendant struct {
	cmd  *exec.Cmd
	io   *stdio
	pid  *pidFile   // nil if nobody asks for the process itself
	done chan error // of cmd
	log  string     // of the runtime's errors

	mu sync.Mutex // guards fd, and that it isn't closed while it is used
	fd int        // pidfd of the process; -1 if it has ended or isn't known
}

// attendTo starts cmd with the process's ends of io. What it needs is given up if
// that fails.
func attendTo(cmd *exec.Cmd, io *stdio, pid *pidFile) (*attendant, error) {
	a := &attendant{cmd: cmd, io: io, pid: pid, done: make(chan error, 1), fd: -1}
	if io.master != nil { // the runtime learns of its size as the terminal's owner
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	}
	if err := startWith(cmd, io); err != nil {
		err = errors.Join(fmt.Errorf("start %s: %w", cmd.Path, err), io.abort())
		if pid != nil {
			err = errors.Join(err, pid.close())
		}
		return nil, err
	}
	go func() { a.done <- cmd.Wait() }()
	return a, nil
}

// wait waits for the end, calling started, if it isn't nil, once the process
// runs, and kill when ctx ends.
func (a *attendant) wait(ctx context.Context, started func(), kill func(), exit *exit) error {
	var up chan error
	if a.pid != nil {
		up = make(chan error, 1)
		go func() { up <- a.open(a.pid.wait()) }()
	}
	var err error
	for running := true; running; {
		select {
		case uerr := <-up:
			up = nil
			if err = errors.Join(err, uerr); uerr == nil && started != nil {
				started()
			}
		case werr := <-a.done:
			running = false
			err = errors.Join(err, notExit(werr))
		case <-ctx.Done():
			running = false
			exit.killed = true
			kill()
			err = errors.Join(err, notExit(<-a.done))
		}
	}
	exit.code = a.cmd.ProcessState.ExitCode()
	exit.usage.CPU = a.cmd.ProcessState.UserTime() + a.cmd.ProcessState.SystemTime()
	return errors.Join(err, a.end(up, started))
}

// notExit is err of waiting for a command, unless that is only its exit code.
func notExit(err error) error {
	var status *exec.ExitError
	if errors.As(err, &status) {
		return nil
	}
	return err
}

// end lets go of the process. One that has ended at once is one that was started.
func (a *attendant) end(up chan error, started func()) error {
	if a.pid == nil {
		return nil
	}
	err := a.pid.close()
	if up != nil {
		<-up // nil, or that it was closed
		if pid, _ := a.pid.read(); pid != 0 && started != nil {
			started()
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fd >= 0 {
		err = errors.Join(err, unix.Close(a.fd))
		a.fd = -1
	}
	return err
}

// open opens the process that the runtime has started.
func (a *attendant) open(pid int, err error) error {
	if err != nil {
		return fmt.Errorf("process of %s: %w", a.cmd.Path, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fd, err = openBelow(pid, a.cmd.Process.Pid)
	return err
}

// signal sends sig to the process. One that has ended is fine.
func (a *attendant) signal(sig unix.Signal) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fd < 0 {
		return nil
	}
	if err := unix.PidfdSendSignal(a.fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send signal %d: %w", sig, err)
	}
	return nil
}

// resize sets the size of the terminal that the process has as one of its
// streams, if it has one.
func (a *attendant) resize(rows, cols uint16) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for stream := 0; stream <= 2 && a.fd >= 0 && a.io.master != nil; stream++ {
		fd, err := unix.PidfdGetfd(a.fd, stream, 0)
		if err != nil { // it is closed, or the process has ended
			continue
		}
		if isTerminal(fd) {
			return errors.Join(unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}), unix.Close(fd))
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	return nil
}

// isTerminal reports whether fd is one that a devpts file system has made.
func isTerminal(fd int) bool {
	const first, last = 136, 143 // major numbers
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return false
	}
	major := unix.Major(st.Rdev)
	return first <= major && major <= last
}

// kill tries one way after the other to end the process.
func (a *attendant) kill(grace time.Duration, ways ...func()) {
	for _, try := range ways {
		try()
		if a.within(grace) {
			return
		}
	}
}

// startError finds out whether the runtime failed rather than the process of t.
func (a *attendant) startError(t *task, exit exit) error {
	return startError(a.log, t.p.Args[0], t.watch.stderr.lines(), exit.code)
}

// within reports whether the command ends in time.
func (a *attendant) within(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case err := <-a.done:
		a.done <- err // for wait
		return true
	case <-timer.C:
		return false
	}
}
