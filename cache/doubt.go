package cache

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// doubter is a snapshotter that knows what was written when.
type doubter interface {
	Doubt(since time.Time, why error, idle map[string]bool) (lost []string)
}

// blobDoubter is a blob store that does.
type blobDoubter interface {
	Doubt(b *store.Batch, since time.Time, why error) (lost []digest.Digest, err error)
}

// doubt takes out of use what stands on files that were written since the given
// time, which the disk may have lost; see store.DB.OnDoubt. Builds that hold such
// a record find it lost and make it again.
func (m *Manager) doubt(since time.Time, why error) {
	idle, busy := m.writable(since)
	var snaps []string
	if s, ok := m.snapshots.(doubter); ok {
		snaps = s.Doubt(since, why, idle)
	}
	records := m.distrustSnapshots(snaps, why)
	m.Distrust(busy, why)
	blobs := m.doubtBlobs(since, why)
	m.log.Error("the disk has lost what was written lately; what was cached of it is dropped",
		"records", len(records)+len(busy), "blobs", blobs, "error", why)
}

// writable returns the snapshots of mutable records that nobody has written to
// since the given time, and the ids of the other mutable ones.
func (m *Manager) writable(since time.Time) (idle map[string]bool, busy []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	idle = map[string]bool{}
	for id, r := range m.records {
		switch {
		case r.state != mutable || !r.owns():
		case r.handles == 0 && r.lastUsed.Before(since):
			idle[r.snap] = true
		default:
			busy = append(busy, id)
		}
	}
	return idle, busy
}

// doubtBlobs removes blobs that were written since the given time, and returns how
// many they are.
func (m *Manager) doubtBlobs(since time.Time, why error) int {
	s, ok := m.blobs.(blobDoubter)
	if !ok {
		return 0
	}
	b := &store.Batch{}
	m.blobsMu.Lock()
	lost, err := s.Doubt(b, since, why)
	m.db.Write(b)
	m.blobsMu.Unlock()
	if err != nil {
		m.log.Error("remove blobs that may be damaged", "error", err)
	}
	if len(lost) == 0 {
		return 0
	}
	m.forgetBlobs(lost)
	m.flush(flushChanged)
	return len(lost)
}

// forgetBlobs notes that the blobs aren't stored any more.
func (m *Manager) forgetBlobs(lost []digest.Digest) {
	gone := make(map[digest.Digest]bool, len(lost))
	for _, d := range lost {
		gone[d] = true
	}
	m.mu.Lock()
	for _, r := range m.records {
		for i := range r.blobs {
			if b := &r.blobs[i]; b.stored && gone[b.desc.Digest] {
				b.stored = false
				m.changedLocked(r)
			}
		}
	}
	for d := range gone {
		delete(m.proven, d)
	}
	m.mu.Unlock()
}

// isFailure says whether the disk failed.
func isFailure(err error) bool { return errors.Is(err, syscall.EIO) }

// afterFailure calls fn, which the disk made fail with err, once more. Before, it
// has the store find out what else was lost: what is below fn may be, and the
// kernel mounts nothing for writing on a file system with losses that nobody has
// been told of.
func (m *Manager) afterFailure(ctx context.Context, err error, fn func() error) error {
	m.log.Warn("the disk failed", "error", err)
	if verr := m.db.Verify(ctx); ctx.Err() != nil {
		return errors.Join(err, verr)
	}
	err = fn()
	if isFailure(err) {
		err = fmt.Errorf("%w: the disk that holds %s fails; the kernel's log says how", err, m.root)
	}
	if err != nil {
		err = m.withFailed(err)
	}
	return err
}

// withFailed adds to err that nothing can be written to the disk any more, if that is
// so: a file system that couldn't write what it must goes read-only.
func (m *Manager) withFailed(err error) error {
	fd, werr := unix.Open(m.root, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	switch werr {
	case nil:
		unix.Close(fd) // nothing was written to it
		return err
	case syscall.EROFS, syscall.EIO:
		return fmt.Errorf("%w: the disk that holds %s has failed, and nothing can be written to it any more (%w); the kernel's log says how: stop the daemon, check and mount the file system again, and start the daemon", err, m.root, werr)
	}
	return err
}
