package cache

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// state is where a record is in its life.
type state int

const (
	mutable   state = iota // written by its one holder, or retained for the next
	immutable              // never changes
	gone                   // removed; its snapshot and blobs are going
)

func (s state) String() string {
	return [...]string{"mutable", "immutable", "gone"}[s]
}

// record is a cache entry. All fields but id of a stack or layer, parents and
// layers are guarded by Manager.mu.
type record struct {
	id    string
	state state

	// parents are what the record builds on: at most one for a layer, the
	// merged records for a stack. They never change.
	parents []*record
	// layers are the layer records that a stack is made of, lowest first; nil
	// for a layer. All are ancestors of parents.
	layers []*record
	depth  int // longest way down to a record without parents

	// snap is the snapshot, "" while the record is lazy. It belongs to twin if
	// that is set: a record of the same chain in another compressed form.
	snap string
	twin *record

	diffID digest.Digest // "" until known
	// chain is the chain ID, "" while a diff ID in the chain is unknown.
	// blobChain is the same over the first blob of each layer.
	chain, blobChain digest.Digest
	blobs            []blob
	sources          []BlobSource // newest first; none after a restart

	opts      Options
	lastUsed  time.Time
	uses      int
	stored    use    // the last use that was put in a batch
	snapSize  int64  // of the record's own snapshot, sizeUnknown until measured
	lost      error  // why the record isn't handed out any more
	broken    bool   // lost for good: goes with the last handle
	changed   bool   // files of it, or of what it is built on, aren't what was committed
	rule      string // that evicts it
	freed     int64  // what that frees
	handles   int
	children  int // records that have this one among parents or as twin
	persisted bool
	open      bool // mutable, with metadata that is good only after a proper release

	// birth is the id under which metadata is stored; the id changes when an
	// immutable record is reopened.
	birth string
	meta  map[string]*metaValue // not yet in the store

	shelf *shelf // see order
	slot  int    // on the shelf
	place int    // in the survey that is being made; guarded by Manager.surveying

	dirty      bool // changed since it was last put in a batch
	version    int  // counts changes
	persisting int  // batches given to Persist's callers that aren't durable yet
}

const sizeUnknown = -1

// blob is a compressed form of a layer; the first of a record is what it came
// with or was first exported as.
type blob struct {
	desc   ocispec.Descriptor
	stored bool  // in the blob store when last seen; otherwise its source has it
	disk   int64 // bytes it takes there, while it is stored
}

const (
	idLetters = "0123456789abcdefghijklmnopqrstuvwxyz"
	idLen     = 25
	// idTimeLen is how many letters of an id are milliseconds since 1970: enough
	// for 3,000 years.
	idTimeLen = 9
)

// newID returns a name that no other record has. What is made at about the same
// time has names that are neighbours, and so stands side by side in the
// database: what is made, or goes, together changes few pages of it.
func newID() string {
	var raw [idLen]byte
	rand.Read(raw[idTimeLen:]) // never fails
	for i := range raw[idTimeLen:] {
		raw[idTimeLen+i] = idLetters[int(raw[idTimeLen+i])%len(idLetters)]
	}
	for i, ms := idTimeLen-1, time.Now().UnixMilli(); i >= 0; i-- {
		raw[i] = idLetters[ms%int64(len(idLetters))]
		ms /= int64(len(idLetters))
	}
	return string(raw[:])
}

func newRecord(s state, parents []*record, opts Options) *record {
	if opts.Type == "" {
		opts.Type = TypeRegular
	}
	if opts.CreatedAt.IsZero() {
		opts.CreatedAt = time.Now()
	}
	opts.Index = maps.Clone(opts.Index)
	id := newID()
	r := &record{id: id, birth: id, state: s, parents: parents, opts: opts, snapSize: sizeUnknown}
	for _, p := range parents {
		r.depth = max(r.depth, p.depth+1)
	}
	return r
}

// needs are the records that must not go before r.
func (r *record) needs() []*record {
	if r.twin == nil {
		return r.parents
	}
	return append(slices.Clip(r.parents), r.twin)
}

// stack returns the layers of r, lowest first. Parents and layers never
// change, so no lock is needed.
func (r *record) stack() []*record {
	var out []*record
	for r != nil {
		if r.layers != nil {
			for _, l := range slices.Backward(r.layers) {
				out = append(out, l)
			}
			break
		}
		out = append(out, r)
		r = r.parent()
	}
	slices.Reverse(out)
	return out
}

// parent is the one parent of a layer, nil for none.
func (r *record) parent() *record {
	if r.layers != nil || len(r.parents) == 0 {
		return nil
	}
	return r.parents[0]
}

// owns reports whether the record's snapshot is its own.
func (r *record) owns() bool { return r.snap != "" && r.twin == nil }

// kept reports whether the record outlives its handles and children: a key's
// result points at it, or it is retained. Manager.mu is held.
func (r *record) kept() bool {
	return r.persisted && !r.broken && (r.state == immutable || r.opts.Retain)
}

func (r *record) findBlob(d digest.Digest) *blob {
	for i := range r.blobs {
		if r.blobs[i].desc.Digest == d {
			return &r.blobs[i]
		}
	}
	return nil
}

// addLocked makes r known. The caller gets the first handle.
func (m *Manager) addLocked(r *record) {
	m.records[r.id] = r
	m.order.add(r)
	r.handles = 1
	for _, n := range r.needs() {
		n.children++
	}
	for i := range r.blobs {
		m.blobUse[r.blobs[i].desc.Digest]++
	}
	if r.opts.Retain && !r.persisted { // the caller flushes
		r.dirty = true
		m.dirty[r] = struct{}{}
	}
	m.indexLocked(r)
}

func (m *Manager) newRef(r *record) *Ref { return &Ref{m: m, r: r} }

// release gives back one handle and removes the record if nothing keeps it.
func (m *Manager) release(r *record) error {
	m.mu.Lock()
	r.handles--
	if r.handles == 0 {
		m.usedLocked(r)
		dropSourcesLocked(r)
	}
	doomed := m.doomedLocked(r)
	m.mu.Unlock()
	if !doomed {
		return nil
	}
	return m.remove([]*record{r})
}

// dropSourcesLocked forgets the sources of r and of what is below it alone:
// the builds that gave them have ended, since they hold nothing any more.
func dropSourcesLocked(r *record) {
	if r.children > 0 {
		return
	}
	r.sources = nil
	for p := r.parent(); p != nil && p.handles == 0 && p.children == 1; p = p.parent() {
		p.sources = nil
	}
}

// usedLocked notes the end of a use.
func (m *Manager) usedLocked(r *record) {
	r.lastUsed = time.Now()
	r.uses++
	if r.persisted && !r.stored.tells(r) {
		m.used[r] = struct{}{}
	}
}

// doomedLocked marks r as gone, and reports so, if nothing keeps it.
func (m *Manager) doomedLocked(r *record) bool {
	if r.state == gone || r.handles > 0 || r.children > 0 || r.kept() {
		return false
	}
	m.forgetLocked(r)
	return true
}

// forgetLocked takes r out of the indexes. Its snapshot and blobs, and its
// place among its parents' children, are remove's to give up.
func (m *Manager) forgetLocked(r *record) {
	r.state = gone
	delete(m.records, r.id)
	m.order.remove(r)
	delete(m.dirty, r)
	delete(m.used, r)
	m.unindexLocked(r)
}

// remove gives up what the forgotten records own, and then ancestors that
// nothing keeps any more. Children come before their parents in records.
func (m *Manager) remove(records []*record) error {
	var problems []error
	for len(records) > 0 {
		stored := slices.ContainsFunc(records, func(r *record) bool { return r.persisted })
		var more []error
		records, more = m.removeSome(records, stored)
		problems = append(problems, more...)
	}
	return joinProblems("remove cache records", problems)
}

// removeSome is one batch of remove. Only if stored is set may it remove
// persisted records; others that have to go are returned.
//
// A parent's count is lowered only after the child's snapshot is gone, so
// that nobody tries to remove a snapshot that still has children.
func (m *Manager) removeSome(records []*record, stored bool) (later []*record, problems []error) {
	if stored {
		m.writes.Lock()
		defer m.writes.Unlock()
	}
	m.blobsMu.Lock()
	defer m.blobsMu.Unlock()

	b := &store.Batch{}
	var gone []*record // persisted ones
	for len(records) > 0 {
		r := records[0]
		records = records[1:]
		if r.owns() {
			if err := m.snapshots.Remove(b, r.snap); err != nil {
				problems = append(problems, fmt.Errorf("remove snapshot %s of %s: %w", r.snap, r.id, err))
			}
		}
		m.mu.Lock()
		free := m.unuseBlobsLocked(r.blobs)
		for _, n := range r.needs() {
			n.children--
			if !m.doomedLocked(n) {
				continue
			}
			if n.persisted && !stored {
				later = append(later, n)
			} else {
				records = append(records, n)
			}
		}
		m.mu.Unlock()
		problems = append(problems, m.removeBlobs(b, free)...)
		if r.persisted {
			gone = append(gone, r)
			b.Delete(bucketRecords, r.id)
		}
	}
	if gone != nil {
		births := make([]string, len(gone))
		for i, r := range gone {
			births[i] = r.birth
		}
		m.deleteMetadata(b, births...)
		m.writeEvictions(b, gone, m.callHooks(b, ids(gone)))
	}
	m.db.Write(b)
	return later, problems
}

// quarantine takes the record out of use: it isn't handed out any more, and
// goes when nothing holds it. Ancestors whose files are gone share its fate,
// so that the next user doesn't build on them again.
func (m *Manager) quarantine(ctx context.Context, r *record, why error) {
	marked := []*record{r}
	seen := map[*record]bool{r: true}
	for todo := []*record{r}; len(todo) > 0; todo = todo[1:] {
		m.mu.Lock()
		below := todo[0].needs()
		m.mu.Unlock()
		for _, p := range below {
			if seen[p] {
				continue
			}
			seen[p] = true
			todo = append(todo, p)
			if snap := m.snapOf(p); snap != "" && m.missing(ctx, snap) {
				marked = append(marked, p)
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range marked {
		if p.broken || p.state == gone {
			continue
		}
		p.lost, p.broken = why, true
		m.unindexLocked(p)
		m.log.Warn("cache record is lost", "record", p.id, "description", p.opts.Description, "error", why)
	}
}
