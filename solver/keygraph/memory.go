package keygraph

import (
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// Memory is a solver.KeyStore that forgets everything when the process ends.
type Memory struct {
	mu    sync.Mutex // guards the fields below
	nodes map[solver.Key]*memoryNode
	byID  map[string][]solver.Key // where a result hangs
}

// memoryNode is a key that leads somewhere or that a result hangs off.
type memoryNode struct {
	records []solver.Record
	links   map[memoryTag][]solver.Key
	from    []memoryLink // those that lead here
}

// memoryTag tells the links of a key apart.
type memoryTag struct {
	op, selector  digest.Digest
	input, output int
}

type memoryLink struct {
	from solver.Key
	tag  memoryTag
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{nodes: map[solver.Key]*memoryNode{}, byID: map[string][]solver.Key{}}
}

// Lookup implements solver.KeyStore.
func (m *Memory) Lookup(l solver.Lookup) (solver.Found, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Resolve(l, func(input int, from solver.InputKey) []solver.Key {
		return m.get(from.Key).links[memoryTag{l.Op, from.Selector, input, l.Output}]
	}, func(k solver.Key) []solver.Record { return m.get(k).records }), nil
}

// get returns what is known of k, for reading.
func (m *Memory) get(k solver.Key) *memoryNode {
	if n := m.nodes[k]; n != nil {
		return n
	}
	return &memoryNode{}
}

// make returns k's node, for writing.
func (m *Memory) make(k solver.Key) *memoryNode {
	n := m.nodes[k]
	if n == nil {
		n = &memoryNode{}
		m.nodes[k] = n
	}
	return n
}

// Save implements solver.KeyStore.
func (m *Memory) Save(s solver.Save) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	keys := s.Keys
	if s.Result == nil {
		keys = slices.DeleteFunc(slices.Clone(keys), func(k solver.Key) bool {
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
			m.hang(k, solver.Record{Result: s.Result.ID(), CreatedAt: time.Now()})
		}
	}
	return nil
}

func (m *Memory) link(l memoryLink, to solver.Key) {
	n, end := m.make(l.from), m.make(to)
	if slices.Contains(n.links[l.tag], to) {
		return
	}
	if n.links == nil {
		n.links = map[memoryTag][]solver.Key{}
	}
	n.links[l.tag] = append(n.links[l.tag], to)
	end.from = append(end.from, l)
}

// unlink removes l, which led to the key to.
func (m *Memory) unlink(l memoryLink, to solver.Key) {
	n := m.nodes[l.from]
	if n == nil {
		return // gone before
	}
	n.links[l.tag] = slices.DeleteFunc(n.links[l.tag], func(k solver.Key) bool { return k == to })
	if len(n.links[l.tag]) == 0 {
		delete(n.links, l.tag)
	}
}

func (m *Memory) hang(k solver.Key, r solver.Record) {
	n := m.make(k)
	old := len(n.records)
	n.records = slices.DeleteFunc(n.records, func(o solver.Record) bool { return o.Result == r.Result })
	if len(n.records) == old {
		m.byID[r.Result] = append(m.byID[r.Result], k)
	}
	n.records = append(n.records, r)
}

// Drop implements solver.KeyStore.
func (m *Memory) Drop(results []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var bare []solver.Key
	for _, id := range results {
		for _, k := range m.byID[id] {
			n := m.nodes[k]
			n.records = slices.DeleteFunc(n.records, func(r solver.Record) bool { return r.Result == id })
			bare = append(bare, k)
		}
		delete(m.byID, id)
	}
	dead := DeadEnds(bare,
		func(k solver.Key) bool { return len(m.get(k).records) > 0 },
		func(k solver.Key) (out []solver.Key) {
			for _, to := range m.get(k).links {
				out = append(out, to...)
			}
			return out
		},
		func(k solver.Key) (out []solver.Key) {
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
