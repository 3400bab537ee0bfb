package solver_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/internal/progress"
	. "github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// world is what the tests' ops work on: values by result id, which handles are
// held, and what was executed. It is a ResultStore.
type world struct {
	mu       sync.Mutex // guards the fields below
	values   map[string]value
	lost     map[string]bool
	handles  map[*testResult]bool // those that weren't released
	problems []string
	executed map[string]int        // executions that ended well, by identity
	runs     map[digest.Digest]int // the same, by vertex
	next     int

	// fault, if set, is asked before each use of a record; true loses it.
	fault func(id string) bool
}

// value is what an edge is worth: two parts, which selectors tell apart.
type value struct{ a, b string }

func (v value) view(selector digest.Digest) string {
	switch selector {
	case "a":
		return v.a
	case "b":
		return v.b
	}
	return v.a + v.b
}

func newWorld() *world {
	return &world{values: map[string]value{}, lost: map[string]bool{}, handles: map[*testResult]bool{}, executed: map[string]int{}, runs: map[digest.Digest]int{}}
}

// testResult counts its handles.
type testResult struct {
	w  *world
	id string
}

func (r *testResult) ID() string { return r.id }

func (r *testResult) Clone() Result {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	if !r.w.handles[r] {
		r.w.problems = append(r.w.problems, "cloned a released handle of "+r.id)
	}
	return r.w.handleLocked(r.id)
}

func (r *testResult) Release() {
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	if !r.w.handles[r] {
		r.w.problems = append(r.w.problems, "released twice: "+r.id)
	}
	delete(r.w.handles, r)
}

func (w *world) handleLocked(id string) *testResult {
	r := &testResult{w: w, id: id}
	w.handles[r] = true
	return r
}

// make returns a new result that is worth v.
func (w *world) make(v value) Result {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := fmt.Sprintf("r%d", w.next)
	w.values[id] = v
	return w.handleLocked(id)
}

// use returns what r is worth, unless it is lost.
func (w *world) use(r Result) (value, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t := r.(*testResult); !w.handles[t] {
		w.problems = append(w.problems, "used a released handle of "+t.id)
	}
	w.strikeLocked(r.ID())
	return w.values[r.ID()], !w.lost[r.ID()]
}

func (w *world) strikeLocked(id string) {
	if w.fault != nil && w.fault(id) {
		w.lost[id] = true
	}
}

// Load implements ResultStore.
func (w *world) Load(ctx context.Context, id string) (Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	runtime.Gosched()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.strikeLocked(id)
	if _, ok := w.values[id]; !ok || w.lost[id] {
		return nil, fmt.Errorf("%w: %s", ErrNoResult, id)
	}
	return w.handleLocked(id), nil
}

// check reports what was leaked or misused.
func (w *world) check(t testing.TB) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for r := range w.handles {
		t.Errorf("a handle of %s was never released", r.id)
	}
	for _, p := range w.problems {
		t.Error(p)
	}
}

// step is an op of the tests: what it makes is a function of its name and of
// what it sees of its inputs.
type step struct {
	w         *world
	name      string // of the op; steps of one name are the same op
	vertex    digest.Digest
	ids       []string
	deps      []stepDep
	outputs   int
	fails     bool
	transient bool // its key says only who is asked
	// before, if set, is called by each execution.
	before func(ctx context.Context, asker Asker) error
}

type stepDep struct {
	selector digest.Digest
	content  bool
}

var errStep = errors.New("exit code 1")

func (s *step) CacheMap(ctx context.Context, _ Asker, index int) (*CacheMap, bool, error) {
	m := &CacheMap{Digest: digest.Digest(s.ids[index]), Transient: s.transient}
	for _, d := range s.deps {
		dep := Dep{Selector: d.selector}
		if d.content {
			dep.Content = func(ctx context.Context, _ Asker, in Result) (digest.Digest, error) {
				runtime.Gosched()
				v, ok := s.w.use(in)
				if !ok {
					return "", &LostError{Inputs: []int{0}, Err: errors.New("can't be read")}
				}
				return digest.Digest(v.view(d.selector)), ctx.Err()
			}
		}
		m.Deps = append(m.Deps, dep)
	}
	return m, index+1 < len(s.ids), nil
}

// results is what s makes of what it sees.
func (s *step) results(views []string) (out []value) {
	for i := range s.outputs {
		out = append(out, value{
			a: fmt.Sprintf("%s/%d(%s)", s.name, i, strings.Join(views, ",")),
			b: fmt.Sprintf("%s/%d", s.name, i), // whatever the inputs are
		})
	}
	return out
}

func (s *step) Exec(ctx context.Context, asker Asker, inputs []Result) ([]Result, error) {
	runtime.Gosched()
	if s.before != nil {
		if err := s.before(ctx, asker); err != nil {
			return nil, err
		}
	}
	var views []string
	for i, in := range inputs {
		v, ok := s.w.use(in)
		if !ok {
			return nil, &LostError{Inputs: []int{i}, Err: errors.New("can't be mounted")}
		}
		views = append(views, v.view(s.deps[i].selector))
	}
	if s.fails {
		left := &Remains{Err: errStep, Left: []Result{nil, s.w.make(value{a: "what is left of " + s.name, b: s.name})}}
		for _, in := range inputs {
			left.Inputs = append(left.Inputs, in.Clone())
		}
		return nil, left
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	progress.From(ctx).Stream(1).Write([]byte("ran " + s.name))
	s.w.mu.Lock()
	s.w.executed[identity(s.name, views)]++
	s.w.runs[s.vertex]++
	s.w.mu.Unlock()
	var out []Result
	for _, v := range s.results(views) {
		out = append(out, s.w.make(v))
	}
	return out, nil
}

func identity(name string, views []string) string { return name + "(" + strings.Join(views, ",") + ")" }

// in is an input of a vertex of the tests.
type in struct {
	v        *Vertex
	index    int
	selector digest.Digest
	content  bool
}

// vertex makes a vertex of w; the same parts give the same digest.
func (w *world) vertex(name string, outputs int, inputs ...in) *Vertex {
	s := &step{w: w, name: name, ids: []string{name}, outputs: outputs, fails: strings.HasPrefix(name, "fail"), transient: strings.HasPrefix(name, "client")}
	v := &Vertex{Name: name, Op: s}
	id := name
	for _, i := range inputs {
		v.Inputs = append(v.Inputs, Edge{i.v, i.index})
		s.deps = append(s.deps, stepDep{i.selector, i.content})
		id += fmt.Sprintf(" %s/%d@%s", i.v.Digest, i.index, i.selector)
	}
	v.Digest = digest.Digest(digest.FromString(id).Encoded()[:16])
	s.vertex = v.Digest
	return v
}

func (w *world) executions() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := map[string]int{}
	for k, n := range w.executed {
		out[k] = n
	}
	return out
}

func describe(executed map[string]int) string {
	var lines []string
	for k, n := range executed {
		lines = append(lines, fmt.Sprintf("%d %s", n, k))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
