package progress

import (
	"context"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// Graph tells a build's watchers of its vertices (CTL-065 to -068), which its
// user knows by keys of its own. Its methods are safe for concurrent use, those
// of one vertex after its Add.
type Graph[K comparable] struct {
	w Writer

	mu     sync.Mutex // guards the fields below; held while writing, to keep the order
	seen   map[K]*shown
	taken  map[digest.Digest]bool
	order  []*shown
	counts Counts
}

// Counts are of vertices.
type Counts struct {
	Total, Completed, Cached int
}

// shown is what watchers know of a vertex.
type shown struct {
	Vertex
	inputs  []*shown
	counted bool // in Completed
	cached  bool // in Cached
}

// NewGraph returns a graph without vertices that is shown to w.
func NewGraph[K comparable](w Writer) *Graph[K] {
	return &Graph[K]{w: w, seen: map[K]*shown{}, taken: map[digest.Digest]bool{}}
}

// Add shows a new vertex, whose inputs are known. One whose digest another has,
// which is its twin that uses the cache, is shown under a digest of its own.
func (g *Graph[K]) Add(key K, dgst digest.Digest, name string, group *Group, inputs []K) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.taken[dgst] {
		dgst = digest.FromString(string(dgst) + "-ignorecache")
	}
	g.taken[dgst] = true
	s := &shown{
		Vertex: Vertex{Digest: dgst, Name: name, Group: group, Inputs: make([]digest.Digest, len(inputs))},
		inputs: make([]*shown, len(inputs)),
	}
	for i, in := range inputs {
		s.inputs[i] = g.seen[in]
		s.Inputs[i] = s.inputs[i].Digest
	}
	g.seen[key] = s
	g.order = append(g.order, s)
	g.counts.Total++
	g.writeLocked(s)
}

// Digest is what watchers know the vertex by.
func (g *Graph[K]) Digest(key K) digest.Digest {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.seen[key].Digest
}

// Shown is what watchers were last told of the vertex.
func (g *Graph[K]) Shown(key K) Vertex {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.seen[key].Vertex
}

// Scope is what the vertex writes to.
func (g *Graph[K]) Scope(key K) Scope { return NewScope(g.w, g.Digest(key)) }

// writeLocked shows s as it is.
func (g *Graph[K]) writeLocked(s *shown) {
	v := s.Vertex
	g.w.Write(Event{Vertex: &v})
}

// Start shows that the vertex runs, since at.
func (g *Graph[K]) Start(key K, at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.seen[key]
	g.consumedLocked(s, time.Now())
	s.Started, s.Completed, s.Cached, s.Error = &at, nil, false, ""
	g.writeLocked(s)
}

// Complete ends what Start began; a vertex that fails before it starts does both
// at once.
func (g *Graph[K]) Complete(key K, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.completeLocked(g.seen[key], err)
}

func (g *Graph[K]) completeLocked(s *shown, err error) {
	now := time.Now()
	if s.Started == nil {
		s.Started = &now
	}
	s.Completed, s.Cached, s.Error = &now, false, ""
	if err != nil {
		s.Error = err.Error()
	} else {
		g.countLocked(s)
	}
	g.writeLocked(s)
}

func (g *Graph[K]) countLocked(s *shown) {
	if !s.counted {
		s.counted = true
		g.counts.Completed++
	}
}

// Cached shows the vertex as answered from the cache, and so what it stands on.
func (g *Graph[K]) Cached(key K) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s, now := g.seen[key], time.Now()
	g.consumedLocked(s, now)
	g.cachedLocked(s, now)
}

func (g *Graph[K]) cachedLocked(s *shown, now time.Time) {
	s.Started, s.Completed, s.Cached, s.Error = &now, &now, true, ""
	g.countLocked(s)
	if !s.cached {
		s.cached = true
		g.counts.Cached++
	}
	g.writeLocked(s)
}

// consumedLocked shows what s stands on and nothing was ever done for as
// cached.
func (g *Graph[K]) consumedLocked(s *shown, now time.Time) {
	stack := []*shown{s}
	for len(stack) > 0 {
		s := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, in := range s.inputs {
			if in.Started == nil {
				g.cachedLocked(in, now)
				stack = append(stack, in)
			}
		}
	}
}

// Interrupt completes what was started and never ended.
func (g *Graph[K]) Interrupt() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range g.order {
		if s.Started != nil && s.Completed == nil {
			g.completeLocked(s, context.Canceled)
		}
	}
}

// Forget leaves the graph, in which nothing happens any more, without vertices: it
// has only their counts.
func (g *Graph[K]) Forget() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.seen, g.taken, g.order = nil, nil, nil
}

// Counts are those as of now.
func (g *Graph[K]) Counts() Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.counts
}
