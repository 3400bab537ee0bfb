//go:build linux

package network

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// membership is one executor's use of the networks of a directory. Executors
// with the same directory share a bridge: a daemon, and what still runs for an
// earlier one. The first finds what a crash has left and removes it, the last
// removes all.
//
// A file in the directory is there from the first to the last, and after a
// crash. Each member has it locked, and by this the kernel tells who is alive.
// To come and to go takes a lock on the directory.
type membership struct {
	dir   string
	users *os.File
}

func usersFile(dir string) string { return filepath.Join(dir, "users") }

// join calls setUp and tells it whether there is no other member.
func join(dir string, setUp func(alone bool) error) (_ *membership, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for networks: %w", err)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	m := &membership{dir: dir}
	if m.users, err = os.OpenFile(usersFile(dir), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("remember that networks are in use: %w", err)
	}
	alone, err := m.aloneSoon()
	if err == nil {
		err = setUp(alone)
	}
	if err == nil {
		err = lock(m.users, unix.LOCK_SH)
	}
	if err != nil {
		return nil, errors.Join(err, m.end(alone))
	}
	return m, nil
}

// leave calls tearDown and tells it whether no other member is left.
func (m *membership) leave(tearDown func(alone bool) error) error {
	unlock, err := lockDir(m.dir)
	if err != nil {
		return err
	}
	defer unlock()
	alone, err := m.alone()
	if err == nil {
		err = tearDown(alone)
	}
	return errors.Join(err, m.end(alone && err == nil))
}

// sweep removes what a crash has left, for executors that use no network here.
func sweep(dir string, cfg Config, log *slog.Logger) error {
	if _, err := os.Stat(usersFile(dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	m, err := join(dir, func(alone bool) error {
		if !alone {
			return nil
		}
		return removeLeft(dir, cfg, log)
	})
	if err != nil {
		return err
	}
	return m.leave(func(bool) error { return nil })
}

// removeLeft removes what a crash has left of any kind of network.
func removeLeft(dir string, cfg Config, log *slog.Logger) error {
	if err := removeBridge(dir); err != nil {
		return fmt.Errorf("remove the bridge of an earlier run: %w", err)
	}
	removeLeftCNI(dir, cfg.CNIBinaries, log)
	return nil
}

// alone locks the file against all others, if there are none.
func (m *membership) alone() (bool, error) {
	err := lock(m.users, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// forkWait is how long what a killed member was just starting may have the file
// locked, too: from fork to exec.
const (
	forkWait  = 200 * time.Millisecond
	forkRetry = 5 * time.Millisecond
)

// aloneSoon is alone that doesn't take such a process for a member.
func (m *membership) aloneSoon() (bool, error) {
	again := time.NewTicker(forkRetry)
	defer again.Stop()
	for end := time.Now().Add(forkWait); ; <-again.C {
		if alone, err := m.alone(); alone || err != nil || time.Now().After(end) {
			return alone, err
		}
	}
}

// end closes the file, and removes it if nothing is left that it tells of.
func (m *membership) end(last bool) error {
	err := m.users.Close()
	if _, serr := os.Stat(cniDir(m.dir)); last && errors.Is(serr, fs.ErrNotExist) {
		err = errors.Join(err, os.Remove(usersFile(m.dir)))
	}
	return err
}

func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock directory for networks: %w", err)
	}
	if err := lock(f, unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil //nolint:errcheck // nothing was written
}

func lock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil || err == unix.EWOULDBLOCK {
			return err
		}
		if err != unix.EINTR {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// lockInit takes the lock that keeps daemons from setting up networks at the
// same time, if there is one.
func lockInit() (unlock func(), err error) {
	name := os.Getenv("BUILDKIT_CNI_INIT_LOCK_PATH")
	if name == "" {
		return func() {}, nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock BUILDKIT_CNI_INIT_LOCK_PATH: %w", err)
	}
	if err := lock(f, unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil //nolint:errcheck // nothing was written
}
