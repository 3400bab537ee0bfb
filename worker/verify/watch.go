package verify

import (
	"fmt"
	"sync"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// Watch is the solver.Observer of one build. End is called once, when the build
// is over.
type Watch struct {
	solver.Unobserved
	v *Verifier

	mu   sync.Mutex // guards the fields below
	hits map[node]*task
	made map[output]string // records that the build made or was given by another
}

var _ solver.Observer = (*Watch)(nil)

// node is a vertex, whichever request brought it.
type node struct {
	digest      digest.Digest
	ignoreCache bool
}

func nodeOf(v *solver.Vertex) node { return node{v.Digest, v.IgnoreCache} }

type output struct {
	node
	index int
}

// task is a hit: a vertex whose outputs records were found for.
type task struct {
	vertex *solver.Vertex
	op     solver.Op // to execute
	hits   map[int]hit
	// made are the records that the build itself made of the vertex's inputs, ""
	// for inputs that the build only knew the keys of.
	made  []string
	tries int
}

type hit struct {
	lookup solver.Lookup
	record solver.Record
}

// id names the task by what was found for which op, whatever vertex of which
// build it was.
func (t *task) id() (id string) {
	for _, i := range t.indexes() {
		h := t.hits[i]
		id += fmt.Sprintf("%s %d %s ", h.lookup.Op, i, h.record.Result)
	}
	return id
}

// Watch says that a build begins, and returns what observes it.
func (v *Verifier) Watch() *Watch {
	v.begin()
	return &Watch{v: v, hits: map[node]*task{}, made: map[output]string{}}
}

// Observe is Watch, with what ends it.
func (v *Verifier) Observe() (o solver.Observer, ended func()) {
	w := v.Watch()
	return w, w.End
}

// Queried notes what a vertex may be answered from.
func (w *Watch) Queried(eff *solver.Query, found solver.Found) {
	// What an import has isn't on this machine yet; it is verified as a hit on
	// the record that it becomes.
	if len(found.Records) > 0 && found.Records[0].Import == 0 {
		w.found(eff.Edge, eff.Lookup, found.Records[0])
	}
}

// Loading notes what a vertex is answered from.
func (w *Watch) Loading(eff *solver.Load) {
	if eff.Record.Import == 0 {
		w.found(eff.Edge, eff.Lookup, eff.Record)
	}
}

func (w *Watch) found(e solver.Edge, l solver.Lookup, r solver.Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.hits[nodeOf(e.Vertex)]
	if t == nil {
		t = &task{vertex: e.Vertex, hits: map[int]hit{}}
		w.hits[nodeOf(e.Vertex)] = t
	}
	t.hits[e.Index] = hit{lookup: l, record: r}
}

// Ended notes what the build made itself.
func (w *Watch) Ended(eff *solver.Execute, ev *solver.Executed) {
	if ev.Err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n := nodeOf(eff.Vertex)
	delete(w.hits, n)
	for _, out := range ev.Outputs {
		w.made[output{n, out.Index}] = out.Result.ID()
	}
}

// End hands the build's hits over.
func (w *Watch) End() {
	w.mu.Lock()
	var hits []*task
	for _, t := range w.hits {
		if t.op, _ = w.v.cfg.Repeat(t.vertex); t.op == nil {
			continue
		}
		for _, in := range t.vertex.Inputs {
			t.made = append(t.made, w.made[output{nodeOf(in.Vertex), in.Index}])
		}
		hits = append(hits, t)
	}
	w.mu.Unlock()
	w.v.end(hits)
}
