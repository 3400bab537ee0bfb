// Package keys is the persistent key graph: which results a step's identity
// leads to. It lives in the daemon's one database.
//
// Buckets, all with binary keys (K is a 32-byte key, T a 16-byte tag of the op,
// the selector and the positions of a link):
//
//	key.link    K T K'   a link leads from K to K'
//	key.back    K' K T   the same link, seen from its end
//	key.result  K id     a result hangs off K; the value is when it was made
//	key.of      id 0 K   the same, by result
package keys

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
)

const (
	links   = "key.link"
	backs   = "key.back"
	results = "key.result"
	byID    = "key.of"

	keyLen = sha256.Size
	tagLen = 16
)

// Store is a solver.KeyStore. All methods are safe for concurrent use.
type Store struct {
	db *store.DB
	mu sync.Mutex // orders changes; a lookup doesn't take it
}

var _ solver.KeyStore = (*Store)(nil)

// Open returns the key graph in db.
func Open(db *store.DB) *Store { return &Store{db: db} }

// tag identifies the links of one input of one output of an op.
func tag(l solver.Lookup, input int, from solver.InputKey) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%s\x00%d\x00%d", l.Op, from.Selector, input, l.Output))
	return string(sum[:tagLen])
}

// Lookup implements solver.KeyStore. It writes nothing.
func (s *Store) Lookup(l solver.Lookup) (solver.Found, error) {
	return solver.Resolve(l, func(input int, from solver.InputKey) (out []solver.Key) {
		prefix := string(from.Key[:]) + tag(l, input, from)
		s.db.Scan(links, prefix, func(k string, _ []byte) bool {
			out = append(out, solver.Key([]byte(k[len(prefix):])))
			return true
		})
		return out
	}, func(key solver.Key) (out []solver.Record) {
		s.db.Scan(results, string(key[:]), func(k string, v []byte) bool {
			out = append(out, solver.Record{Result: k[keyLen:], CreatedAt: time.Unix(0, int64(binary.BigEndian.Uint64(v)))})
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
	if p, ok := v.Result.(persister); ok {
		if err := p.Persist(&b); err != nil {
			return fmt.Errorf("keep result %s: %w", v.Result.ID(), err)
		}
	}
	for _, key := range v.Keys {
		for i, candidates := range v.Inputs {
			for _, from := range candidates {
				in := string(from.Key[:]) + tag(v.Lookup, i, from)
				b.Put(links, in+string(key[:]), nil)
				b.Put(backs, string(key[:])+in, nil)
			}
		}
		if v.Result != nil {
			id := v.Result.ID()
			b.Put(results, string(key[:])+id, binary.BigEndian.AppendUint64(nil, uint64(time.Now().UnixNano())))
			b.Put(byID, id+"\x00"+string(key[:]), nil)
		}
	}
	s.db.Write(&b)
	return nil
}

// Drop implements solver.KeyStore.
func (s *Store) Drop(ids []string) error {
	var b store.Batch
	s.Forget(&b, ids)
	s.db.Write(&b)
	return nil
}

// Forget adds to b the removal of results, and of the keys and links that lead
// nowhere without them. The caller writes b.
func (s *Store) Forget(b *store.Batch, ids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := forgetting{s: s, b: b, gone: map[string]bool{}}
	for _, id := range ids {
		s.db.Scan(byID, id+"\x00", func(k string, _ []byte) bool {
			key := k[len(id)+1:]
			f.remove(byID, k)
			f.remove(results, key+id)
			f.empty(key)
			return true
		})
	}
}

// forgetting is one Forget: b isn't written yet, so what it removes is
// remembered here.
type forgetting struct {
	s    *Store
	b    *store.Batch
	gone map[string]bool
}

func (f *forgetting) remove(bucket, key string) {
	f.gone[bucket+key] = true
	f.b.Delete(bucket, key)
}

// any reports whether something that stays has the prefix.
func (f *forgetting) any(bucket, prefix string) (found bool) {
	f.s.db.Scan(bucket, prefix, func(k string, _ []byte) bool {
		found = !f.gone[bucket+k]
		return !found
	})
	return found
}

// empty removes the links to key if nothing hangs off it and nothing follows,
// and goes on with the keys they came from.
func (f *forgetting) empty(key string) {
	work := []string{key}
	for len(work) > 0 {
		key := work[len(work)-1]
		work = work[:len(work)-1]
		if f.any(results, key) || f.any(links, key) {
			continue
		}
		f.s.db.Scan(backs, key, func(k string, _ []byte) bool {
			if !f.gone[backs+k] {
				in := k[keyLen:]
				f.remove(backs, k)
				f.remove(links, in+key)
				work = append(work, in[:keyLen])
			}
			return true
		})
	}
}

// Counts are how much there is.
type Counts struct{ Links, Results int }

// Check verifies that every link is known from both ends, and that every
// result exists.
func (s *Store) Check(exists func(id string) bool) (c Counts, problems []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.db.Scan(links, "", func(k string, _ []byte) bool {
		c.Links++
		in, key := k[:keyLen+tagLen], k[keyLen+tagLen:]
		if _, ok := s.db.Get(backs, key+in); !ok {
			problems = append(problems, fmt.Sprintf("key %x: the link from %x is not known at its end", key, in[:keyLen]))
		}
		return true
	})
	s.db.Scan(results, "", func(k string, _ []byte) bool {
		c.Results++
		key, id := k[:keyLen], k[keyLen:]
		if _, ok := s.db.Get(byID, id+"\x00"+key); !ok {
			problems = append(problems, fmt.Sprintf("key %x: its result %s is not known by id", key, id))
		}
		if !exists(id) {
			problems = append(problems, fmt.Sprintf("key %x: its result %s does not exist", key, id))
		}
		return true
	})
	return c, problems
}
