package solver

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

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
	"random": func(n int, vertex func(int, ...*Vertex) *Vertex) *Vertex {
		r := rand.New(rand.NewPCG(1, uint64(n)))
		made := []*Vertex{vertex(0)}
		for i := 1; i < n; i++ {
			inputs := []*Vertex{made[i-1]}
			for range r.IntN(3) {
				inputs = append(inputs, made[r.IntN(i)])
			}
			made = append(made, vertex(i, inputs...))
		}
		return made[n-1]
	},
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

// drive performs effects at once, without goroutines.
func drive(c *Core, keys KeyStore, ev Event) (answer Result) {
	events := []Event{ev}
	for len(events) > 0 {
		ev := events[0]
		events = events[1:]
		for _, eff := range c.Step(ev) {
			switch eff := eff.(type) {
			case *GetCacheMap:
				m, more, err := eff.Vertex.Op.CacheMap(context.Background(), nil, eff.Index)
				events = append(events, &GotCacheMap{Vertex: eff.Vertex, Map: m, More: more, Err: err})
			case *Query:
				found, err := keys.Lookup(eff.Lookup)
				events = append(events, &Queried{Edge: eff.Edge, Found: found, Err: err})
			case *Load:
				events = append(events, &Loaded{Edge: eff.Edge, Record: eff.Record, Result: plainResult(eff.Record.Result)})
			case *Execute:
				out, err := eff.Vertex.Op.Exec(context.Background(), nil, eff.Inputs)
				outputs, at := map[int]Result{0: out[0]}, map[int][]Key{}
				for _, s := range eff.saves(outputs) {
					s.Result, at[s.Output] = outputs[s.Output], s.Keys
					if err := keys.Save(s); err != nil {
						panic(err) // memory doesn't fail
					}
				}
				events = append(events, &Executed{Vertex: eff.Vertex, Outputs: outputs, Keys: at, Err: err})
			case *Answer:
				answer = eff.Result
			}
		}
	}
	return answer
}

// noKeys is a KeyStore that holds nothing.
type noKeys struct{}

func (noKeys) Lookup(l Lookup) (Found, error) {
	return Found{Matched: make([]bool, len(l.Inputs))}, nil
}
func (noKeys) Save(Save) error     { return nil }
func (noKeys) Drop([]string) error { return nil }

func benchSizes(b *testing.B, run func(b *testing.B, root *Vertex)) {
	for _, shape := range []string{"chain", "wide", "diamond", "random"} {
		for _, n := range []int{1000, 10000, 100000} {
			b.Run(fmt.Sprintf("%s/%d", shape, n), func(b *testing.B) {
				root := shapes[shape](n, benchVertex)
				var before, after runtime.MemStats
				runtime.GC()
				runtime.ReadMemStats(&before)
				b.ResetTimer()
				run(b, root)
				b.StopTimer()
				runtime.ReadMemStats(&after)
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/vertex")
				b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(b.N*n), "allocB/vertex")
			})
		}
	}
}

// The core alone: deciding, with a store that has nothing.
func BenchmarkCoreUncached(b *testing.B) {
	benchSizes(b, func(b *testing.B, root *Vertex) {
		for range b.N {
			if drive(NewCore(), noKeys{}, &Requested{Call: 1, Edge: Edge{Vertex: root}}) == nil {
				b.Fatal("no answer")
			}
		}
	})
}

func BenchmarkCoreCached(b *testing.B) {
	benchSizes(b, func(b *testing.B, root *Vertex) {
		keys := NewMemoryKeys()
		drive(NewCore(), keys, &Requested{Call: 1, Edge: Edge{Vertex: root}})
		b.ResetTimer()
		for range b.N {
			if drive(NewCore(), keys, &Requested{Call: 1, Edge: Edge{Vertex: root}}) == nil {
				b.Fatal("no answer")
			}
		}
	})
}

// What a core keeps for a vertex, once all of them have results.
func BenchmarkCoreMemory(b *testing.B) {
	root := shapes["random"](100000, benchVertex)
	for range b.N {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		c := NewCore()
		drive(c, noKeys{}, &Requested{Call: 1, Edge: Edge{Vertex: root}})
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/100000, "B/vertex")
		runtime.KeepAlive(c)
	}
}

func benchBuild(b *testing.B, s *Solver, root *Vertex) {
	build := s.NewBuild(BuildOptions{})
	defer build.Close()
	r, err := build.Solve(context.Background(), Edge{Vertex: root})
	if err != nil {
		b.Fatal(err)
	}
	r.Release()
}

func BenchmarkBuildUncached(b *testing.B) {
	benchSizes(b, func(b *testing.B, root *Vertex) {
		for range b.N {
			benchBuild(b, New(Options{Keys: NewMemoryKeys(), Results: loadAny{}}), root)
		}
	})
}

func BenchmarkBuildCached(b *testing.B) {
	benchSizes(b, func(b *testing.B, root *Vertex) {
		s := New(Options{Keys: NewMemoryKeys(), Results: loadAny{}})
		benchBuild(b, s, root)
		b.ResetTimer()
		for range b.N {
			benchBuild(b, s, root)
		}
	})
}
