package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Around is a group around that of a container whose runtime removes it when the
// container ends. It has the limits of memory, so that it is here that memory
// runs out, and what was used can be read here afterwards.
type Around struct {
	*Group
	// Inside is the container's group, for the runtime to make, without limits of
	// memory.
	Inside *Group
	oom    *os.File // version 1: an eventfd that counts how often memory ran out
}

// Around makes such a group. The caller removes it.
func (m *Manager) Around(spec Spec) (_ *Around, err error) {
	outer, err := m.Reserve(spec)
	if err != nil {
		return nil, err
	}
	a := &Around{Group: outer, Inside: m.existing(filepath.Join(outer.path, "container"))}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Remove())
		}
	}()
	for _, d := range outer.dirs {
		if d.h == nil || !d.has("memory") { // version 2 counts what is inside
			continue
		}
		if a.oom, err = countOOM(d.path); err != nil {
			return nil, err
		}
	}
	return a, outer.limit(Limits{Memory: spec.Limits.Memory, MemorySwap: spec.Limits.MemorySwap})
}

// countOOM returns an eventfd that counts how often the memory of the version 1
// group dir, or of one above it, runs out: its own counter doesn't count what
// is killed in groups inside it.
func countOOM(dir string) (_ *os.File, err error) {
	control, err := os.Open(filepath.Join(dir, "memory.oom_control"))
	if err != nil {
		return nil, fmt.Errorf("count lacks of memory: %w", err)
	}
	defer control.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("count lacks of memory: %w", err)
	}
	events := os.NewFile(uintptr(fd), "eventfd")
	if err := write(filepath.Join(dir, "cgroup.event_control"), fmt.Sprintf("%d %d", fd, control.Fd())); err != nil {
		return nil, errors.Join(fmt.Errorf("count lacks of memory: %w", err), events.Close())
	}
	return events, nil
}

// Usage reads the counters, once the container has ended. It is called once.
func (a *Around) Usage() (Usage, error) {
	u, err := a.Group.Usage()
	if err != nil || a.oom == nil {
		return u, err
	}
	raw, err := a.oom.SyscallConn()
	if err != nil {
		return u, fmt.Errorf("read usage: %w", err)
	}
	var rerr error
	err = raw.Control(func(fd uintptr) { u.OOMKills, rerr = readEvents(int(fd)) })
	if u.OOMKills > 0 {
		u.OOMLimit = a.memoryLimit()
	}
	return u, errors.Join(err, rerr)
}

// readEvents reads an eventfd.
func readEvents(fd int) (int64, error) {
	var b [8]byte
	_, err := unix.Read(fd, b[:])
	if errors.Is(err, unix.EAGAIN) { // nothing has happened
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read events: %w", err)
	}
	return int64(binary.NativeEndian.Uint64(b[:])), nil
}

// Remove kills what is left inside, and removes the group.
func (a *Around) Remove() error {
	err := a.Group.Remove()
	if a.oom != nil {
		err = errors.Join(err, a.oom.Close())
	}
	return err
}
