package cache

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// FullError is an error that a full disk is to blame for, with the numbers that
// tell what to do about it. All are bytes.
type FullError struct {
	Err        error
	Root       string // a directory on the disk
	Free, Size int64  // of the disk; free without what was being written
	Cache      int64  // what records take
	Unused     int64  // of that, what prune could remove
}

func (e *FullError) Error() string {
	size := func(n int64) string { return units.BytesSize(float64(n)) }
	advice := "nothing of that can be removed while it is in use; make room on the disk"
	if e.Unused > 0 {
		advice = fmt.Sprintf("`buildctl prune --all` would free %s", size(e.Unused))
	}
	return fmt.Sprintf("%v: the disk that holds %s is full: more is needed than the %s of %s that are free; the cache takes %s: %s",
		e.Err, e.Root, size(e.Free), size(e.Size), size(e.Cache), advice)
}

func (e *FullError) Unwrap() error { return e.Err }

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// WithRoom calls fn, which writes to the disk. If the disk is full, it applies
// the rules of the garbage collection, and calls fn once more if that has freed
// anything, or if what was removed before has gone meanwhile. If the disk fails, it
// calls fn once more when it is known what was lost with that. What fn wrote before
// it failed must be gone when it returns. If the disk stays full the error is a
// *FullError.
func (m *Manager) WithRoom(ctx context.Context, fn func() error) error {
	// A disk of which nobody can say what is free has no room that came.
	before, _, ferr := m.statfs()
	err := fn()
	if known := (*FullError)(nil); errors.As(err, &known) {
		m.awaitRemovals(ctx)
		return err
	}
	if isFailure(err) {
		return m.afterFailure(ctx, err, fn)
	}
	if !isFull(err) {
		if errors.Is(err, syscall.EROFS) {
			err = m.withFailed(err)
		}
		return err
	}
	freed, gcErr := m.makeRoom(ctx)
	if ctx.Err() != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	// What fn has begun to write is being removed: without it, what is free is
	// less than what was needed. On a disk that is full to the last byte even
	// that may fail, and the numbers are as of now.
	m.awaitRemovals(ctx)
	if freed == 0 && ferr == nil {
		freed = m.cameSince(before)
	}
	m.log.Warn("the disk is full", "error", err, "freed", freed)
	if freed > 0 {
		if err = fn(); !isFull(err) {
			return err
		}
		m.awaitRemovals(ctx)
	}
	return errors.Join(m.full(ctx, err), gcErr)
}

// worthTrying is how much room must have come for what didn't fit to be tried again:
// more than what the daemon itself writes and removes all the time.
const worthTrying = 1 << 20

// cameSince is how much more is free than before; 0 if it is hardly more. The files of
// what a prune removed go after it has ended, and who asked for it goes on at once.
func (m *Manager) cameSince(before int64) int64 {
	free, _, err := m.statfs()
	if came := free - before; err == nil && came >= worthTrying {
		return came
	}
	return 0
}

// awaitRemovals waits until what didn't fit is off the disk: who is told of a full disk
// and tries something smaller must not meet it.
func (m *Manager) awaitRemovals(ctx context.Context) {
	if err := m.removed(ctx); err != nil {
		m.log.Warn("remove what didn't fit on the disk", "error", err)
	}
}

// makeRoom applies the rules, and waits until what they free is free.
func (m *Manager) makeRoom(ctx context.Context) (freed int64, err error) {
	err = m.Collect(ctx, m.rules, func(u Usage) error {
		freed += u.Size
		return nil
	})
	if err == nil && freed > 0 {
		err = m.removed(ctx)
	}
	if err != nil {
		return freed, fmt.Errorf("make room on the disk: %w", err)
	}
	return freed, nil
}

// nearlyFull is how little free space makes a full disk the likely cause of
// what fails: a process doesn't say why it failed.
const nearlyFull = 4 << 20

// SuspectDisk adds to the error of a process, which may have failed because the
// disk is full or has failed, what is so.
func (m *Manager) SuspectDisk(ctx context.Context, err error) error {
	free, _, serr := m.statfs()
	if serr != nil || free >= nearlyFull {
		return m.withFailed(err)
	}
	return m.full(ctx, err)
}

// full adds the numbers to err. Where they can't be had it is err.
func (m *Manager) full(ctx context.Context, err error) error {
	free, size, serr := m.statfs()
	if serr != nil {
		return errors.Join(err, serr)
	}
	e := &FullError{Err: err, Root: m.root, Free: free, Size: size}
	usage, uerr := m.DiskUsage(ctx, nil, 0)
	if uerr != nil {
		return errors.Join(err, uerr)
	}
	for _, u := range usage {
		e.Cache += u.Size
		if !u.InUse {
			e.Unused += u.Size
		}
	}
	return e
}

// statfs tells the free bytes of the disk and all.
func (m *Manager) statfs() (free, size int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.root, &st); err != nil {
		return 0, 0, fmt.Errorf("free space of %s: %w", m.root, err)
	}
	return int64(st.Bfree) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}
