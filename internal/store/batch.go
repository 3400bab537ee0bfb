package store

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"

	"go.etcd.io/bbolt"
)

// Batch is a set of changes that become visible, and durable, together. Build
// it in one goroutine and pass it to DB.Write once.
type Batch struct {
	changes   []change
	onDurable []func()
	last      func()      // see Finish
	under     sync.Locker // nil if last is
	files     bool        // it may point to files
	proven    bool
	bad       error // the first change that bbolt could never store
}

type change struct {
	bucket, key string
	entry
}

// entry is the pending state of a key.
type entry struct {
	value   []byte
	deleted bool
}

// Put sets key in bucket. The batch keeps value; the caller must not change it.
func (b *Batch) Put(bucket, key string, value []byte) {
	b.files = true
	b.Note(bucket, key, value)
}

// Note is Put of a value that points to no files. A commit of deletions and
// notes alone doesn't have the file system synced, for which everybody who
// writes to it would wait.
func (b *Batch) Note(bucket, key string, value []byte) {
	if value == nil {
		value = []byte{}
	}
	b.change(bucket, key, entry{value: value})
}

// Delete removes key from bucket; a missing key is fine.
func (b *Batch) Delete(bucket, key string) { b.change(bucket, key, entry{deleted: true}) }

// OnDurable registers fn to be called, in the store's own goroutine, after the
// batch is on disk. It is where files without records are removed. fn may call
// Write, but not Sync, which would wait for itself.
func (b *Batch) OnDurable(fn func()) { b.onDurable = append(b.onDurable, fn) }

// Finish has Write call last, which may change the batch once more, and make it
// visible, both under l: nothing that holds l comes between. It is for one caller.
func (b *Batch) Finish(l sync.Locker, last func()) { b.under, b.last = l, last }

// Proven says that the database agrees with the files again; see DB.Unproven.
func (b *Batch) Proven() { b.proven = true }

func (b *Batch) change(bucket, key string, e entry) {
	var err error
	switch {
	case bucket == "" || bucket == metaBucket:
		err = fmt.Errorf("bucket %q of key %q: the name is reserved", bucket, key)
	case key == "":
		err = fmt.Errorf("bucket %s: the key is empty", bucket)
	case len(key) > bbolt.MaxKeySize:
		err = fmt.Errorf("bucket %s: key %.40q... has %d bytes, the most is %d", bucket, key, len(key), bbolt.MaxKeySize)
	case len(e.value) > bbolt.MaxValueSize:
		err = fmt.Errorf("bucket %s: the value of %q has %d bytes, the most is %d", bucket, key, len(e.value), bbolt.MaxValueSize)
	}
	if err != nil && b.bad == nil {
		b.bad = err
	}
	b.changes = append(b.changes, change{bucket, key, e})
}

// group is what one commit writes. It is guarded by DB.mu; once it is being
// committed it no longer changes, so that the committer reads it without.
type group struct {
	buckets   map[string]*pending
	onDurable []func()
	files     bool // it may point to files
	proven    bool
	verify    bool // somebody asks whether the files are durable
	size      int  // bytes of keys and values, about
	last      Mark // of the newest batch in it

	done    chan struct{} // closed when the commit has ended
	failure error         // why it failed; valid when done is closed
}

func newGroup() *group {
	return &group{buckets: map[string]*pending{}, done: make(chan struct{})}
}

// outcome is the result of a commit that may never have been tried.
func (g *group) outcome() error {
	select {
	case <-g.done:
		return g.failure
	default:
		return errClosed
	}
}

func (g *group) empty() bool {
	return !g.records() && len(g.onDurable) == 0 && !g.verify
}

// records says whether there is anything for the database in g.
func (g *group) records() bool { return len(g.buckets) > 0 || g.proven }

// onlyRemoves says whether g is deletions and notes alone, for which no files need
// to be durable.
func (g *group) onlyRemoves() bool {
	return len(g.buckets) > 0 && !g.files && !g.proven && !g.verify
}

func (g *group) add(b *Batch, mark Mark) {
	for _, c := range b.changes {
		g.put(c.bucket, c.key, c.entry)
	}
	g.onDurable = append(g.onDurable, b.onDurable...)
	g.files = g.files || b.files
	g.proven = g.proven || b.proven
	g.last = mark
}

func (g *group) put(bucket, key string, e entry) {
	p := g.buckets[bucket]
	if p == nil {
		p = &pending{entries: map[string]entry{}, heads: map[string]struct{}{}}
		g.buckets[bucket] = p
	}
	g.size += p.put(key, e)
}

// under puts what older holds below what g holds.
func (g *group) under(older *group) {
	for bucket, p := range older.buckets {
		for key, e := range p.entries {
			if _, ok := g.get(bucket, key); !ok {
				g.put(bucket, key, e)
			}
		}
	}
	g.onDurable = append(older.onDurable, g.onDurable...)
	g.files = g.files || older.files
	g.proven = g.proven || older.proven
	g.last = max(g.last, older.last)
}

func (g *group) get(bucket, key string) (entry, bool) {
	if g == nil {
		return entry{}, false
	}
	p := g.buckets[bucket]
	if p == nil {
		return entry{}, false
	}
	e, ok := p.entries[key]
	return e, ok
}

func (g *group) scan(bucket, prefix string) []pair {
	if g == nil || g.buckets[bucket] == nil {
		return nil
	}
	return g.buckets[bucket].scan(prefix)
}

// pending is the change of one bucket.
type pending struct {
	entries map[string]entry
	// heads are the first headLen bytes of the keys that have so many. Most ranges
	// that are looked for aren't among what is pending, and needn't be searched for
	// in sorted, nor that be kept up for them.
	heads  map[string]struct{}
	sorted []string // keys in order
	fresh  []string // keys that are not in sorted yet
}

const headLen = 16

// put returns by how much the size grew.
func (p *pending) put(key string, e entry) int {
	old, ok := p.entries[key]
	p.entries[key] = e
	if ok {
		return len(e.value) - len(old.value)
	}
	p.fresh = append(p.fresh, key)
	if len(key) >= headLen {
		p.heads[key[:headLen]] = struct{}{}
	}
	return len(key) + len(e.value)
}

// order moves fresh keys to where they belong. It works only when someone
// looks for a range, so that a group of n writes costs one sort, not n inserts.
func (p *pending) order() {
	if len(p.fresh) == 0 {
		return
	}
	slices.Sort(p.fresh)
	p.sorted, p.fresh = mergeKeys(p.sorted, p.fresh), nil
}

// mergeKeys returns what is in either list, in order; both are.
func mergeKeys(old, add []string) []string {
	out := make([]string, 0, len(old)+len(add))
	for len(old) > 0 && len(add) > 0 {
		if old[0] < add[0] {
			out, old = append(out, old[0]), old[1:]
		} else {
			out, add = append(out, add[0]), add[1:]
		}
	}
	return append(append(out, old...), add...)
}

func (p *pending) scan(prefix string) []pair {
	if len(prefix) >= headLen {
		if _, there := p.heads[prefix[:headLen]]; !there {
			return nil
		}
	}
	p.order()
	var out []pair
	for i := sort.SearchStrings(p.sorted, prefix); i < len(p.sorted) && strings.HasPrefix(p.sorted[i], prefix); i++ {
		e := p.entries[p.sorted[i]]
		out = append(out, pair{p.sorted[i], e.value, e.deleted})
	}
	return out
}
