package cache

import "slices"

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
