package cache

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
)

// Ref is a counted handle on an immutable record. The holder calls Release
// exactly once. A nil *Ref stands for the empty filesystem (scratch): every
// method except ID is defined on it.
type Ref struct {
	m        *Manager
	r        *record
	released atomic.Bool
}

// ID names the record, across restarts.
func (r *Ref) ID() string { return r.r.id }

// Clone returns a further handle.
func (r *Ref) Clone() *Ref {
	if r == nil {
		return nil
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.r.handles++
	return r.m.newRef(r.r)
}

// Release gives the handle back.
func (r *Ref) Release() {
	if r == nil {
		return
	}
	if r.released.Swap(true) {
		r.m.log.Error("internal error: cache handle released twice", "record", r.r.id)
		return
	}
	if err := r.m.release(r.r); err != nil {
		r.m.log.Error("release cache record", "record", r.r.id, "error", err)
	}
}

// Parent returns a new handle on the parent, nil if there is none. A record
// that stacks others has none.
func (r *Ref) Parent() *Ref {
	if r == nil || r.r.parent() == nil {
		return nil
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	p := r.r.parent()
	p.handles++
	return r.m.newRef(p)
}

// ChainID is the chain ID of the stack of layers, "" while a diff ID in it is
// unknown because the layer was never made a blob.
func (r *Ref) ChainID() digest.Digest {
	if r == nil {
		return ""
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.m.refreshChainLocked(r.r)
	return r.r.chain
}

// Description is the record's description; SetDescription changes it.
func (r *Ref) Description() string {
	if r == nil {
		return ""
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	return r.r.opts.Description
}

// SetDescription changes the description that du shows.
func (r *Ref) SetDescription(text string) {
	if r == nil {
		return
	}
	r.m.mu.Lock()
	r.r.opts.Description = text
	r.m.changedLocked(r.r)
	r.m.mu.Unlock()
	r.m.flush(flushChanged)
}

// Lost returns why the record, or one that it is made of, is out of use; nil if
// none of them is known to be.
func (r *Ref) Lost() error {
	if r == nil {
		return nil
	}
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	seen := map[*record]bool{}
	for todo := []*record{r.r}; len(todo) > 0; {
		at := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[at] {
			continue
		}
		seen[at] = true
		if at.lost != nil {
			return at.lost
		}
		todo = append(append(todo, at.needs()...), at.layers...)
	}
	return nil
}

// Whole returns ErrLost if the record, or a layer that it is made of, is known to
// be out of use. Who makes something of a record without a look at its files has
// to ask: what is made of it is out of use, too.
func (r *Ref) Whole() error {
	if r == nil {
		return nil
	}
	layers := append(r.r.stack(), r.r)
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	for _, l := range layers {
		if l.lost != nil {
			return fmt.Errorf("%w: %s is out of use: %w", ErrLost, l.id, l.lost)
		}
	}
	return nil
}

// Mounts extracts if needed and says how to make the record visible,
// read-only. The mounts are good while the handle is held.
func (r *Ref) Mounts(ctx context.Context) ([]mount.Mount, error) {
	if r == nil {
		return nil, nil
	}
	if err := r.Extract(ctx); err != nil {
		return nil, err
	}
	mounts, err := r.m.snapshots.Mounts(ctx, r.m.snapOf(r.r), true)
	if err == nil {
		err = checkMounts(mounts)
	}
	if err != nil {
		return nil, r.m.lostSnapshot(ctx, r.r, fmt.Errorf("mounts of %s: %w", r.r.id, err))
	}
	return mounts, nil
}

// Open is Mounts and snapshot.Open in one.
func (r *Ref) Open(ctx context.Context) (*snapshot.View, error) {
	mounts, err := r.Mounts(ctx)
	if err != nil {
		return nil, err
	}
	view, err := snapshot.Open(mounts)
	if err != nil && r != nil {
		return nil, r.m.lostSnapshot(ctx, r.r, fmt.Errorf("open %s: %w", r.r.id, err))
	}
	return view, err
}

// Metadata returns what SetMetadata stored beside the record under key, such
// as content digests or the state of a transfer; it goes when the record goes.
// The value must not be changed.
func (r *Ref) Metadata(key string) ([]byte, bool) {
	if r == nil {
		return nil, false
	}
	return r.m.metadata(r.r, key)
}

// SetMetadata stores value beside the record, which keeps it; nil removes it.
func (r *Ref) SetMetadata(key string, value []byte) {
	if r != nil {
		r.m.setMetadata(r.r, key, value)
	}
}
