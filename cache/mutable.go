package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// Mutable is the one handle on a writable record. The holder ends it with
// Commit, Release or Discard; a further call of one of these does nothing, so
// that Release can be deferred. A Commit that fails leaves the handle as it was.
type Mutable struct {
	m *Manager
	r *record

	mu    sync.Mutex // guards spent; held while the handle ends
	spent bool
}

// ID names the record. Commit keeps it.
func (u *Mutable) ID() string { return u.r.id }

// Mounts says how to make the record visible for writing, or only for reading.
func (u *Mutable) Mounts(ctx context.Context, readonly bool) ([]mount.Mount, error) {
	mounts, err := u.m.snapshots.Mounts(ctx, u.r.snap, readonly)
	if err == nil {
		err = checkMounts(mounts)
	}
	if err != nil {
		return nil, u.m.lostSnapshot(ctx, u.r, fmt.Errorf("mounts of %s: %w", u.r.id, err))
	}
	return mounts, nil
}

// Open is Mounts, for writing, and snapshot.Open in one.
func (u *Mutable) Open(ctx context.Context) (*snapshot.View, error) {
	mounts, err := u.Mounts(ctx, false)
	if err != nil {
		return nil, err
	}
	view, err := snapshot.Open(mounts)
	if err != nil {
		return nil, u.m.lostSnapshot(ctx, u.r, fmt.Errorf("open %s: %w", u.r.id, err))
	}
	return view, nil
}

// Place returns where something new can get into the record at path without a
// mount, nil if it takes one; see snapshot.Snapshotter. The record must not be
// mounted until the Place is closed.
func (u *Mutable) Place(ctx context.Context, path string) (*snapshot.Place, error) {
	p, err := u.m.snapshots.Place(ctx, u.r.snap, path)
	if err != nil {
		return nil, u.m.lostSnapshot(ctx, u.r, fmt.Errorf("find a place in %s: %w", u.r.id, err))
	}
	return p, nil
}

// Commit makes the record immutable, without copying, and returns a handle on
// it. The mutable handle is spent.
func (u *Mutable) Commit(ctx context.Context) (*Ref, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.spent {
		return nil, fmt.Errorf("internal error: commit of %s, whose handle is spent", u.r.id)
	}
	m, r := u.m, u.r
	if err := m.snapshots.Commit(ctx, r.snap); err != nil {
		return nil, m.lostSnapshot(ctx, r, fmt.Errorf("commit %s: %w", r.id, err))
	}
	u.spent = true
	m.mu.Lock()
	r.state = immutable
	r.open = false
	m.changedLocked(r)
	m.mu.Unlock()
	m.flush(flushChanged)
	m.grown()
	return m.newRef(r), nil
}

// Release gives the handle back: a retained record stays, any other goes.
func (u *Mutable) Release(ctx context.Context) error { return u.end(false) }

// Discard removes the record, retained or not.
func (u *Mutable) Discard(ctx context.Context) error { return u.end(true) }

func (u *Mutable) end(discard bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.spent {
		return nil
	}
	u.spent = true
	u.m.mu.Lock()
	if discard {
		u.r.opts.Retain = false
	}
	changed := u.r.open && u.r.opts.Retain
	if changed {
		u.r.open = false
		u.m.changedLocked(u.r)
	}
	u.m.mu.Unlock()
	if changed {
		u.m.flush(flushChanged)
	}
	u.m.grown() // what stays may have been written to
	return u.m.release(u.r)
}

// Metadata and SetMetadata are those of Ref.
func (u *Mutable) Metadata(key string) ([]byte, bool) { return u.m.metadata(u.r, key) }

// SetMetadata stores value beside the record, which keeps it; nil removes it.
// If the process dies before the handle is ended, a retained record comes back
// without any metadata, since its files may have changed after that was set.
func (u *Mutable) SetMetadata(key string, value []byte) { u.m.setMetadata(u.r, key, value) }

// GetMutable returns the one handle on a retained mutable record, or on an
// immutable one that nothing else holds: ErrLocked if it is in use.
//
// An immutable record loses its id (the new one is in the handle), its blobs
// and its place in the key store, so that nothing that pointed at its old
// content finds the new one. This is on disk before GetMutable returns.
func (m *Manager) GetMutable(ctx context.Context, id string) (*Mutable, error) {
	r, was, err := m.seize(id)
	if err != nil {
		return nil, err
	}
	u := &Mutable{m: m, r: r}
	if was == immutable {
		if err := m.reopen(ctx, r); err != nil {
			return nil, fmt.Errorf("reopen %s: %w", id, err)
		}
	} else {
		if !m.hasMetadata(r) {
			return u, nil
		}
		m.mu.Lock()
		r.open = true
		m.changedLocked(r)
		m.mu.Unlock()
		m.flush(flushChanged)
	}
	if err := m.db.Sync(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("reopen %s: %w", id, err), u.Release(ctx))
	}
	return u, nil
}

// seize takes the only handle on a record and makes it mutable.
func (m *Manager) seize(id string) (r *record, was state, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r = m.records[id]
	switch {
	case r == nil:
		return nil, 0, fmt.Errorf("%w: %s", ErrNotFound, id)
	case r.lost != nil:
		return nil, 0, fmt.Errorf("%w: %s was lost: %v", ErrNotFound, id, r.lost)
	case r.handles > 0 || r.children > 0:
		return nil, 0, fmt.Errorf("%w: %s", ErrLocked, id)
	case !r.owns() || r.layers != nil:
		return nil, 0, fmt.Errorf("%w: %s has no files of its own to write to", ErrLocked, id)
	}
	was = r.state
	r.state, r.handles, r.snapSize = mutable, 1, sizeUnknown
	return r, was, nil
}

// reopen makes the snapshot of a seized record writable and gives the record
// its new identity. On failure the record is released.
func (m *Manager) reopen(ctx context.Context, r *record) error {
	if err := m.snapshots.Reopen(ctx, r.snap); err != nil {
		m.mu.Lock()
		r.state = immutable
		m.mu.Unlock()
		return errors.Join(m.lostSnapshot(ctx, r, err), m.release(r))
	}
	m.rename(r)
	return nil
}

// rename gives r a new id and takes from it what belonged to its old content.
func (m *Manager) rename(r *record) {
	m.writes.Lock()
	defer m.writes.Unlock()
	m.blobsMu.Lock()
	defer m.blobsMu.Unlock()

	b := &store.Batch{}
	m.mu.Lock()
	old := r.id
	m.unindexChainLocked(r)
	delete(m.records, old)
	r.id = newID()
	m.records[r.id] = r
	r.diffID, r.chain, r.blobChain = "", "", ""
	free := m.unuseBlobsLocked(r.blobs)
	r.blobs, r.sources = nil, nil
	r.open = true
	m.changedLocked(r)
	m.mu.Unlock()

	if r.persisted {
		b.Delete(bucketRecords, old)
		m.callHooks(b, []string{old})
	}
	if err := joinProblems("reopen "+old, m.removeBlobs(b, free)); err != nil {
		m.log.Error("remove blobs of reopened cache record", "record", old, "error", err)
	}
	m.putLocked(b, flushChanged, nil)
	m.db.Write(b)
}
