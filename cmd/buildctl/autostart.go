package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/internal/rootless"
)

// privateIdle is how long a private daemon stays without a client.
const privateIdle = 5 * time.Minute

// defaultAddresses are where daemons listen when nothing is said: this user's
// own, if it is an ordinary user, and the machine's.
func defaultAddresses() []string {
	return slices.Compact([]string{rootless.Defaults().Address, rootless.Machine().Address})
}

// findDaemon returns the address to use when none is given: a default one if a
// daemon listens there that this user may use, else that of a private daemon,
// which is started when it doesn't run yet.
func findDaemon(ctx context.Context, noAutostart bool, timeout time.Duration) (addr, why string, err error) {
	defaults := defaultAddresses()
	for _, addr := range defaults {
		if dial(ctx, addr) == nil {
			return addr, "the default", nil
		}
	}
	nobody := "no daemon listens at " + strings.Join(defaults, " or ")
	p, err := privateDaemon()
	if err != nil {
		return "", "", err
	}
	if dial(ctx, p.addr()) == nil {
		return p.addr(), "private, running", nil
	}
	if noAutostart {
		return "", "", fmt.Errorf("%s and --no-autostart is given; start kilnd, or name another with --addr", nobody)
	}
	if err := p.start(ctx, timeout); err != nil {
		return "", "", fmt.Errorf("%s, and a private one can't be started: %w", nobody, err)
	}
	return p.addr(), "private, just started", nil
}

// private is this user's own daemon.
type private struct {
	run   string // directory of socket, lock and log
	state string // state directory
}

func privateDaemon() (private, error) {
	run := os.Getenv("XDG_RUNTIME_DIR")
	if run == "" {
		run = filepath.Join(os.TempDir(), "kiln-"+strconv.Itoa(os.Getuid()))
	} else {
		run = filepath.Join(run, "kiln")
	}
	state := os.Getenv("XDG_DATA_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return private{}, fmt.Errorf("find a place for a private daemon's state: %w", err)
		}
		state = filepath.Join(home, ".local", "share")
	}
	return private{run: run, state: filepath.Join(state, "kiln")}, nil
}

func (p private) addr() string { return "unix://" + filepath.Join(p.run, "kilnd.sock") }

// start runs the daemon unless another client does so at the same moment, and
// waits until it listens.
func (p private) start(ctx context.Context, timeout time.Duration) error {
	if err := p.ownRunDir(); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(p.run, "start.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // which lets go of the lock
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	if dial(ctx, p.addr()) == nil {
		return nil
	}
	logPath := filepath.Join(p.run, "kilnd.log")
	exited, err := p.spawn(logPath)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	up := make(chan error, 1)
	go func() { up <- reachable(ctx, p.addr(), timeout, true) }()
	select {
	case err := <-up:
		if err != nil {
			return fmt.Errorf("%w; its log is %s; with --timeout, it has longer to start", err, logPath)
		}
		return nil
	case err := <-exited:
		cancel()
		<-up
		log, _ := os.ReadFile(logPath) // what isn't readable can't be shown
		return fmt.Errorf("kilnd ended at once: %w\n%s", err, log)
	}
}

// ownRunDir makes the directory of the socket and refuses one that another user
// made: its socket could be anyone's.
func (p private) ownRunDir() error {
	if err := os.MkdirAll(p.run, 0o700); err != nil {
		return err
	}
	st, err := os.Lstat(p.run)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || !st.IsDir() || int(sys.Uid) != os.Getuid() || st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s must be a directory of this user's own, with mode 0700", p.run)
	}
	return nil
}

// spawn starts kilnd in a session of its own. exited gets its end, as long as
// this program lives.
func (p private) spawn(logPath string) (exited <-chan error, err error) {
	bin, err := findKilnd()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(bin, "--root", p.state, "--addr", p.addr(), "--idle-exit", privateIdle.String())
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ch := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		ch <- err
	}()
	return ch, nil
}

// findKilnd looks beside this program, then in PATH.
func findKilnd() (string, error) {
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), "kilnd"); fileExists(beside) {
			return beside, nil
		}
	}
	path, err := exec.LookPath("kilnd")
	if err != nil {
		return "", fmt.Errorf("kilnd is neither beside buildctl nor in PATH: %w", err)
	}
	return path, nil
}
