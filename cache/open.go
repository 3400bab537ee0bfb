package cache

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
)

// Open loads the records and reconciles: what has no record is swept, and
// records whose files are gone are dropped. Of a database that was rebuilt, and
// may be behind the files, records that could have been written to since are
// dropped as well.
func Open(ctx context.Context, cfg Config) (*Manager, error) {
	m := newManager(cfg)
	l := &loader{m: m, adopt: cfg.Adopt, stored: map[string]*storedRecord{}, made: map[string]*record{}}
	for _, step := range []func(context.Context) error{l.adoptSnapshots, l.sweep, l.scan, l.read, l.judge, l.adoptRecords, l.clean} {
		if err := step(ctx); err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
	}
	m.db.OnDoubt(m.doubt)
	return m, nil
}

// loader turns what is on disk into records.
type loader struct {
	m       *Manager
	adopt   []Interrupted
	snaps   []snapshot.Info // parents first
	snapOf  map[string]snapshot.Info
	blobs   map[digest.Digest]snapshot.BlobInfo
	stored  map[string]*storedRecord
	order   []string       // oldest first
	damaged []string       // records that can't be read
	place   map[string]int // in order
	verdict verdict
	made    map[string]*record
}

// sweep removes files that have no record of their own stores.
func (l *loader) sweep(ctx context.Context) error {
	snaps, err := l.m.snapshots.Sweep(ctx)
	if err != nil {
		return fmt.Errorf("sweep snapshots: %w", err)
	}
	blobs, err := l.m.blobs.Sweep(ctx)
	if err != nil {
		return fmt.Errorf("sweep blobs: %w", err)
	}
	if snaps+blobs > 0 {
		l.m.log.Info("swept what an interrupted run left", "snapshots", snaps, "blobs", blobs)
	}
	return nil
}

// scan lists the snapshots and blobs that there are.
func (l *loader) scan(context.Context) error {
	l.snapOf = map[string]snapshot.Info{}
	err := l.m.snapshots.Walk(func(i snapshot.Info) error {
		l.snaps = append(l.snaps, i)
		l.snapOf[i.ID] = i
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	l.m.life = newLife(l.snaps)
	l.blobs = map[digest.Digest]snapshot.BlobInfo{}
	err = l.m.blobs.Walk(func(i snapshot.BlobInfo) error {
		l.blobs[i.Digest] = i
		return nil
	})
	if err != nil {
		return fmt.Errorf("list blobs: %w", err)
	}
	return nil
}

// newLife returns what the names of all snapshots of this run begin with, which
// those of no other run do. So a name isn't used twice, even if the database is
// rebuilt and has forgotten some: what it remembers of a name is still true.
func newLife(snaps []snapshot.Info) string {
	for {
		life := newID()[idTimeLen:][:lifeLen]
		if !slices.ContainsFunc(snaps, func(i snapshot.Info) bool { return strings.HasPrefix(i.ID, life) }) {
			return life
		}
	}
}

// read decodes the records.
func (l *loader) read(context.Context) error {
	for _, d := range decodeAll(l.m.db) {
		if d.err != nil {
			l.m.log.Error("cache record is unreadable, dropped it", "record", d.id, "error", d.err)
			l.damaged = append(l.damaged, d.id)
			continue
		}
		l.stored[d.id] = &d.storedRecord
		l.order = append(l.order, d.id)
	}
	slices.SortStableFunc(l.order, func(a, b string) int {
		return int(min(1, max(-1, l.stored[a].Created-l.stored[b].Created)))
	})
	return nil
}

// decoded is a stored record, or why it can't be read.
type decoded struct {
	storedRecord
	id    string
	value []byte
	err   error
}

// decodeAll reads all records, on all cores: it is most of what a start takes.
func decodeAll(db *store.DB) []*decoded {
	var all []*decoded
	db.Scan(bucketRecords, "", func(id string, value []byte) bool {
		all = append(all, &decoded{id: id, value: value})
		return true
	})
	var wg sync.WaitGroup
	cores := runtime.GOMAXPROCS(0)
	for part := range slices.Chunk(all, len(all)/cores+1) {
		wg.Go(func() {
			for _, d := range part {
				d.err = decodeRecord(d.value, &d.storedRecord)
				d.value = nil
			}
		})
	}
	wg.Wait()
	return all
}

// judge asks the liveness rule and makes records of what lives.
func (l *loader) judge(context.Context) error {
	l.place = make(map[string]int, len(l.order))
	for i, id := range l.order {
		l.place[id] = i
	}
	var c contents
	for _, id := range l.order {
		s := l.stored[id]
		f := fact{kept: !s.Mutable || s.Retain}
		for _, n := range needsOf(s) {
			f.needs = append(f.needs, l.at(n))
		}
		for _, b := range s.Blobs {
			f.blobs = append(f.blobs, b.Desc.Digest)
		}
		if why := l.unusable(s); why != "" {
			f.broken = true
			l.m.log.Warn("cache record can't be used, dropped it", "record", id, "description", s.Desc, "reason", why)
		}
		c.records = append(c.records, f)
	}
	l.verdict = liveness(c)
	for i, id := range l.order {
		if l.verdict.alive[i] {
			l.make(id)
		} else if l.verdict.broken[i] && l.unusable(l.stored[id]) == "" {
			l.m.log.Warn("cache record needs one that is gone, dropped it", "record", id, "description", l.stored[id].Desc)
		}
	}
	return nil
}

// at is the record's place in order.
func (l *loader) at(id string) int {
	if i, ok := l.place[id]; ok {
		return i
	}
	return nobody
}

func needsOf(s *storedRecord) []string {
	if s.Twin == "" {
		return s.Parents
	}
	return append(slices.Clip(s.Parents), s.Twin)
}

// unusable says what is wrong with the record, "" for nothing.
func (l *loader) unusable(s *storedRecord) string {
	if l.m.db.Unproven() && s.Retain && !s.Mutable {
		// Only a retained record is ever reopened.
		return "it may have been written to since; the database was rebuilt"
	}
	if s.Snap == "" {
		return ""
	}
	info, ok := l.snapOf[s.Snap]
	switch {
	case !ok:
		return "snapshot " + s.Snap + " is gone"
	case info.Committed == s.Mutable:
		return "snapshot " + s.Snap + " is in the wrong state"
	}
	return ""
}

// make makes the record id after those that it needs.
func (l *loader) make(id string) *record {
	if r := l.made[id]; r != nil {
		return r
	}
	s := l.stored[id]
	r := &record{
		id: id, birth: id, state: immutable, snap: s.Snap, diffID: s.DiffID, uses: s.Uses,
		// What is kept beside a record that may have been written to is no good.
		open:     s.Open || s.Mutable && l.m.db.Unproven(),
		snapSize: sizeUnknown, persisted: true, stored: use{s.LastUsed, s.Uses},
		opts: Options{
			Description: s.Desc, Type: s.Type, CreatedAt: time.Unix(0, s.Created), Index: s.Index, Retain: s.Retain,
		},
	}
	if s.Birth != "" {
		r.birth = s.Birth
	}
	if s.Mutable {
		r.state = mutable
	}
	if s.LastUsed != 0 {
		r.lastUsed = time.Unix(0, s.LastUsed)
	}
	if s.Size != nil {
		r.snapSize = *s.Size
	}
	for _, p := range s.Parents {
		below := l.make(p)
		r.parents = append(r.parents, below)
		r.depth = max(r.depth, below.depth+1)
	}
	for _, p := range s.Layers {
		r.layers = append(r.layers, l.make(p))
	}
	if s.Twin != "" {
		r.twin = l.make(s.Twin)
	}
	for _, b := range s.Blobs {
		r.blobs = append(r.blobs, blob{desc: b.Desc, stored: b.Stored})
	}
	l.made[id] = r
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.m.addLocked(r)
	r.handles = 0
	l.reconcileLocked(r)
	return r
}

// reconcileLocked brings what the record says in line with what there is.
func (l *loader) reconcileLocked(r *record) {
	for i := range r.blobs {
		b := &r.blobs[i]
		info, ok := l.blobs[b.desc.Digest]
		b.disk = info.Disk
		if ok == b.stored {
			continue
		}
		if !ok {
			l.m.log.Warn("blob of a cache record is gone", "record", r.id, "blob", b.desc.Digest)
		}
		b.stored = ok
		l.m.changedLocked(r)
	}
	if r.open {
		l.m.changedLocked(r)
	}
}

// mourn writes into the journal that a record is lost. The keys that led to it
// aren't known here; those who come by them find that there is no such record.
func (l *loader) mourn(b *store.Batch, id string) {
	s := l.stored[id]
	if s.Mutable {
		return
	}
	why := cmp.Or(l.unusable(s), "a record that it builds on is gone")
	e := storedEviction{Record: id, Desc: s.Desc, Type: s.Type, Rule: "lost: " + why, At: time.Now().UnixNano()}
	if err := l.m.journal.add(l.m.db, b, e); err != nil {
		l.m.log.Error("remember eviction", "record", id, "error", err)
	}
}

// clean removes what turned out dead.
func (l *loader) clean(context.Context) error {
	m := l.m
	b := &store.Batch{}
	for _, id := range l.damaged {
		b.Delete(bucketRecords, id)
	}
	m.dropped = l.damaged
	for _, id := range l.order {
		r := l.made[id]
		if r == nil {
			b.Delete(bucketRecords, id)
			m.dropped = append(m.dropped, id)
			m.deleteMetadata(b, cmp.Or(l.stored[id].Birth, id))
			l.mourn(b, id)
		} else if r.open {
			m.deleteMetadata(b, r.birth)
			r.open = false
		}
	}
	owned := map[string]bool{}
	for _, r := range l.made {
		owned[r.snap] = true
	}
	for _, s := range slices.Backward(l.snaps) {
		if owned[s.ID] {
			continue
		}
		m.log.Info("remove snapshot without cache record", "snapshot", s.ID)
		if err := m.snapshots.Remove(b, s.ID); err != nil {
			return fmt.Errorf("remove snapshot %s: %w", s.ID, err)
		}
	}
	for d := range l.blobs {
		if _, ok := l.verdict.owner[d]; ok {
			continue
		}
		m.log.Info("remove blob without cache record", "blob", d)
		if err := m.blobs.Remove(b, d); err != nil {
			return fmt.Errorf("remove blob %s: %w", d, err)
		}
	}
	m.writes.Lock()
	defer m.writes.Unlock()
	m.putLocked(b, flushChanged, nil)
	m.db.Write(b)
	return nil
}
