package solver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/opencontainers/go-digest"
)

// shapes are graphs of n vertices, the last of which is asked for.
var shapes = map[string]func(n int, vertex func(i int, inputs ...*Vertex) *Vertex) *Vertex{
	"chain": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex {
		v := vertex(0)
		for i := 1; i < n; i++ {
			v = vertex(i, v)
		}
		return v
	},
	"wide": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex {
		base := vertex(0)
		var all []*Vertex
		for i := 1; i < n-1; i++ {
			all = append(all, vertex(i, base))
		}
		return vertex(n-1, all...)
	},
	"diamond": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex {
		v := vertex(0)
		for i := 1; i+2 < n; i += 3 {
			v = vertex(i+2, vertex(i, v), vertex(i+1, v))
		}
		return v
	},
	"random": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex { return random(n, n, vertex) },
	// Near is random with inputs that were made not long before: what it costs
	// less, the memory costs, and not the work.
	"near": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex { return random(n, 100, vertex) },
}

// random makes a graph whose vertices have inputs among the last of those before.
func random(n, last int, vertex func(int, ...*Vertex) *Vertex) *Vertex {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	made := []*Vertex{vertex(0)}
	for i := 1; i < n; i++ {
		inputs := []*Vertex{made[i-1]}
		for range r.IntN(3) {
			inputs = append(inputs, made[i-1-r.IntN(min(i, last))])
		}
		made = append(made, vertex(i, inputs...))
	}
	return made[n-1]
}

// nothingOp makes one result, which is nothing.
type nothingOp struct {
	digest digest.Digest
	deps   []Dep
}

func (o *nothingOp) CacheMap(context.Context, Asker, int) (*CacheMap, bool, error) {
	return &CacheMap{Digest: o.digest, Deps: o.deps}, false, nil
}

func (o *nothingOp) Exec(context.Context, Asker, []Result) ([]Result, error) {
	return []Result{plainResult(o.digest)}, nil
}

// loadAny is a ResultStore that has everything.
type loadAny struct{}

func (loadAny) Load(_ context.Context, id string) (Result, error) { return plainResult(id), nil }

func benchVertex(i int, inputs ...*Vertex) *Vertex {
	d := digest.FromString(fmt.Sprint(i))
	v := &Vertex{Digest: d, Name: "v", Op: &nothingOp{digest: d, deps: make([]Dep, len(inputs))}, Inputs: make([]Edge, len(inputs))}
	for i, in := range inputs {
		v.Inputs[i] = Edge{Vertex: in}
	}
	return v
}

// drive performs effects at once, without goroutines, until there are none
// left. It returns what happened and the answers.
func drive(c *Core, keys KeyStore, start ...Event) (events []Event, answers []Result) {
	events = start
	for i := 0; i < len(events); i++ {
		for _, eff := range c.Step(events[i]) {
			switch eff := eff.(type) {
			case *GetCacheMap:
				m, more, err := eff.Vertex.Op.CacheMap(context.Background(), nil, eff.Index)
				events = append(events, &GotCacheMap{GetCacheMap: eff, Map: m, More: more, Err: err})
			case *Query:
				found, err := keys.Lookup(eff.Lookup)
				if err != nil {
					panic(err) // memory doesn't fail
				}
				events = append(events, &Queried{Query: eff, Found: found})
			case *Load:
				events = append(events, &Loaded{Load: eff, Result: plainResult(eff.Record.Result)})
			case *Execute:
				out, err := eff.Vertex.Op.Exec(context.Background(), nil, eff.Inputs)
				s := eff.Save(0)
				s.Result = out[0]
				if err := keys.Save(s); err != nil {
					panic(err) // memory doesn't fail
				}
				events = append(events, &Executed{Execute: eff, Outputs: []Output{{Result: out[0], Keys: s.Keys}}, Err: err})
			case *Answer:
				answers = append(answers, eff.Result)
			}
		}
	}
	return events, answers
}

func ask(vertices ...*Vertex) (out []Event) {
	for i, v := range vertices {
		out = append(out, &Requested{Call: i + 1, Edge: Edge{Vertex: v}})
	}
	return out
}

// benchGraphs runs a benchmark for each shape and size of graph, whose vertices
// it gives with the last one last.
func benchGraphs(b *testing.B, run func(b *testing.B, vertices []*Vertex)) {
	for _, shape := range []string{"chain", "wide", "diamond", "near", "random"} {
		for _, n := range []int{1000, 10000, 100000} {
			b.Run(fmt.Sprintf("%s/%d", shape, n), func(b *testing.B) {
				var vertices []*Vertex
				shapes[shape](n, func(i int, inputs ...*Vertex) *Vertex {
					v := benchVertex(i, inputs...)
					vertices = append(vertices, v)
					return v
				})
				run(b, vertices)
			})
		}
	}
}

// again gives a new core the events of another, as outcomes of the new one's
// effects, which are the same.
func again(events []Event) *Core {
	c := NewCore()
	started := 1 // so many of events have a cause
	for _, ev := range events {
		for _, eff := range c.Step(ev) {
			if started < len(events) && bind(events[started], eff) {
				started++
			}
		}
		bind(ev, nil) // nobody holds it any more
	}
	return c
}

// bind makes ev the outcome of eff, if it is of a kind that has one.
func bind(ev Event, eff Effect) (ok bool) {
	switch ev := ev.(type) {
	case *GotCacheMap:
		ev.GetCacheMap, ok = eff.(*GetCacheMap)
	case *Queried:
		ev.Query, ok = eff.(*Query)
	case *Loaded:
		ev.Load, ok = eff.(*Load)
	case *Executed:
		ev.Execute, ok = eff.(*Execute)
	}
	return ok
}

// benchCore measures deciding alone: a core gets, again and again, the events
// of a build that found the results of the given share of the vertices, the
// first ones, in the store.
func benchCore(b *testing.B, cached float64) {
	benchGraphs(b, func(b *testing.B, vertices []*Vertex) {
		keys := keygraph.NewMemory()
		drive(NewCore(), keys, ask(vertices[:int(cached*float64(len(vertices)))]...)...)
		events, answers := drive(NewCore(), keys, ask(vertices[len(vertices)-1])...)
		if len(answers) != 1 || answers[0] == nil {
			b.Fatal("no answer")
		}
		again(events)
		before, start := memory(), processorTime(b)
		b.ResetTimer()
		var c *Core
		for range b.N {
			c = again(events)
		}
		b.StopTimer()
		spent := processorTime(b) - start
		after := memory()
		runtime.KeepAlive(events)
		per := float64(len(vertices))
		b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N)/per, "cpu-ns/vertex")
		b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(b.N)/per, "allocB/vertex")
		b.ReportMetric(float64(int64(after.HeapAlloc-before.HeapAlloc))/per, "heldB/vertex")
		runtime.KeepAlive(c)
	})
}

// processorTime is what this process has spent, collecting garbage too; unlike
// the clock, it doesn't depend on what else the machine does.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func memory() (m runtime.MemStats) {
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m
}

func BenchmarkCoreUncached(b *testing.B)   { benchCore(b, 0) }
func BenchmarkCoreHalfCached(b *testing.B) { benchCore(b, 0.5) }
func BenchmarkCoreCached(b *testing.B)     { benchCore(b, 1) }

func benchBuild(b *testing.B, s *Solver, root *Vertex) {
	build := s.NewBuild(BuildOptions{})
	defer build.Close()
	r, err := build.Solve(context.Background(), Edge{Vertex: root})
	if err != nil {
		b.Fatal(err)
	}
	r.Release()
}

// benchBuilds measures whole builds, with a key store in memory.
func benchBuilds(b *testing.B, cached float64) {
	benchGraphs(b, func(b *testing.B, vertices []*Vertex) {
		seen := vertices[:int(cached*float64(len(vertices)))]
		root := vertices[len(vertices)-1]
		for range b.N {
			b.StopTimer()
			keys := keygraph.NewMemory()
			drive(NewCore(), keys, ask(seen...)...)
			s := New(Options{Keys: keys, Results: loadAny{}})
			b.StartTimer()
			benchBuild(b, s, root)
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(vertices)), "ns/vertex")
	})
}

func BenchmarkBuildUncached(b *testing.B)   { benchBuilds(b, 0) }
func BenchmarkBuildHalfCached(b *testing.B) { benchBuilds(b, 0.5) }
func BenchmarkBuildCached(b *testing.B)     { benchBuilds(b, 1) }
