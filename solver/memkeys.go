package solver

import (
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// MemoryKeys is a KeyStore that forgets everything when the process ends.
type MemoryKeys struct {
	mu      sync.Mutex // guards the fields below
	links   map[memoryLink][]Key
	records map[Key][]Record
}

type memoryLink struct {
	from          InputKey
	op            digest.Digest
	input, output int
}

// NewMemoryKeys returns an empty store.
func NewMemoryKeys() *MemoryKeys {
	return &MemoryKeys{links: map[memoryLink][]Key{}, records: map[Key][]Record{}}
}

// Lookup implements KeyStore.
func (m *MemoryKeys) Lookup(l Lookup) (Found, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Resolve(l, func(input int, from InputKey) []Key {
		return m.links[memoryLink{from, l.Op, input, l.Output}]
	}, func(k Key) []Record { return m.records[k] }), nil
}

// Save implements KeyStore.
func (m *MemoryKeys) Save(s Save) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range s.Keys {
		for i, candidates := range s.Inputs {
			for _, from := range candidates {
				l := memoryLink{from, s.Op, i, s.Output}
				if !slices.Contains(m.links[l], k) {
					m.links[l] = append(m.links[l], k)
				}
			}
		}
		if s.Result != nil {
			id := s.Result.ID()
			m.records[k] = append(slices.DeleteFunc(m.records[k], func(r Record) bool { return r.Result == id }), Record{Result: id, CreatedAt: time.Now()})
		}
	}
	return nil
}

// Drop implements KeyStore.
func (m *MemoryKeys) Drop(results []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, records := range m.records {
		m.records[k] = slices.DeleteFunc(records, func(r Record) bool { return slices.Contains(results, r.Result) })
	}
	return nil
}

// Resolve answers a lookup from the links and records that a store gives: the
// keys that the candidates of every input lead to, and what hangs off them.
func Resolve(l Lookup, targets func(input int, from InputKey) []Key, records func(Key) []Record) Found {
	f := Found{Keys: l.Roots, Matched: make([]bool, len(l.Inputs))}
	for i, candidates := range l.Inputs {
		var reached []Key
		for _, from := range candidates {
			for _, k := range targets(i, from) {
				if !slices.Contains(reached, k) {
					reached = append(reached, k)
				}
			}
		}
		f.Matched[i] = len(reached) > 0
		if i == 0 {
			f.Keys = reached
		} else {
			f.Keys = slices.DeleteFunc(slices.Clone(f.Keys), func(k Key) bool { return !slices.Contains(reached, k) })
		}
	}
	for _, k := range f.Keys {
		for _, r := range records(k) {
			if !slices.ContainsFunc(f.Records, func(o Record) bool { return o.Result == r.Result }) {
				f.Records = append(f.Records, r)
			}
		}
	}
	slices.SortStableFunc(f.Records, func(a, b Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return f
}
