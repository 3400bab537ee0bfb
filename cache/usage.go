package cache

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// Usage describes a record for du and prune (CTL-100).
type Usage struct {
	ID          string
	Parents     []string
	Mutable     bool
	InUse       bool
	Size        int64
	CreatedAt   time.Time
	LastUsedAt  time.Time // zero if never
	UsageCount  int
	Description string
	Type        RecordType
	Index       map[string]string // what Options.Index said; not to be changed
}

// DiskUsage lists the records that match any of filters (CTL-102), or all, and
// were not used within age. A record's size is its own files and those of its
// blobs that no older record has; that of a mutable one in use is 0, since it
// is changing.
func (m *Manager) DiskUsage(ctx context.Context, filterBy []string, age time.Duration) ([]Usage, error) {
	filter, err := filters.ParseAll(filterBy...)
	if err != nil {
		return nil, fmt.Errorf("parse filters %q: %w", filterBy, err)
	}
	cutoff := time.Now().Add(-age)
	found := m.survey()
	if len(filterBy) > 0 || age > 0 {
		found = slices.DeleteFunc(found, func(e *entry) bool {
			recent := age > 0 && e.usage.LastUsedAt.After(cutoff)
			return recent || !filter.Match((*fields)(&e.usage))
		})
	}
	if err := m.measure(ctx, found); err != nil {
		return nil, err
	}
	out := make([]Usage, len(found))
	for i, e := range found {
		out[i] = e.usage
	}
	return out, nil
}

// fields are a record as filters see it: the fields of the protocol, and what the
// record is found by, such as cachemount.id.
type fields Usage

// Field implements filters.Adaptor.
func (u *fields) Field(path []string) (string, bool) {
	if len(path) != 1 {
		v, ok := u.Index[strings.Join(path, ".")]
		return v, ok
	}
	switch path[0] {
	case "id":
		return u.ID, true
	case "parents":
		return strings.Join(u.Parents, ";"), len(u.Parents) > 0
	case "description":
		return u.Description, u.Description != ""
	case "inuse":
		return "", u.InUse
	case "mutable":
		return "", u.Mutable
	case "immutable":
		return "", !u.Mutable
	case "type":
		return string(u.Type), true
	case "private": // shared is what a store of images refers to (CTL-105)
		return "", true
	}
	return "", false
}

// entry is a record as of one moment.
type entry struct {
	r          *record
	usage      Usage // Size is that of the blobs until measured
	measured   bool
	held, kept bool
	snap       string
	snapSize   int64
	uses       int
	version    int
	needs      []*record
	blobs      []digest.Digest
	sizes      []int64 // of blobs that are stored, 0 of others

	below []*entry // those of needs, nil for what isn't there any more
	plan  prospect // in the plan that is being made
}

// entries are those of many records. Few of them move, or are made one by one:
// there are surveys of 100,000. Who has one holds Manager.surveying until its
// contents are known.
type entries struct {
	list []*entry
	room []entry
}

func newEntries(n int) *entries {
	return &entries{list: make([]*entry, 0, n), room: make([]entry, 0, n)}
}

// addLocked adds r as it is.
func (s *entries) addLocked(r *record) {
	if len(s.room) == cap(s.room) {
		s.room = make([]entry, 0, atOnce)
	}
	s.room = s.room[:len(s.room)+1]
	e := &s.room[len(s.room)-1]
	fillLocked(e, r)
	r.place = len(s.list)
	s.list = append(s.list, e)
}

// at is the place of r among the entries, nobody if it has none.
func (s *entries) at(r *record) int {
	if r.place < len(s.list) && s.list[r.place].r == r {
		return r.place
	}
	return nobody
}

// sort puts the oldest first. They nearly are already.
func (s *entries) sort() {
	older := func(a, b *entry) int {
		if c := a.usage.CreatedAt.Compare(b.usage.CreatedAt); c != 0 {
			return c
		}
		return cmp.Compare(a.usage.ID, b.usage.ID)
	}
	if slices.IsSortedFunc(s.list, older) {
		return
	}
	slices.SortStableFunc(s.list, older) // looks at little of what is in order
	for i, e := range s.list {
		e.r.place = i
	}
}

// survey describes all records, oldest first.
func (m *Manager) survey() []*entry {
	m.surveying.Lock()
	s := m.copyRecords()
	s.sort()
	c := s.contents()
	m.surveying.Unlock()
	v := liveness(c)
	for i, e := range s.list {
		u := &e.usage
		u.InUse = v.inUse[i]
		for j, d := range e.blobs {
			if v.owner[d] == i {
				u.Size += e.sizes[j]
			}
		}
	}
	return s.list
}

// copyRecords copies what there is, and does nothing else, under the lock.
func (m *Manager) copyRecords() *entries {
	m.mu.Lock()
	n := len(m.records)
	m.mu.Unlock()
	s := newEntries(n)
	m.eachRecord(s.addLocked)
	return s
}

// fillLocked describes r in e, which is empty.
func fillLocked(e *entry, r *record) {
	e.r, e.snapSize, e.uses, e.version = r, r.snapSize, r.uses, r.version
	e.needs, e.held, e.kept = r.needs(), r.handles > 0, r.kept()
	u := &e.usage
	u.ID, u.Mutable, u.CreatedAt, u.LastUsedAt, u.UsageCount = r.id, r.state == mutable, r.opts.CreatedAt, r.lastUsed, r.uses
	u.Description, u.Type, u.Index = r.opts.Description, r.opts.Type, r.opts.Index
	switch {
	case !r.owns(), r.state == mutable && r.handles > 0:
		e.snapSize = 0
	default:
		e.snap = r.snap
	}
	for _, b := range r.blobs {
		size := int64(0)
		if b.stored {
			size = b.disk
		}
		e.blobs = append(e.blobs, b.desc.Digest)
		e.sizes = append(e.sizes, size)
	}
}

// contents is what liveness wants to know. It finds the places of entries, what
// is below them, and the names of their parents.
func (s *entries) contents() contents {
	n := 0
	for _, e := range s.list {
		n += len(e.needs)
	}
	places, below, parents := make([]int, 0, n), make([]*entry, 0, n), make([]string, 0, n)
	c := contents{records: make([]fact, len(s.list))}
	for i, e := range s.list {
		for j, need := range e.needs {
			var b *entry
			place := s.at(need)
			if place != nobody {
				b = s.list[place]
			}
			places, below = append(places, place), append(below, b)
			if b != nil && j < len(e.r.parents) { // the rest is its twin
				parents = append(parents, b.usage.ID)
			}
		}
		c.records[i] = fact{needs: take(&places), blobs: e.blobs, held: e.held, kept: e.kept}
		e.below, e.usage.Parents = take(&below), take(&parents)
	}
	return c
}

// take returns what *room holds, nil for nothing, and leaves the capacity behind
// that.
func take[T any](room *[]T) (taken []T) {
	if len(*room) > 0 {
		taken = slices.Clip(*room)
		*room = (*room)[len(*room):]
	}
	return taken
}

// measure completes the sizes of list. What had to be walked is remembered
// with the record.
func (m *Manager) measure(ctx context.Context, list []*entry) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	for _, e := range list {
		switch {
		case e.measured:
		case e.snapSize != sizeUnknown:
			e.measured = true
			e.usage.Size += e.snapSize
		default:
			e.measured = true
			g.Go(func() error { return m.measureOne(gctx, e) })
		}
	}
	return g.Wait()
}

func (m *Manager) measureOne(ctx context.Context, e *entry) error {
	u, err := m.snapshots.Usage(ctx, e.snap)
	m.mu.Lock()
	same := e.r.state != gone && e.r.snap == e.snap && e.r.uses == e.uses
	changing := e.r.state == mutable && e.r.handles > 0
	if err == nil && same && !changing && !u.Linked && e.r.version == e.version {
		e.r.snapSize = u.Size
		if e.r.persisted { // written with the last uses, at leisure
			m.used[e.r] = struct{}{}
		}
	}
	m.mu.Unlock()
	e.snapSize = 0
	switch {
	case err == nil:
		e.snapSize = u.Size
		e.usage.Size += u.Size
	case same && ctx.Err() == nil:
		err = m.lostSnapshot(ctx, e.r, fmt.Errorf("measure %s: %w", e.usage.ID, err))
		if e.r.isLost(m) {
			return nil // logged; takes no space
		}
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return nil // removed in the meantime
}

func (r *record) isLost(m *Manager) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return r.broken
}
