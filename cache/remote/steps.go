package remote

import (
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// Step is one output of a vertex, or the content of an input, as a record of it
// will say.
type Step struct {
	Digest digest.Digest
	Inputs [][]Use // alternatives, by input; nil if there are no inputs
	// Results are what there is of it, the daemon's own first. A source has none,
	// since it can be asked itself.
	Results []solver.Record
}

// Use says which step is an input.
type Use struct {
	Selector digest.Digest
	Step     *Step
}

// KeyStore is the daemon's own key graph.
type KeyStore interface {
	solver.KeyIndex
	// Contents returns for each input of the step that l describes the keys that
	// lead from it to key whatever made the input, and that nothing leads to.
	Contents(key solver.Key, l solver.Lookup) [][]solver.Key
}

// Recorder notes what the vertices of a build are known by. It observes the
// build.
type Recorder struct {
	solver.Unobserved

	mu       sync.Mutex // guards the fields below
	vertices map[*solver.Vertex]*vertex
	last     map[digest.Digest]*vertex
}

type vertex struct {
	inputs  []solver.Edge
	hidden  bool // ExportCache says so
	passing bool // its key tells who is asked, which no other build has
	outputs map[int]*output
}

type output struct {
	keys    []solver.Key    // all that it is or was known by
	lookup  solver.Lookup   // the last
	results []solver.Record // of imports
}

var _ solver.Observer = (*Recorder)(nil)

// NewRecorder returns the recorder of a build that begins.
func NewRecorder() *Recorder {
	return &Recorder{vertices: map[*solver.Vertex]*vertex{}, last: map[digest.Digest]*vertex{}}
}

// Announced implements solver.Observer.
func (r *Recorder) Announced(eff *solver.Announce) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v := &vertex{inputs: eff.Inputs, outputs: map[int]*output{}}
	v.hidden = eff.Vertex.ExportCache != nil && !*eff.Vertex.ExportCache
	r.vertices[eff.Vertex] = v
	// A vertex that ignores the cache stands for its plain twin, too.
	if r.last[eff.Vertex.Digest] == nil || eff.Vertex.IgnoreCache {
		r.last[eff.Vertex.Digest] = v
	}
}

// Queried implements solver.Observer.
func (r *Recorder) Queried(eff *solver.Query, found solver.Found) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := r.vertices[eff.Edge.Vertex].known(eff.Lookup, found.Keys)
	o.results = slices.DeleteFunc(slices.Clone(found.Records), func(rec solver.Record) bool { return rec.Import == 0 })
}

// Ended implements solver.Observer.
func (r *Recorder) Ended(eff *solver.Execute, ev *solver.Executed) {
	if ev.Err != nil || len(eff.Wanted) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	v := r.vertices[eff.Vertex]
	v.passing = v.passing || eff.Transient
	for _, out := range ev.Outputs {
		l := eff.Wanted[0].Save.Lookup
		l.Output = out.Index
		keys := out.Keys
		if len(l.Inputs) == 0 {
			keys = nil
			for _, op := range eff.Ops {
				keys = append(keys, solver.RootKey(op, out.Index))
			}
		}
		v.known(l, keys)
	}
}

// known notes that what l asked for is known by keys.
func (v *vertex) known(l solver.Lookup, keys []solver.Key) *output {
	o := v.outputs[l.Output]
	if o == nil {
		o = &output{}
		v.outputs[l.Output] = o
	}
	o.lookup = l
	for _, k := range keys {
		if !slices.Contains(o.keys, k) {
			o.keys = append(o.keys, k)
		}
	}
	return o
}

// Steps returns the steps that lead to the targets, inputs first.
func (r *Recorder) Steps(own KeyStore, targets []solver.Edge) ([]*Step, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := walk{r: r, own: own, made: map[place][]*Step{}, roots: map[solver.Key]*Step{}}
	for _, t := range targets {
		if v := r.last[t.Vertex.Digest]; v != nil {
			if _, err := w.visit(v, t.Index); err != nil {
				return nil, err
			}
		}
	}
	return w.order, nil
}

type place struct {
	v     *vertex
	index int
}

// walk goes from what is asked for to what it was made from.
type walk struct {
	r     *Recorder
	own   KeyStore
	made  map[place][]*Step
	roots map[solver.Key]*Step
	order []*Step
}

// visit returns the steps that an output stands for: of a source one for every
// key, of another vertex one; none if nothing leads to it that another build
// could have.
func (w *walk) visit(v *vertex, index int) ([]*Step, error) {
	at := place{v, index}
	if steps, ok := w.made[at]; ok {
		return steps, nil
	}
	w.made[at] = nil
	o := v.outputs[index]
	if o == nil || v.passing {
		return nil, nil
	}
	if len(v.inputs) == 0 {
		for _, k := range o.keys {
			w.made[at] = append(w.made[at], w.root(k))
		}
		return w.made[at], nil
	}
	step := &Step{Digest: digestOf(solver.RootKey(o.lookup.Op, index))}
	var err error
	if step.Inputs, err = w.inputs(v, o); err != nil || step.Inputs == nil {
		return nil, err
	}
	if !v.hidden {
		found, err := w.own.Lookup(solver.Lookup{Roots: o.keys})
		if err != nil {
			return nil, err
		}
		step.Results = append(found.Records, o.results...)
	}
	w.order = append(w.order, step)
	w.made[at] = []*Step{step}
	return w.made[at], nil
}

// root is what has no inputs: a source, or content.
func (w *walk) root(k solver.Key) *Step {
	s := w.roots[k]
	if s == nil {
		s = &Step{Digest: digestOf(k)}
		w.roots[k] = s
		w.order = append(w.order, s)
	}
	return s
}

// inputs returns what leads to o, nil if one of its inputs has nothing.
func (w *walk) inputs(v *vertex, o *output) ([][]Use, error) {
	contents := make([][]solver.Key, len(v.inputs))
	for _, k := range o.keys {
		for i, more := range w.own.Contents(k, o.lookup) {
			contents[i] = append(contents[i], more...)
		}
	}
	out := make([][]Use, len(v.inputs))
	for i, in := range v.inputs {
		uses, err := w.uses(in, o.lookup.Inputs[i], contents[i])
		if err != nil || len(uses) == 0 {
			return nil, err
		}
		out[i] = uses
	}
	return out, nil
}

// uses are the ways from an input: by its keys, as candidates have them, and by
// content.
func (w *walk) uses(in solver.Edge, candidates []solver.InputKey, contents []solver.Key) (out []Use, err error) {
	v := w.r.vertices[in.Vertex]
	steps, err := w.visit(v, in.Index)
	if err != nil {
		return nil, err
	}
	add := func(u Use) {
		if !slices.Contains(out, u) {
			out = append(out, u)
		}
	}
	made := v.outputs[in.Index]
	isKey := func(k solver.Key) bool { return made != nil && slices.Contains(made.keys, k) }
	for _, c := range candidates {
		if !isKey(c.Key) {
			add(Use{c.Selector, w.root(c.Key)})
			continue
		}
		for _, s := range steps {
			add(Use{c.Selector, s})
		}
	}
	if v.passing || made == nil {
		return out, nil // what was kept of it may tell who was asked
	}
	for _, k := range contents {
		if !isKey(k) {
			add(Use{"", w.root(k)})
		}
	}
	return out, nil
}
