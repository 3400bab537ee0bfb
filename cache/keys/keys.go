// Package keys is the persistent key graph: which results a step's identity
// leads to. It lives in the daemon's one database.
//
// Entries, all with binary keys (K is a 32-byte key, T a 16-byte tag of the op,
// the selector and the positions of a link):
//
//	key     K l T K'   a link leads from K to K'
//	key     K' b K T   the same link, seen from its end
//	key     K r id     a result hangs off K; the value is when it was made
//	key.of  id 0 K     the same, by result
//
// All that there is of a key stands side by side in one bucket: keys are hashes,
// so that whatever has to do with one is on a page of its own, which a commit
// writes anew. With a bucket for each kind a step's end was on three.
//
// Every link leads, at last, to a result: what doesn't any more is removed with
// the last result that it led to.
package keys

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
)

const (
	bucketKeys = "key"
	bucketByID = "key.of"

	keyLen = sha256.Size
	tagLen = 16
	// stampLen is that of the time that a result has as its value.
	stampLen = 8
	// maxID is what fits into a key of the database.
	maxID = 16 << 10
)

// Store is a solver.KeyStore. All methods are safe for concurrent use.
type Store struct {
	db *store.DB

	// mu orders changes; a lookup doesn't take it. It guards the fields below.
	mu sync.Mutex
	// removing counts what batches that Forget has filled, and that aren't written
	// yet, remove; again is what of it was saved meanwhile.
	removing map[entry]int
	again    map[entry][]byte
}

var _ solver.KeyStore = (*Store)(nil)

// Open returns the key graph in db.
func Open(db *store.DB) *Store {
	return &Store{db: db, removing: map[entry]int{}, again: map[entry][]byte{}}
}

// tag identifies the links of one input of one output of an op.
func tag(l solver.Lookup, input int, from solver.InputKey) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d\x00%d", l.Op, from.Selector, input, l.Output))
	return string(sum[:tagLen])
}

// Lookup implements solver.KeyStore. It writes nothing.
func (s *Store) Lookup(l solver.Lookup) (solver.Found, error) {
	return keygraph.Resolve(l, func(input int, from solver.InputKey) (out []solver.Key) {
		prefix := string(from.Key[:]) + tag(l, input, from)
		eachOf(s.db, links, prefix, func(k string, _ []byte) bool {
			out = append(out, solver.Key([]byte(k[len(prefix):])))
			return true
		})
		return out
	}, func(key solver.Key) (out []solver.Record) {
		eachOf(s.db, results, string(key[:]), func(k string, v []byte) bool {
			if len(v) == stampLen { // or else it is damaged
				out = append(out, solver.Record{Result: k[keyLen:], CreatedAt: time.Unix(0, int64(binary.BigEndian.Uint64(v)))})
			}
			return true
		})
		return out
	}), nil
}

// persister is a result that can be made to survive a restart.
type persister interface{ Persist(*store.Batch) error }

// Save implements solver.KeyStore: keys, links and the result itself are one
// batch.
func (s *Store) Save(v solver.Save) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b store.Batch
	if v.Result == nil {
		if s.link(&b, v) {
			s.db.Write(&b)
		}
		return nil
	}
	id := v.Result.ID()
	if len(id) > maxID {
		return fmt.Errorf("keep result %.40q...: its name has %d bytes, the most is %d", id, len(id), maxID)
	}
	if p, ok := v.Result.(persister); ok {
		if err := p.Persist(&b); err != nil {
			return fmt.Errorf("keep result %s: %w", id, err)
		}
	}
	for _, key := range v.Keys {
		eachLink(v, key, func(link, back entry) {
			s.put(&b, link, nil)
			s.put(&b, back, nil)
		})
		s.put(&b, entry{results, string(key[:]) + id}, binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano())))
		s.put(&b, entry{byID, id + "\x00" + string(key[:])}, nil)
	}
	s.db.Write(&b)
	return nil
}

// link adds to b the links of v that are missing, if there are any: most of the
// time they are there.
func (s *Store) link(b *store.Batch, v solver.Save) (missing bool) {
	for _, key := range v.Keys {
		if !s.any(s.db, results, string(key[:])) && !s.any(s.db, links, string(key[:])) {
			continue
		}
		eachLink(v, key, func(link, back entry) {
			if _, ok := s.get(link); ok && s.removing[link] == 0 {
				return
			}
			missing = true
			s.put(b, link, nil)
			s.put(b, back, nil)
		})
	}
	return missing
}

// eachLink calls fn for both ends of every link to key.
func eachLink(v solver.Save, key solver.Key, fn func(link, back entry)) {
	for i, candidates := range v.Inputs {
		for _, from := range candidates {
			in := string(from.Key[:]) + tag(v.Lookup, i, from)
			fn(entry{links, in + string(key[:])}, entry{backs, string(key[:]) + in})
		}
	}
}

// put adds e to b, and sees to it that a batch that removes e doesn't win.
func (s *Store) put(b *store.Batch, e entry, value []byte) {
	add(b, e, value)
	if s.removing[e] > 0 {
		s.again[e] = value
	}
}

// scanner is the database, or a reader of it.
type scanner interface {
	Scan(bucket, prefix string, fn func(key string, value []byte) bool)
}

// scan calls fn for every entry with the prefix that stays, until it returns
// false.
func (s *Store) scan(in scanner, of kind, prefix string, fn func(key string) bool) {
	more := true
	eachOf(in, of, prefix, func(k string, _ []byte) bool {
		if s.removing[entry{of, k}] > 0 {
			return true // or it is in again
		}
		more = fn(k)
		return more
	})
	if !more || len(s.again) == 0 {
		return
	}
	for _, e := range slices.Collect(maps.Keys(s.again)) {
		if e.kind == of && strings.HasPrefix(e.key, prefix) && !fn(e.key) {
			return
		}
	}
}

// any reports whether an entry with the prefix stays.
func (s *Store) any(in scanner, of kind, prefix string) (found bool) {
	s.scan(in, of, prefix, func(string) bool {
		found = true
		return false
	})
	return found
}

// Drop implements solver.KeyStore.
func (s *Store) Drop(ids []string) error {
	var b store.Batch
	s.Forget(&b, ids)
	s.db.Write(&b)
	return nil
}

// Forget adds to b the removal of results, and of the keys and links that lead
// nowhere without them. The caller writes b, before or after other changes of
// the graph. It returns the keys that the results hung off, by id.
func (s *Store) Forget(b *store.Batch, ids []string) (keys map[string][]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var gone []entry
	remove := func(e entry) {
		s.removing[e]++
		delete(s.again, e)
		drop(b, e)
		gone = append(gone, e)
	}
	keys = map[string][]string{}
	s.db.Read(func(in *store.Reader) {
		var bare []solver.Key
		for _, id := range ids {
			for _, key := range s.keysOf(in, id) {
				remove(entry{byID, id + "\x00" + key})
				remove(entry{results, key + id})
				bare = append(bare, solver.Key([]byte(key)))
				keys[id] = append(keys[id], key)
			}
		}
		s.eachDeadLink(in, bare, func(key, back string) {
			remove(entry{backs, back})
			remove(entry{links, back[keyLen:] + key})
		})
	})
	if gone != nil {
		b.Finish(&s.mu, func() { s.finishLocked(b, gone) })
	}
	return keys
}

// eachDeadLink calls fn for every link to a key that leads to no result any more,
// of bare and of those that lead to bare.
func (s *Store) eachDeadLink(in scanner, bare []solver.Key, fn func(key, back string)) {
	keygraph.DeadEnds(bare,
		func(key solver.Key) bool { return s.any(in, results, string(key[:])) },
		func(key solver.Key) (out []solver.Key) {
			s.scan(in, links, string(key[:]), func(k string) bool {
				out = append(out, solver.Key([]byte(k[keyLen+tagLen:])))
				return true
			})
			return out
		},
		func(dead solver.Key) (out []solver.Key) { // asked once, of every dead one
			key := string(dead[:])
			s.scan(in, backs, key, func(back string) bool {
				out = append(out, solver.Key([]byte(back[keyLen:2*keyLen])))
				fn(key, back)
				return true
			})
			return out
		})
}

// finishLocked is called when a batch of Forget is written: what of gone was saved
// meanwhile stays.
func (s *Store) finishLocked(b *store.Batch, gone []entry) {
	for _, e := range gone {
		if value, ok := s.again[e]; ok {
			add(b, e, value)
		}
		if s.removing[e]--; s.removing[e] == 0 { // or by another batch
			delete(s.removing, e)
			delete(s.again, e)
		}
	}
}
