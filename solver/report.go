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

	mu     sync.Mutex // guards the fields below
	seen   map[digest.Digest]*shown
	counts Stats
}

// shown is what watchers know of a vertex.
type shown struct {
	vertex    *Vertex
	started   *time.Time
	completed bool
	counted   bool // in Completed
}

func (r *reporter) scope(v *Vertex) progress.Scope { return progress.NewScope(r.w, v.Digest) }

func (r *reporter) write(v *Vertex, started, completed *time.Time, cached bool, err error) {
	out := &progress.Vertex{Digest: v.Digest, Name: v.Name, Started: started, Completed: completed, Cached: cached, Group: v.Group}
	for _, in := range v.Inputs {
		out.Inputs = append(out.Inputs, in.Vertex.Digest)
	}
	if err != nil {
		out.Error = err.Error()
	}
	r.w.Write(progress.Event{Vertex: out})
}

func (r *reporter) announce(v *Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen[v.Digest] != nil {
		return
	}
	r.seen[v.Digest] = &shown{vertex: v}
	r.counts.Total++
	r.write(v, nil, nil, false, nil)
}

func (r *reporter) start(v *Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, now := r.seen[v.Digest], time.Now()
	s.started, s.completed = &now, false
	r.write(v, &now, nil, false, nil)
	r.consumedLocked(v, now)
}

func (r *reporter) complete(v *Vertex, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.completeLocked(v, err)
}

func (r *reporter) completeLocked(v *Vertex, err error) {
	s, now := r.seen[v.Digest], time.Now()
	if s.started == nil {
		s.started = &now
	}
	s.completed = true
	if !s.counted && err == nil {
		s.counted = true
		r.counts.Completed++
	}
	r.write(v, s.started, &now, false, err)
}

// cached shows v as answered from the cache, and so what it stands on.
func (r *reporter) cached(v *Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.cachedLocked(v, now)
	r.consumedLocked(v, now)
}

func (r *reporter) cachedLocked(v *Vertex, now time.Time) {
	s := r.seen[v.Digest]
	s.started, s.completed = &now, true
	if !s.counted {
		s.counted = true
		r.counts.Completed++
	}
	r.counts.Cached++
	r.write(v, &now, &now, true, nil)
}

// consumedLocked shows inputs that nothing was ever done for as cached.
func (r *reporter) consumedLocked(v *Vertex, now time.Time) {
	stack := []*Vertex{v}
	for len(stack) > 0 {
		v := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, in := range v.Inputs {
			if s := r.seen[in.Vertex.Digest]; s != nil && s.started == nil {
				r.cachedLocked(in.Vertex, now)
				stack = append(stack, in.Vertex)
			}
		}
	}
}

// interrupted completes what was started and never ended.
func (r *reporter) interrupted() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.seen {
		if s.started != nil && !s.completed {
			r.completeLocked(s.vertex, context.Canceled)
		}
	}
}

func (r *reporter) stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts
}
