package solver_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/kilnbuild/kiln/solver/trace"
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
	before := heap()
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
	if grown := heap() - before; grown > 4<<20 {
		t.Errorf("%d bytes are still held after %d graphs", grown, n)
	}
}

// heap is how many bytes are in use.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// traceTo shows what a build does, when one seed is looked at.
func traceTo(t *testing.T) func(Event, []Effect) {
	if *seedFlag == 0 || !testing.Verbose() {
		return nil
	}
	return func(ev Event, effects []Effect) {
		for _, line := range trace.Lines(ev, effects) {
			t.Log(hexKey.ReplaceAllStringFunc(line, func(k string) string { return k[:6] }))
		}
	}
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
		if inputs == 0 && strings.HasSuffix(name, "3") {
			kind = "client" + kind
		}
		if g.fail && g.r.IntN(12) == 0 {
			kind = "fail" + kind
		}
		v := g.w.vertex(kind, outputs, ins...)
		if s := v.Op.(*step); inputs == 0 && len(name)%2 == 0 && name[1]%2 == 0 && !s.transient {
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
	b := s.NewBuild(BuildOptions{Trace: traceTo(t)})
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

// request is an edge that a build is asked for.
type request struct {
	build int
	edge  Edge
}

func requests(build int, edges []Edge) (out []request) {
	for _, e := range edges {
		out = append(out, request{build, e})
	}
	return out
}

// compareExecuted checks that what was executed is what the oracle executes for
// some order of the requests of each stage, one stage after the other. What
// ignores the cache is shared by those who run side by side, and so executed at
// most as often.
func (w *world) compareExecuted(t *testing.T, stages [][]request) {
	t.Helper()
	got := w.executions()
	same := func(want map[string]int) bool { return maps.Equal(got, want) }
	if slices.ContainsFunc(slices.Concat(stages...), func(r request) bool { return ignoresCache(r.edge) }) {
		builds := map[int]bool{}
		for _, r := range slices.Concat(stages...) {
			builds[r.build] = true
		}
		same = func(want map[string]int) bool { return executedOnceEach(got, want, len(builds)) }
	}
	var last map[string]int
	for order := range orders(stages) {
		if last = sequential(t, order); same(last) {
			return
		}
	}
	t.Errorf("executed:\n%s\n\nwant, in some order:\n%s", describe(got), describe(last))
}

// executedOnceEach reports whether got is the steps of want, each at most once
// for every build.
func executedOnceEach(got, want map[string]int, builds int) bool {
	for id := range want {
		if got[id] == 0 || got[id] > builds {
			return false
		}
	}
	return len(got) == len(want)
}

// ignoresCache reports whether something below e runs in every build.
func ignoresCache(e Edge) bool {
	return e.Vertex.IgnoreCache || e.Vertex.Op.(*step).transient || slices.ContainsFunc(e.Vertex.Inputs, ignoresCache)
}

// sequential is what the oracle executes for requests in the given order.
func sequential(t *testing.T, order []request) map[string]int {
	t.Helper()
	o := newOracle()
	builds := map[int]*plainBuild{}
	for _, r := range order {
		if builds[r.build] == nil {
			builds[r.build] = o.newBuild()
		}
		if _, err := builds[r.build].solve(r.edge); err != nil {
			t.Fatal(err)
		}
	}
	return o.executed
}

// orders yields every order of the requests of each stage, stage after stage.
func orders(stages [][]request) iter.Seq[[]request] {
	return func(yield func([]request) bool) {
		var order []request
		left := make([][]request, len(stages))
		for i, stage := range stages {
			left[i] = slices.Clone(stage)
		}
		var next func(stage int) bool
		next = func(stage int) bool {
			if stage == len(left) {
				return yield(order)
			}
			if len(left[stage]) == 0 {
				return next(stage + 1)
			}
			for i, r := range left[stage] {
				rest := left[stage]
				left[stage] = slices.Delete(slices.Clone(rest), i, i+1)
				order = append(order, r)
				more := next(stage)
				order = order[:len(order)-1]
				left[stage] = rest
				if !more {
					return false
				}
			}
			return true
		}
		next(0)
	}
}

// One build after another gives the same results as the oracle, and executes
// exactly what it does. compat: LLB-013, LLB-170, LLB-171, LLB-172
func TestRandomBuilds(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
		shape := r.Uint64()
		var stages [][]request
		for version := range 4 {
			edges := graph{r: r, w: w, shape: shape, version: version, ignore: r.IntN(3) == 0}.edges()
			want, err := newOracle().solve(edges...)
			w.build(t, s, edges, want, err)
			stages = append(stages, requests(version, edges))
		}
		s.Close()
		w.check(t)
		w.compareExecuted(t, stages)
	})
}

// Builds that run side by side get the results that they get alone, and what is
// executed is what some order of them, one after the other, executes. Steps
// that ignore the cache beside twins that don't are no exception.
// compat: LLB-007, LLB-174, CTL-045, X-2
func TestRandomConcurrentBuilds(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
		shape := r.Uint64()
		first := r.IntN(2) // the first build may be over before the others start
		var stages [][]request
		var beside []request
		var wg sync.WaitGroup
		for build := range 3 {
			edges := graph{r: r, w: w, shape: shape, version: build, ignore: r.IntN(4) == 0}.edges()
			run := func() {
				want, err := newOracle().solve(edges...)
				w.build(t, s, edges, want, err)
			}
			if build < first {
				run()
				stages = append(stages, requests(build, edges))
				continue
			}
			beside = append(beside, requests(build, edges)...)
			wg.Go(run)
		}
		wg.Wait()
		s.Close()
		w.check(t)
		w.compareExecuted(t, append(stages, beside))
	})
}

// With failing steps, lost records and callers who go, whoever stays gets what
// the oracle says, nothing hangs and nothing leaks. A step runs again only for a
// record that was lost, for a build that ignores the cache, or because it was
// cancelled too late to stop.
// compat: CTL-044, CTL-096, LLB-173, X-3
func TestRandomTrouble(t *testing.T) {
	forSeeds(t, func(t *testing.T, r *rand.Rand) {
		w := newWorld()
		s := New(Options{Keys: keygraph.NewMemory(), Results: w})
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
		allowed, ignoring := 1, false
		for version := range 3 {
			edges := graph{r: r, w: w, shape: shape, version: version, fail: r.IntN(2) == 0, ignore: r.IntN(2) == 0}.edges()
			ignoring = ignoring || slices.ContainsFunc(edges, ignoresCache)
			leave, patience := r.IntN(3) == 0, r.IntN(200)
			if leave {
				allowed++
			}
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
		allowed += len(w.lost)
		if ignoring {
			allowed += 2 // the other builds
		}
		for v, n := range w.runs {
			if n > allowed {
				t.Errorf("%s was executed %d times, at most %d are explained", v, n, allowed)
			}
		}
	})
}

// buildEach is build, where each edge may have an outcome of its own.
func (w *world) buildEach(t *testing.T, s *Solver, edges []Edge) {
	rec := &recorded{also: traceTo(t)}
	b := s.NewBuild(BuildOptions{Trace: rec.trace})
	defer rec.replay(t)
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
	b := s.NewBuild(BuildOptions{Trace: traceTo(t)})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, e := range edges {
		wg.Go(func() {
			r, err := b.Solve(ctx, e)
			if err == nil {
				r.Release()
			} else if !errors.Is(err, errStep) && !errors.Is(err, context.Canceled) && !errors.Is(err, ErrClosed) {
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
