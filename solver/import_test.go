package solver_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
)

// elsewhere is another daemon, whose cache builds may import. It is an Import's
// ResultStore: what it loads becomes a result of the importing world.
type elsewhere struct {
	*world
	to     *world
	solver *Solver
	keys   *keygraph.Memory
	broken bool // nothing can be loaded
}

func newElsewhere(to *world) *elsewhere {
	e := &elsewhere{world: newWorld(), to: to, keys: keygraph.NewMemory()}
	e.solver = New(Options{Keys: e.keys, Results: e.world})
	return e
}

func (e *elsewhere) Load(_ context.Context, id string) (Result, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, ok := e.values[id]
	if !ok || e.broken {
		return nil, fmt.Errorf("%w: %s", ErrNoResult, id)
	}
	return e.to.make(v), nil
}

func (e *elsewhere) imports() []Import { return []Import{{Keys: e.keys, Results: e}} }

func solveIn(t *testing.T, w *world, s *Solver, imports []Import, edges []Edge) {
	t.Helper()
	rec := &recorded{also: traceTo(t)}
	b := s.NewBuild(BuildOptions{Trace: rec.trace, Imports: imports})
	defer rec.replay(t)
	defer b.Close()
	for _, e := range edges {
		want, err := newOracle().solve(e)
		if err != nil {
			t.Fatal(err)
		}
		r, err := b.Solve(context.Background(), e)
		if err != nil {
			t.Fatal(err)
		}
		w.compare(t, e, r, want[0])
		r.Release()
	}
}

// A build that imports the cache of other builds executes what it would where
// they ran; and what it used is the daemon's own: the same build finds it again
// without the import. compat: LLB-175
func TestRandomImports(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
		there := newElsewhere(w)
		defer func() {
			s.Close()
			there.solver.Close()
			w.check(t)
			there.check(t)
		}()
		shape := r.Uint64()
		o := newOracle()
		for version := range 2 {
			edges := graph{r: r, w: there.world, shape: shape, version: version}.edges()[:1]
			solveIn(t, there.world, there.solver, nil, edges)
			if _, err := o.solve(edges...); err != nil {
				t.Fatal(err)
			}
		}
		before := maps.Clone(o.executed)
		edges := graph{r: r, w: w, shape: shape, version: 1 + r.IntN(2)}.edges()[:1]
		solveIn(t, w, s, there.imports(), edges)
		if _, err := o.solve(edges...); err != nil {
			t.Fatal(err)
		}
		maps.DeleteFunc(o.executed, func(id string, n int) bool { return n == before[id] })
		got := w.executions()
		if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(o.executed))) {
			t.Errorf("executed with the import:\n%s\nwant:\n%s", describe(got), describe(o.executed))
		}
		solveIn(t, w, s, nil, edges)
		if slices.ContainsFunc(edges, ignoresCache) {
			return // and runs again
		}
		if again := w.executions(); !maps.Equal(again, got) {
			t.Errorf("executed again without the import:\n%s\nbefore:\n%s", describe(again), describe(got))
		}
	})
}

// deadIndex can't be read.
type deadIndex struct{}

func (deadIndex) Lookup(Lookup) (Found, error) { return Found{}, errBroken }

// importsTold notes which imports failed. Lookups come one after the other.
type importsTold struct {
	Unobserved
	failed []string
}

func (o *importsTold) ImportFailed(name string, err error) {
	o.failed = append(o.failed, name+": "+err.Error())
}

// An import that can't be read, or whose results can't be had, is none; what is
// the daemon's own comes before what an import has; and inputs match by a
// mixture of both. compat: LLB-170, LLB-173, LLB-175
func TestImports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
		there := newElsewhere(w)
		graph := func(w *world) (top, left, right *Vertex) {
			left = w.vertex("left", 1, in{v: w.vertex("base", 1)})
			right = w.vertex("right", 1, in{v: w.vertex("base", 1)})
			return w.vertex("top", 1, in{v: left}, in{v: right, content: true, selector: "b"}), left, right
		}
		top, left, _ := graph(there.world)
		solveIn(t, there.world, there.solver, nil, []Edge{{Vertex: top}, {Vertex: left}})

		top, left, right := graph(w)
		there.broken = true
		told := &importsTold{}
		dead := s.NewBuild(BuildOptions{
			Imports: append([]Import{{Name: "dead", Keys: deadIndex{}, Results: there}}, there.imports()...), Observers: []Observer{Unobserved{}, told},
		})
		l, err := dead.Solve(context.Background(), Edge{Vertex: left})
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
		dead.Close()
		if len(told.failed) == 0 || told.failed[0] != "dead: "+errBroken.Error() {
			t.Errorf("told of the import that can't be read: %q", told.failed)
		}
		if got := describe(w.executions()); got != "1 base()\n1 left(base/0()base/0)" {
			t.Errorf("executed:\n%s", got)
		}
		there.broken = false

		// Another right, of the same content: left is found here, the content of
		// right and so top there.
		right.Digest, right.Op.(*step).ids = "other", []string{"right2"}
		edges := []Edge{{Vertex: top}}
		var why string
		b := s.NewBuild(BuildOptions{Imports: there.imports(), Trace: func(_ Event, effects []Effect) {
			for _, eff := range effects {
				if load, ok := eff.(*Load); ok && load.Edge.Vertex == top {
					why = load.Reason
				}
			}
		}})
		r, err := b.Solve(context.Background(), edges[0])
		if err != nil {
			t.Fatal(err)
		}
		r.Release()
		b.Close()
		if why != "hit: by content" {
			t.Errorf("top: %s", why)
		}

		found := Found{Records: []Record{{Result: "own"}}, Matched: []bool{false}}
		found.Add(Found{Keys: []Key{{1}}, Records: []Record{{Result: "r"}}, Matched: []bool{true}}, 2)
		if got := []string{found.Records[0].String(), found.Records[1].String()}; !slices.Equal(got, []string{"own", "import2:r"}) || !found.Matched[0] {
			t.Errorf("found %v, matched %v", got, found.Matched)
		}
		s.Close()
		there.solver.Close()
		w.check(t)
		there.check(t)
	})
}

// A record of an import that turns out lost is not asked for again in the build,
// whatever it was called here.
func TestImportLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
		there := newElsewhere(w)
		base := there.vertex("base", 1)
		solveIn(t, there.world, there.solver, nil, []Edge{{Vertex: base}})
		base = w.vertex("base", 1)
		top := w.vertex("top", 1, in{v: base})
		w.fault = func(id string) bool { return id == "r1" } // as which base's was loaded
		solveIn(t, w, s, there.imports(), []Edge{{Vertex: top}})
		if got := describe(w.executions()); got != "1 base()\n1 top(base/0()base/0)" {
			t.Errorf("executed:\n%s", got)
		}
		if _, err := there.Load(context.Background(), "none"); !errors.Is(err, ErrNoResult) {
			t.Error(err)
		}
		s.Close()
		there.solver.Close()
		w.check(t)
		there.check(t)
	})
}
