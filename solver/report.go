package solver

import (
	"context"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/opencontainers/go-digest"
)

// reporter tells a build's watchers of its vertices (CTL-065 to -068).
type reporter struct {
	w progress.Writer

	mu     sync.Mutex // guards the fields below; held while writing, to keep the order
	seen   map[*Vertex]*shown
	plain  map[digest.Digest]bool // those that don't ignore the cache
	order  []*shown
	counts Stats
}

// shown is what watchers know of a vertex.
type shown struct {
	vertex    *Vertex
	digest    digest.Digest // by which they know it
	inputs    []*shown
	started   *time.Time
	completed bool
	counted   bool // in Completed
	cached    bool // in Cached
}

// scope is what v's op writes to.
func (r *reporter) scope(v *Vertex) progress.Scope { return progress.NewScope(r.w, r.digest(v)) }

func (r *reporter) digest(v *Vertex) digest.Digest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen[v].digest
}

func (r *reporter) writeLocked(s *shown, started, completed *time.Time, cached bool, err error) {
	out := &progress.Vertex{
		Digest: s.digest, Name: s.vertex.Name, Group: s.vertex.Group,
		Inputs: make([]digest.Digest, len(s.inputs)), Started: started, Completed: completed, Cached: cached,
	}
	for i, in := range s.inputs {
		out.Inputs[i] = in.digest
	}
	if err != nil {
		out.Error = err.Error()
	}
	r.w.Write(progress.Event{Vertex: out})
}

// announce shows a new vertex, whose inputs are known. One that ignores the
// cache beside a twin that doesn't is shown under a digest of its own.
func (r *reporter) announce(a *Announce) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &shown{vertex: a.Vertex, digest: a.Vertex.Digest, inputs: make([]*shown, len(a.Inputs))}
	if a.Vertex.IgnoreCache && r.plain[a.Vertex.Digest] {
		s.digest = digest.FromString(string(a.Vertex.Digest) + "-ignorecache")
	}
	for i, in := range a.Inputs {
		s.inputs[i] = r.seen[in.Vertex]
	}
	r.seen[a.Vertex] = s
	r.plain[a.Vertex.Digest] = r.plain[a.Vertex.Digest] || !a.Vertex.IgnoreCache
	r.order = append(r.order, s)
	r.counts.Total++
	r.writeLocked(s, nil, nil, false, nil)
}

func (r *reporter) start(v *Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, now := r.seen[v], time.Now()
	s.started, s.completed = &now, false
	r.consumedLocked(s, now)
	r.writeLocked(s, &now, nil, false, nil)
}

// complete ends what start began; a vertex that fails before it starts does
// both at once.
func (r *reporter) complete(v *Vertex, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.completeLocked(r.seen[v], err)
}

func (r *reporter) completeLocked(s *shown, err error) {
	now := time.Now()
	if s.started == nil {
		s.started = &now
	}
	s.completed = true
	if !s.counted && err == nil {
		s.counted = true
		r.counts.Completed++
	}
	r.writeLocked(s, s.started, &now, false, err)
}

// cached shows v as answered from the cache, and so what it stands on.
func (r *reporter) cached(v *Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, now := r.seen[v], time.Now()
	r.consumedLocked(s, now)
	r.cachedLocked(s, now)
}

func (r *reporter) cachedLocked(s *shown, now time.Time) {
	s.started, s.completed = &now, true
	if !s.counted {
		s.counted = true
		r.counts.Completed++
	}
	if !s.cached {
		s.cached = true
		r.counts.Cached++
	}
	r.writeLocked(s, &now, &now, true, nil)
}

// consumedLocked shows what s stands on and nothing was ever done for as
// cached.
func (r *reporter) consumedLocked(s *shown, now time.Time) {
	stack := []*shown{s}
	for len(stack) > 0 {
		s := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, in := range s.inputs {
			if in.started == nil {
				r.cachedLocked(in, now)
				stack = append(stack, in)
			}
		}
	}
}

// interrupted completes what was started and never ended.
func (r *reporter) interrupted() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.order {
		if s.started != nil && !s.completed {
			r.completeLocked(s, context.Canceled)
		}
	}
}

func (r *reporter) stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}
