package cache

import (
	"context"
	"errors"
	"fmt"
)

// Interrupted describes a mutable record that a process goes on to write to
// though the manager has ended, so that the next one can take it up.
type Interrupted struct {
	Snapshot       string
	Parent         string `json:",omitempty"` // record
	ParentSnapshot string `json:",omitempty"`
	Description    string
}

// leaver is what a snapshotter must be for its snapshots to outlive a manager.
type leaver interface {
	Adopt(id, parent string) error
	Leave(id string) error
}

// Interrupted describes u for Config.Adopt of the next manager.
func (u *Mutable) Interrupted() Interrupted {
	u.m.mu.Lock()
	defer u.m.mu.Unlock()
	i := Interrupted{Snapshot: u.r.snap, Description: u.r.opts.Description}
	if p := u.r.parent(); p != nil {
		i.Parent, i.ParentSnapshot = p.id, p.snap
	}
	return i
}

// Leave ends the handle and lets the files be, for the next manager to adopt.
func (u *Mutable) Leave(ctx context.Context) error {
	u.mu.Lock()
	l, ok := u.m.snapshots.(leaver)
	u.m.mu.Lock()
	snap := u.r.snap
	leave := ok && !u.spent && !u.r.persisted && !u.r.opts.Retain
	if leave {
		u.r.snap = ""
	}
	u.m.mu.Unlock()
	u.mu.Unlock()
	if !leave {
		return fmt.Errorf("internal error: leave %s, which can't be adopted", u.r.id)
	}
	return errors.Join(l.Leave(snap), u.Discard(ctx))
}

// Adopted returns the handle on a record of Config.Adopt, once. It is an error
// that says why if it could not be adopted.
func (m *Manager) Adopted(i Interrupted) (*Mutable, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.adopted[i.Snapshot]
	if r == nil {
		return nil, fmt.Errorf("snapshot %s of an interrupted step can't be taken up: %w", i.Snapshot, ErrNotFound)
	}
	delete(m.adopted, i.Snapshot)
	return &Mutable{m: m, r: r}, nil
}

// adoptSnapshots has the snapshotter take up what interrupted steps write to.
func (l *loader) adoptSnapshots(context.Context) error {
	s, ok := l.m.snapshots.(leaver)
	for _, i := range l.adopt {
		var err error
		if ok {
			err = s.Adopt(i.Snapshot, i.ParentSnapshot)
		}
		if err != nil || !ok {
			l.m.log.Warn("what an interrupted step writes to can't be taken up", "snapshot", i.Snapshot, "description", i.Description, "error", err)
		}
	}
	return nil
}

// adoptRecords makes the records of the snapshots that were taken up, with a
// handle that Adopted gives away.
func (l *loader) adoptRecords(context.Context) error {
	m := l.m
	for _, i := range l.adopt {
		if info, ok := l.snapOf[i.Snapshot]; !ok || info.Committed || m.adopted[i.Snapshot] != nil {
			continue
		}
		var parents []*record
		if i.Parent != "" {
			p := l.made[i.Parent]
			if p == nil || p.snap != i.ParentSnapshot {
				m.log.Warn("what an interrupted step writes to can't be taken up: the record below it is gone", "snapshot", i.Snapshot, "record", i.Parent)
				continue
			}
			parents = []*record{p}
		}
		r := newRecord(mutable, parents, Options{Description: i.Description})
		r.snap = i.Snapshot
		l.made[r.id] = r
		m.mu.Lock()
		m.addLocked(r)
		m.adopted[i.Snapshot] = r
		m.mu.Unlock()
	}
	return nil
}
