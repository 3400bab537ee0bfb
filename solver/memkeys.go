package solver

import (
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// MemoryKeys is a KeyStore that forgets everything when the process ends.
type MemoryKeys struct {
	mu    sync.Mutex // guards the fields below
	nodes map[Key]*memoryNode
	byID  map[string][]Key // where a result hangs
}

// memoryNode is a key that leads somewhere or that a result hangs off.
type memoryNode struct {
	records []Record
	links   map[memoryTag][]Key
	from    []memoryLink // those that lead here
}

// memoryTag tells the links of a key apart.
type memoryTag struct {
	op, selector  digest.Digest
	input, output int
}

type memoryLink struct {
	from Key
	tag  memoryTag
}

// NewMemoryKeys returns an empty store.
func NewMemoryKeys() *MemoryKeys {
	return &MemoryKeys{nodes: map[Key]*memoryNode{}, byID: map[string][]Key{}}
}

// Lookup implements KeyStore.
func (m *MemoryKeys) Lookup(l Lookup) (Found, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Resolve(l, func(input int, from InputKey) []Key {
		return m.get(from.Key).links[memoryTag{l.Op, from.Selector, input, l.Output}]
	}, func(k Key) []Record { return m.get(k).records }), nil
}

// get returns what is known of k, for reading.
func (m *MemoryKeys) get(k Key) *memoryNode {
	if n := m.nodes[k]; n != nil {
		return n
	}
	return &memoryNode{}
}

// make returns k's node, for writing.
func (m *MemoryKeys) make(k Key) *memoryNode {
	n := m.nodes[k]
	if n == nil {
		n = &memoryNode{}
		m.nodes[k] = n
	}
	return n
}

// Save implements KeyStore.
func (m *MemoryKeys) Save(s Save) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := s.Keys
	if s.Result == nil {
		keys = slices.DeleteFunc(slices.Clone(keys), func(k Key) bool {
			n := m.get(k)
			return len(n.records) == 0 && len(n.links) == 0
		})
	}
	for _, k := range keys {
		for i, candidates := range s.Inputs {
			for _, from := range candidates {
				m.link(memoryLink{from.Key, memoryTag{s.Op, from.Selector, i, s.Output}}, k)
			}
		}
		if s.Result != nil {
			m.hang(k, Record{Result: s.Result.ID(), CreatedAt: time.Now()})
		}
	}
	return nil
}

func (m *MemoryKeys) link(l memoryLink, to Key) {
	n, end := m.make(l.from), m.make(to)
	if slices.Contains(n.links[l.tag], to) {
		return
	}
	if n.links == nil {
		n.links = map[memoryTag][]Key{}
	}
	n.links[l.tag] = append(n.links[l.tag], to)
	end.from = append(end.from, l)
}

// unlink removes l, which led to the key to.
func (m *MemoryKeys) unlink(l memoryLink, to Key) {
	n := m.nodes[l.from]
	if n == nil {
		return // gone before
	}
	n.links[l.tag] = slices.DeleteFunc(n.links[l.tag], func(k Key) bool { return k == to })
	if len(n.links[l.tag]) == 0 {
		delete(n.links, l.tag)
	}
}

func (m *MemoryKeys) hang(k Key, r Record) {
	n := m.make(k)
	old := len(n.records)
	n.records = slices.DeleteFunc(n.records, func(o Record) bool { return o.Result == r.Result })
	if len(n.records) == old {
		m.byID[r.Result] = append(m.byID[r.Result], k)
	}
	n.records = append(n.records, r)
}

// Drop implements KeyStore.
func (m *MemoryKeys) Drop(results []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var bare []Key
	for _, id := range results {
		for _, k := range m.byID[id] {
			n := m.nodes[k]
			n.records = slices.DeleteFunc(n.records, func(r Record) bool { return r.Result == id })
			bare = append(bare, k)
		}
		delete(m.byID, id)
	}
	dead := DeadEnds(bare,
		func(k Key) bool { return len(m.get(k).records) > 0 },
		func(k Key) (out []Key) {
			for _, to := range m.get(k).links {
				out = append(out, to...)
			}
			return out
		},
		func(k Key) (out []Key) {
			for _, l := range m.get(k).from {
				out = append(out, l.from)
			}
			return out
		})
	for _, k := range dead {
		for _, l := range m.get(k).from {
			m.unlink(l, k)
		}
		delete(m.nodes, k)
	}
	return nil
}
