package solver

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	seedFlag = flag.Uint64("solver.seed", 0, "run the random graphs of this seed only")
	timeFlag = flag.Duration("solver.time", 2*time.Second, "how long to try random graphs, for each test")
)

// forSeeds runs fn, in a bubble that knows of deadlocks and leaked goroutines,
// for one seed after the other.
func forSeeds(t *testing.T, fn func(t *testing.T, r *rand.Rand)) {
	first := uint64(time.Now().UnixNano())
	if *seedFlag != 0 {
		first = *seedFlag
	}
	deadline := time.Now().Add(*timeFlag)
	n := 0
	for seed := first; !t.Failed(); seed++ {
		synctest.Test(t, func(t *testing.T) {
			defer func() {
				if t.Failed() {
					t.Logf("repeat with -run '^%s$' -solver.seed=%d", t.Name(), seed)
				}
			}()
			fn(t, rand.New(rand.NewPCG(seed, 1)))
		})
		n++
		if *seedFlag != 0 || time.Now().After(deadline) {
			break
		}
	}
	t.Logf("%d graphs", n)
}

// graph makes random graphs whose steps repeat between versions, so that one
// build finds in the cache what another made.
type graph struct {
	r       *rand.Rand
	w       *world
	shape   uint64 // the same for all versions
	version int
	ignore  bool // some steps ignore the cache
	fail    bool // some steps fail
}

// vertices returns the edges that a version of the graph is asked for.
func (g graph) edges() []Edge {
	shape := rand.New(rand.NewPCG(g.shape, 2)) // what all versions have in common
	n := 2 + shape.IntN(12)
	var made []*Vertex
	ignore := map[string]bool{}
	for i := range n {
		name, outputs := fmt.Sprintf("s%d", shape.IntN(n)), 1+shape.IntN(2)
		inputs := 0
		if i > 0 {
			inputs = min(shape.IntN(4), 3)
		}
		kind := fmt.Sprintf("%s.%d.", name, outputs)
		var ins []in
		for range inputs {
			from := made[shape.IntN(len(made))]
			input := in{v: from, index: shape.IntN(from.Op.(*step).outputs), content: shape.IntN(2) == 0}
			switch shape.IntN(4) {
			case 0:
				input.selector = "a"
			case 1:
				input.selector = "b"
			}
			kind += fmt.Sprint(input.content)[:1]
			ins = append(ins, input)
		}
		change := shape.IntN(3) == 0
		if change && g.r.IntN(2) == 0 { // a step that differs between versions
			kind += fmt.Sprintf("v%d", g.version)
		}
		if g.fail && g.r.IntN(12) == 0 {
			kind = "fail" + kind
		}
		v := g.w.vertex(kind, outputs, ins...)
		if s := v.Op.(*step); inputs == 0 && len(name)%2 == 0 && name[1]%2 == 0 {
			s.ids = []string{kind + "tag", kind}
			v.Digest += "t"
		}
		if _, ok := ignore[kind]; !ok { // by kind: which of two equals comes first must not matter
			ignore[kind] = g.ignore && g.r.IntN(6) == 0
		}
		v.IgnoreCache = ignore[kind]
		made = append(made, v)
	}
	var out []Edge
	for range 1 + g.r.IntN(2) {
		v := made[len(made)-1-g.r.IntN(min(len(made), 2))]
		out = append(out, Edge{v, g.r.IntN(v.Op.(*step).outputs)})
	}
	return out
}

// build solves edges as one build and compares what they are worth.
func (w *world) build(t *testing.T, s *Solver, edges []Edge, want []value, wantErr error) {
	b := s.NewBuild(BuildOptions{})
	defer b.Close()
	var wg sync.WaitGroup
	for i, e := range edges {
		wg.Go(func() {
			r, err := b.Solve(context.Background(), e)
			if !errors.Is(err, wantErr) || (err == nil) != (wantErr == nil) {
				t.Errorf("solve %s: error %v, want %v", e.Vertex.Name, err, wantErr)
			}
			if err != nil {
				return
			}
			defer r.Release()
			if want != nil {
				w.compare(t, e, r, want[i])
			}
		})
	}
	wg.Wait()
}

func (w *world) compare(t *testing.T, e Edge, r Result, want value) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if got := w.values[r.ID()]; got != want {
		t.Errorf("%s/%d is %v, want %v", e.Vertex.Name, e.Index, got, want)
	}
}

// compareExecuted checks that what was executed is what the oracle executed.
// Less often is fine: steps that run side by side share even outputs that
// nobody had asked for yet, and that are therefore not saved.
func (w *world) compareExecuted(t *testing.T, o *oracle) {
	t.Helper()
	got := w.executions()
	if !sameExecutions(got, o.executed) {
		t.Errorf("executed:\n%s\n\nwant:\n%s", describe(got), describe(o.executed))
	}
}

func sameExecutions(got, want map[string]int) bool {
	return maps.EqualFunc(got, want, func(got, want int) bool { return got == want })
}

// One build after another gives the same results as the oracle, and executes
// exactly what it does. compat: LLB-013, LLB-170, LLB-171, LLB-172
func TestRandomBuilds(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w, o := newWorld(), newOracle()
		s := New(Options{Keys: NewMemoryKeys(), Results: w})
		shape := r.Uint64()
		for version := range 4 {
			edges := graph{r: r, w: w, shape: shape, version: version, ignore: r.IntN(3) == 0}.edges()
			// Edges of one request are solved side by side; the oracle takes one
			// after the other, so that only one says exactly what runs.
			want, err := o.solve(edges...)
			w.build(t, s, edges, want, err)
		}
		w.compareExecuted(t, o)
		s.Close()
		w.check(t)
	})
}

// Builds that run side by side get the results that they get alone, and what is
// executed is what some order of them, one after the other, executes.
// compat: LLB-174, CTL-045, X-2
func TestRandomConcurrentBuilds(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: NewMemoryKeys(), Results: w})
		shape := r.Uint64()
		builds := make([][]Edge, 3)
		for version := range builds {
			builds[version] = graph{r: r, w: w, shape: shape, version: version}.edges()
		}
		seeded := r.IntN(2) // the first build may be over before the others start
		var wg sync.WaitGroup
		for i, edges := range builds {
			run := func() {
				want, err := newOracle().solve(edges...)
				w.build(t, s, edges, want, err)
			}
			if i < seeded {
				run()
			} else {
				wg.Go(run)
			}
		}
		wg.Wait()
		s.Close()
		w.check(t)
		w.compareAnyOrder(t, builds)
	})
}

func (w *world) compareAnyOrder(t *testing.T, builds [][]Edge) {
	t.Helper()
	got := w.executions()
	var closest *oracle
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		o := newOracle()
		for _, i := range order {
			if _, err := o.solve(builds[i]...); err != nil {
				t.Fatal(err)
			}
		}
		if sameExecutions(got, o.executed) {
			return
		}
		closest = o
	}
	t.Errorf("executed:\n%s\n\nwant, in some order:\n%s", describe(got), describe(closest.executed))
}

// With failing steps, lost records and callers who go, whoever stays gets what
// the oracle says, nothing hangs and nothing leaks.
// compat: CTL-044, CTL-096, LLB-173, X-3
func TestRandomTrouble(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: NewMemoryKeys(), Results: w})
		shape := r.Uint64()
		faults := r.IntN(4)
		dice := rand.New(rand.NewPCG(r.Uint64(), 3)) // guarded by w.mu
		w.fault = func(string) bool {
			lose := faults > 0 && dice.IntN(8) == 0
			if lose {
				faults-- // fewer than would fail a step
			}
			return lose
		}
		var wg sync.WaitGroup
		for version := range 3 {
			edges := graph{r: r, w: w, shape: shape, version: version, fail: r.IntN(2) == 0, ignore: r.IntN(2) == 0}.edges()
			leave, patience := r.IntN(3) == 0, r.IntN(200)
			run := func() {
				if leave {
					w.abandon(t, s, edges, patience)
					return
				}
				w.buildEach(t, s, edges)
			}
			if r.IntN(2) == 0 {
				wg.Go(run)
			} else {
				run()
			}
		}
		wg.Wait()
		s.Close()
		w.check(t)
	})
}

// buildEach is build, where each edge may have an outcome of its own.
func (w *world) buildEach(t *testing.T, s *Solver, edges []Edge) {
	b := s.NewBuild(BuildOptions{})
	defer b.Close()
	var wg sync.WaitGroup
	for _, e := range edges {
		wg.Go(func() {
			want, wantErr := newOracle().solve(e)
			r, err := b.Solve(context.Background(), e)
			if err == nil {
				// With the cache, a step that fails may not be needed.
				defer r.Release()
				if wantErr == nil {
					w.compare(t, e, r, want[0])
				}
				return
			}
			if wantErr == nil {
				t.Errorf("solve %s: %v", e.Vertex.Name, err)
			}
			if !errors.Is(err, errStep) {
				t.Errorf("solve %s: error %v, want %v", e.Vertex.Name, err, errStep)
			}
		})
	}
	wg.Wait()
}

// abandon gives up at some point: one request, or the whole build.
func (w *world) abandon(t *testing.T, s *Solver, edges []Edge, patience int) {
	b := s.NewBuild(BuildOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, e := range edges {
		wg.Go(func() {
			r, err := b.Solve(ctx, e)
			if err == nil {
				r.Release()
			} else if !errors.Is(err, errStep) && !errors.Is(err, context.Canceled) && !errors.Is(err, errClosed) {
				t.Errorf("solve %s: %v", e.Vertex.Name, err)
			}
		})
	}
	for range patience {
		runtime.Gosched()
	}
	if patience%2 == 0 {
		cancel()
		w.buildAgain(t, b, edges)
	}
	b.Close()
	wg.Wait()
	cancel()
}

// buildAgain asks, in the build that was given up, for the same.
func (w *world) buildAgain(t *testing.T, b *Build, edges []Edge) {
	for _, e := range edges {
		want, wantErr := newOracle().solve(e)
		r, err := b.Solve(context.Background(), e)
		if err != nil {
			if wantErr == nil || !errors.Is(err, errStep) {
				t.Errorf("solve %s again: %v", e.Vertex.Name, err)
			}
			continue
		}
		if wantErr == nil {
			w.compare(t, e, r, want[0])
		}
		r.Release()
	}
}
