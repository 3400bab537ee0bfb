package cache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/internal/plainjson"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Buckets of the store.
const (
	bucketRecords  = "ref"
	bucketMetadata = "refmeta" // by metadataKey
)

// storedRecord is a record as it is stored under its id.
type storedRecord struct {
	Parents  []string          `json:"p,omitempty"`
	Layers   []string          `json:"l,omitempty"`
	Snap     string            `json:"s,omitempty"`
	Twin     string            `json:"w,omitempty"`
	Mutable  bool              `json:"m,omitempty"`
	Retain   bool              `json:"r,omitempty"`
	Open     bool              `json:"o,omitempty"`
	Desc     string            `json:"d,omitempty"`
	Type     RecordType        `json:"t,omitempty"`
	Created  int64             `json:"c"`
	LastUsed int64             `json:"u,omitempty"`
	Uses     int               `json:"n,omitempty"`
	Size     *int64            `json:"z,omitempty"`
	DiffID   digest.Digest     `json:"i,omitempty"`
	Blobs    []storedBlob      `json:"b,omitempty"`
	Index    map[string]string `json:"x,omitempty"`
	Birth    string            `json:"a,omitempty"`
}

type storedBlob struct {
	Desc   ocispec.Descriptor `json:"d"`
	Stored bool               `json:"s,omitempty"`
}

// decodeRecord reads what encodeLocked has written.
func decodeRecord(data []byte, s *storedRecord) error {
	if plainjson.Object(data, s.set) {
		return nil
	}
	*s = storedRecord{}
	return json.Unmarshal(data, s)
}

// set sets a field to a value of JSON, and says whether it could.
func (s *storedRecord) set(name, value []byte) bool {
	switch string(name) {
	case "p":
		return plainjson.Texts(value, &s.Parents)
	case "l":
		return plainjson.Texts(value, &s.Layers)
	case "s":
		return plainjson.Text(value, &s.Snap)
	case "w":
		return plainjson.Text(value, &s.Twin)
	case "m":
		return plainjson.Flag(value, &s.Mutable)
	case "r":
		return plainjson.Flag(value, &s.Retain)
	case "o":
		return plainjson.Flag(value, &s.Open)
	case "d":
		return plainjson.Text(value, &s.Desc)
	case "t":
		return plainjson.Text(value, &s.Type)
	case "c":
		return plainjson.Number(value, &s.Created)
	case "u":
		return plainjson.Number(value, &s.LastUsed)
	case "n":
		return plainjson.Number(value, &s.Uses)
	case "z":
		s.Size = new(int64)
		return plainjson.Number(value, s.Size)
	case "i":
		return plainjson.Text(value, &s.DiffID)
	case "b":
		s.Blobs = nil
		return plainjson.Other(value, &s.Blobs)
	case "x":
		s.Index = nil
		return plainjson.Other(value, &s.Index)
	case "a":
		return plainjson.Text(value, &s.Birth)
	}
	return false
}

// use is the last use of a record as it is stored.
type use struct {
	at    int64 // nanoseconds since 1970, 0 for never
	count int   // of all uses
}

// useSlack is by how much earlier than it was a last use may be stored: else all
// records that a build makes would be written twice, at once and when the build
// lets go of them.
const useSlack = 10 * time.Second

// useLocked is the last use of r, as of now if there is one: a crash ends it.
func useLocked(r *record) use {
	switch {
	case r.handles > 0:
		return use{time.Now().UnixNano(), r.uses + 1}
	case r.lastUsed.IsZero():
		return use{0, r.uses}
	}
	return use{r.lastUsed.UnixNano(), r.uses}
}

// tells says whether u, which is stored, needn't be written again.
func (u use) tells(r *record) bool {
	return u.count >= r.uses && r.lastUsed.UnixNano()-u.at < int64(useSlack)
}

// encodeLocked returns what is stored of r, whose last use is last.
func encodeLocked(r *record, last use) ([]byte, error) {
	s := storedRecord{
		Parents: ids(r.parents), Layers: ids(r.layers), Snap: r.snap,
		Mutable: r.state == mutable, Retain: r.opts.Retain, Open: r.open,
		Desc: r.opts.Description, Type: r.opts.Type, Created: r.opts.CreatedAt.UnixNano(),
		LastUsed: last.at, Uses: last.count, DiffID: r.diffID, Index: r.opts.Index,
	}
	if r.twin != nil {
		s.Twin = r.twin.id
	}
	if r.snapSize != sizeUnknown {
		s.Size = &r.snapSize
	}
	for _, b := range r.blobs {
		s.Blobs = append(s.Blobs, storedBlob{b.desc, b.stored})
	}
	if r.birth != r.id {
		s.Birth = r.birth
	}
	return json.Marshal(s)
}

func ids(records []*record) []string {
	var out []string
	for _, r := range records {
		out = append(out, r.id)
	}
	return out
}

// put is a record on its way into a batch: copied under the lock, added to the
// batch outside of it.
type put struct {
	r       *record
	id      string
	birth   string
	needs   []*record
	value   []byte
	snap    string // its own
	blobs   []digest.Digest
	meta    map[string]*metaValue
	version int
	use     use
	size    int64
	first   bool // it wasn't persisted before
}

func (m *Manager) putOf(r *record) (put, error) {
	last := useLocked(r)
	value, err := encodeLocked(r, last)
	if err != nil {
		return put{}, fmt.Errorf("encode cache record %s: %w", r.id, err)
	}
	p := put{r: r, id: r.id, birth: r.birth, needs: r.needs(), value: value, meta: maps.Clone(r.meta),
		version: r.version, use: last, size: r.snapSize}
	if r.owns() {
		p.snap = r.snap
	}
	for _, b := range r.blobs {
		if b.stored {
			p.blobs = append(p.blobs, b.desc.Digest)
		}
	}
	return p, nil
}

// add puts the record, and what it points at, into b.
func (m *Manager) add(b *store.Batch, p put) error {
	if p.snap != "" {
		if err := m.snapshots.Persist(b, p.snap); err != nil {
			return fmt.Errorf("persist snapshot %s of %s: %w", p.snap, p.id, err)
		}
	}
	for _, d := range p.blobs {
		err := m.blobs.Persist(b, d)
		if errors.Is(err, snapshot.ErrNotFound) {
			continue // found missing when it is next needed
		}
		if err != nil {
			return fmt.Errorf("persist blob %s of %s: %w", d, p.id, err)
		}
	}
	b.Put(bucketRecords, p.id, p.value)
	for k, v := range p.meta {
		if key := metadataKey(p.birth, k); v.data == nil {
			b.Delete(bucketMetadata, key)
		} else {
			b.Put(bucketMetadata, key, v.data)
		}
	}
	return nil
}

// collectLocked appends r to puts after everything it needs, if it isn't
// stored as it is.
func (m *Manager) collectLocked(puts []put, seen map[*record]bool, r *record) ([]put, error) {
	if seen[r] || r.persisted && !r.dirty {
		return puts, nil
	}
	seen[r] = true
	var err error
	for _, n := range r.needs() {
		if puts, err = m.collectLocked(puts, seen, n); err != nil {
			return nil, err
		}
	}
	p, err := m.putOf(r)
	if err != nil {
		return nil, err
	}
	return append(puts, p), nil
}

// changedLocked notes that what is stored of r is out of date. The caller
// calls flush once it has unlocked; that does nothing for a record that was
// never persisted.
func (m *Manager) changedLocked(r *record) {
	r.version++
	if r.state != gone && (r.persisted || r.persisting > 0) {
		r.dirty = true
		m.dirty[r] = struct{}{}
	}
}

// storingLocked notes that puts are about to go into a batch: from now on a
// removal of one of the records has to remove it from the store, too.
func storingLocked(puts []put) {
	for i := range puts {
		r := puts[i].r
		puts[i].first = !r.persisted
		r.persisted = true
	}
}

// notStoredLocked takes back that p is about to go into a batch. If meanwhile a
// record that needs it went into another one, p has to be tried again: the caller
// calls flush once it has unlocked.
func (m *Manager) notStoredLocked(p put) (again bool) {
	r := p.r
	switch {
	case !p.first || r.state == gone:
		return false
	case !m.reliedOnLocked(r):
		r.persisted = false
		return false
	}
	r.dirty = true
	m.dirty[r] = struct{}{}
	return true
}

// reliedOnLocked says whether a persisted record needs r.
func (m *Manager) reliedOnLocked(r *record) bool {
	for _, c := range m.records {
		if c.persisted && slices.Contains(c.needs(), r) {
			return true
		}
	}
	return false
}

// storedLocked notes that p went into a batch.
func (m *Manager) storedLocked(p put) {
	p.r.stored = p.use
	if p.use.tells(p.r) && p.size == p.r.snapSize {
		delete(m.used, p.r)
	}
	if p.version == p.r.version {
		p.r.dirty = false
		delete(m.dirty, p.r)
	}
}

// dropMetaLocked forgets metadata that can be read from the store now.
func dropMetaLocked(p put) {
	for k, v := range p.meta {
		if p.r.meta[k] == v {
			delete(p.r.meta, k)
		}
	}
}

// Persist adds to b what is needed for the record to survive a restart: its
// parents, snapshot and blobs included. Key stores call it in the batch that
// links a key to the record. From then on the record stays until it is pruned.
//
// The handle must be held until b is written, and b must be written.
func (r *Ref) Persist(b *store.Batch) error {
	if r == nil {
		return nil
	}
	m := r.m
	m.mu.Lock()
	if r.r.broken {
		defer m.mu.Unlock()
		return fmt.Errorf("%w: %s is out of use: %w", ErrLost, r.r.id, r.r.lost)
	}
	puts, err := m.collectLocked(nil, map[*record]bool{}, r.r)
	if err != nil {
		m.mu.Unlock()
		return err
	}
	storingLocked(puts)
	for _, p := range puts {
		p.r.persisting++
	}
	m.mu.Unlock()
	for _, p := range puts {
		if err == nil {
			err = m.add(b, p)
		}
	}
	m.mu.Lock()
	again := false
	for _, p := range slices.Backward(puts) { // those that need others first
		if err != nil {
			p.r.persisting--
			again = m.notStoredLocked(p) || again
			continue
		}
		m.storedLocked(p)
	}
	m.mu.Unlock()
	switch {
	case again:
		m.flush(flushChanged)
	case err == nil && len(puts) > 0:
		b.OnDurable(func() { m.settle(puts) })
	}
	return err
}

// settle ends what Persist began. A record that changed in the meantime is
// written again, since it isn't known which batch came last. Some last uses go
// with it; they can't ride in Persist's batch, because the records, being
// unused, may be removed before that is written.
func (m *Manager) settle(puts []put) {
	m.mu.Lock()
	for _, p := range puts {
		p.r.persisting--
		dropMetaLocked(p)
		if p.r.state != gone && p.version != p.r.version {
			p.r.dirty = true
			m.dirty[p.r] = struct{}{}
		}
	}
	closed := m.closed
	m.mu.Unlock()
	if !closed {
		m.flush(flushSome)
	}
}

// flushWhat says what flush writes.
type flushWhat int

const (
	flushChanged flushWhat = iota // records that changed
	flushSome                     // a batch of last uses too
	flushClose                    // everything; all batches of others are written
)

// someUsed is how many last uses go in one batch.
const someUsed = 64

// flush writes what changed since it was last written. What can't be written
// is logged: it costs cache after a restart, never a build.
func (m *Manager) flush(what flushWhat) {
	m.mu.Lock()
	used := len(m.used)
	idle := len(m.dirty) == 0 && (what == flushChanged || used == 0)
	m.mu.Unlock()
	if idle {
		return
	}
	batches := 1
	if what == flushClose {
		batches += used / someUsed
	}
	for range batches {
		m.write(what, maps.Keys(m.used))
	}
}

// write is one batch of flush. Of used, which it goes through with mu held, it takes
// some of those whose last use is to be written.
func (m *Manager) write(what flushWhat, used iter.Seq[*record]) {
	b := &store.Batch{}
	m.writes.Lock()
	defer m.writes.Unlock()
	m.putLocked(b, what, used)
	m.db.Write(b)
}

// flushUses writes what changed and all last uses. It waits for the disk after
// some, so that a commit is never as long as it would be for all: others wait for
// commits, too.
func (m *Manager) flushUses(ctx context.Context) {
	m.flush(flushChanged)
	i := 0
	for some := range slices.Chunk(m.usedInOrder(), someUsed) {
		m.write(flushSome, slices.Values(some))
		if i++; i%syncEvery == 0 && m.db.Sync(ctx) != nil {
			return // the store has said why; the next time goes on
		}
	}
}

// usedInOrder are the records whose last use is to be written, about as they were
// made: neighbours among them are neighbours in the database. In the order of a map,
// each of 100,000 costs a page of its own.
func (m *Manager) usedInOrder() (used []*record) {
	m.eachRecord(func(r *record) {
		if _, there := m.used[r]; there {
			used = append(used, r)
		}
	})
	return used
}

// putLocked adds changed records to b, and those of used whose last use is to be
// written; the caller writes b before it unlocks m.writes.
func (m *Manager) putLocked(b *store.Batch, what flushWhat, used iter.Seq[*record]) {
	m.mu.Lock()
	var puts []put
	var err error
	seen := map[*record]bool{}
	for r := range m.dirty {
		// While a batch of someone else is on its way, settle decides.
		if r.persisting == 0 || what == flushClose {
			if puts, err = m.collectLocked(puts, seen, r); err != nil {
				break
			}
		}
	}
	if what != flushChanged && err == nil {
		looked := 0
		for r := range used {
			if looked++; looked > someUsed {
				break
			}
			if _, there := m.used[r]; !there || seen[r] || r.persisting > 0 && what != flushClose {
				continue
			}
			var p put
			if p, err = m.putOf(r); err != nil {
				break
			}
			puts = append(puts, p)
		}
	}
	if err == nil {
		storingLocked(puts)
	}
	m.mu.Unlock()
	if err != nil {
		m.log.Error("store cache records", "error", err)
		return
	}
	var written []put
	failed := map[*record]bool{}
	for _, p := range puts {
		if slices.ContainsFunc(p.needs, func(n *record) bool { return failed[n] }) {
			failed[p.r] = true // it would be broken without
			continue
		}
		if err := m.add(b, p); err != nil {
			m.log.Error("store cache record", "record", p.id, "error", err)
			failed[p.r] = true
			continue
		}
		written = append(written, p)
	}
	m.mu.Lock()
	for _, p := range slices.Backward(puts) { // those that need others first
		if failed[p.r] {
			m.notStoredLocked(p) // the next flush tries again
		} else {
			m.storedLocked(p)
		}
	}
	m.mu.Unlock()
	b.OnDurable(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, p := range written {
			dropMetaLocked(p)
		}
	})
}
