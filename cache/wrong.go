package cache

import (
	"context"
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// Distrust takes records whose files turned out to be wrong out of use, and
// with them every record that is built on one of them: they are no longer
// handed out, their layers are no longer shared, and they are removed at once,
// or when nothing holds them any more. Ids that there are no records of are
// fine. It returns the records that it took out of use.
func (m *Manager) Distrust(ids []string, why error) []string {
	m.mu.Lock()
	users := map[*record][]*record{}
	for _, r := range m.records {
		for _, n := range r.needs() {
			users[n] = append(users[n], r)
		}
	}
	var work []*record
	for _, id := range ids {
		if r := m.records[id]; r != nil {
			work = append(work, r)
		}
	}
	var taken []string
	var handles []*Ref
	seen := map[*record]bool{}
	for len(work) > 0 {
		r := work[len(work)-1]
		work = work[:len(work)-1]
		if seen[r] {
			continue
		}
		seen[r] = true
		work = append(work, users[r]...)
		if r.broken {
			continue
		}
		r.lost, r.broken = why, true
		m.unindexLocked(r)
		taken = append(taken, r.id)
		r.handles++
		handles = append(handles, m.newRef(r))
	}
	m.mu.Unlock()
	for _, h := range handles {
		h.Release() // the last one removes the record
	}
	slices.Sort(taken)
	return taken
}

// distrustSnapshot takes out of use what stands on a snapshot whose files were
// changed.
func (m *Manager) distrustSnapshot(snap string, why error) {
	m.distrustSnapshots([]string{snap}, why)
}

// distrustSnapshots takes out of use what stands on snapshots whose files aren't
// what was written, and returns the records whose own they are.
func (m *Manager) distrustSnapshots(snaps []string, why error) (owners []string) {
	wrong := make(map[string]bool, len(snaps))
	for _, snap := range snaps {
		wrong[snap] = true
	}
	m.mu.Lock()
	for id, r := range m.records {
		if wrong[r.snap] {
			owners = append(owners, id)
			m.log.Warn("cache record is lost", "record", id, "description", r.opts.Description, "error", why)
		}
	}
	m.mu.Unlock()
	taken := m.Distrust(owners, why)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range append(taken, owners...) {
		if r := m.records[id]; r != nil {
			r.changed = true
		}
	}
	return owners
}

// Local reports whether the record can be made visible without fetching
// anything.
func (r *Ref) Local() bool {
	if r == nil || r.m.snapOf(r.r) != "" {
		return true
	}
	lazy := r.m.lazy(r.r)
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	return !slices.ContainsFunc(lazy, func(l *record) bool {
		return l.layers == nil && !slices.ContainsFunc(l.blobs, func(b blob) bool { return b.stored })
	})
}

// checkChanged returns ErrLost if files of the record, or of one that it is
// built on, are known to have changed: a handle on it is of no use any more.
func (m *Manager) checkChanged(r *record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.changed {
		return fmt.Errorf("%w: %s is out of use: %w", ErrLost, r.id, r.lost)
	}
	return nil
}

// Witness tells whether what is read of a record is what was committed. What
// isn't is taken out of use.
type Witness struct {
	ref *Ref
	w   *snapshot.Witness
}

// Witness returns one of the record, which must have been extracted. It is good
// while the handle is held.
func (r *Ref) Witness(ctx context.Context) (*Witness, error) {
	w, err := snapshot.OpenWitness(r.m.snapshots, r.m.snapOf(r.r))
	if err != nil {
		return nil, r.m.lostSnapshot(ctx, r.r, err)
	}
	return &Witness{r, w}, nil
}

// Dir returns ErrLost if entries of the directory path were removed or added.
func (w *Witness) Dir(ctx context.Context, path string) error {
	return w.lost(ctx, w.w.Dir(path))
}

// File returns ErrLost if the file path, described by st, was written.
func (w *Witness) File(ctx context.Context, path string, st *unix.Stat_t) error {
	return w.lost(ctx, w.w.File(path, st))
}

func (w *Witness) lost(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	return w.ref.m.lostSnapshot(ctx, w.ref.r, err)
}

// Read is Dir or File, for who has described the file or directory path in st
// anyway, and reads what was looked at before: see snapshot.Witness.
func (w *Witness) Read(ctx context.Context, path string, st *unix.Stat_t) error {
	return w.lost(ctx, w.w.Read(path, st))
}

// Close ends it.
func (w *Witness) Close() error {
	return w.w.Close()
}
