package explain

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// loaded is the vertex of s.
func loaded(t testing.TB, s llb.State) *solver.Vertex {
	t.Helper()
	def, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	l, err := ops.NewLoader(ops.Config{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	if err != nil {
		t.Fatal(err)
	}
	edge, err := l.Load(def, ops.LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return edge.Vertex
}

// dockerfile is a chain of n RUN steps as a Dockerfile makes them.
func dockerfile(t testing.TB, n int) (steps []*solver.Vertex) {
	t.Helper()
	st := llb.Scratch().AddEnv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").AddEnv("GOFLAGS", "-mod=vendor").Dir("/src")
	for i := range n {
		st = st.Run(llb.Args([]string{"/bin/sh", "-c", fmt.Sprintf("make -C component/%d install", i)}),
			llb.WithCustomName(fmt.Sprintf("[build %d/%d] RUN make -C component/%d install", i+1, n, i))).Root()
	}
	for v := loaded(t, st); v != nil; {
		steps = append(steps, v)
		if len(v.Inputs) == 0 {
			break
		}
		v = v.Inputs[0].Vertex
	}
	slices.Reverse(steps)
	if len(steps) != n {
		t.Fatalf("%d steps, want %d", len(steps), n)
	}
	return steps
}

// BenchmarkCachedBuild is what recording a build of 20 steps takes that is
// answered from the cache: the last step is found, the others aren't needed.
func BenchmarkCachedBuild(b *testing.B) {
	j, steps := newJournal(b), dockerfile(b, 20)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		s := j.scriptOf(b, fmt.Sprint("build", n), steps)
		s.r.Loading(&solver.Load{Edge: solver.Edge{Vertex: steps[len(steps)-1]}, Record: solver.Record{Result: "r"}})
		now := time.Now()
		s.r.opts.Shown = func(*solver.Vertex) progress.Vertex {
			return progress.Vertex{Started: &now, Completed: &now, Cached: true}
		}
		s.r.Close(false)
		j.settle()
	}
}

// A step takes at most 1 KB: in memory while its build runs and after it, and on
// disk.
func TestBytesPerStep(t *testing.T) {
	const steps, limit = 4000, 1024
	const fixed = 256 << 10 // whatever the number of steps: buffers of encoders and of the store
	j := newJournal(t)
	j.byKey(nil) // reads what is stored
	within := func(when string, bytes int64) {
		t.Helper()
		if bytes = (bytes - fixed) / steps; bytes > limit {
			t.Errorf("%d bytes a step %s, the most is %d", bytes, when, limit)
		} else {
			t.Logf("%d bytes a step %s", bytes, when)
		}
	}
	vertices := dockerfile(t, steps)
	before := held()
	s := j.scriptOf(t, "build", vertices)
	for i := range vertices {
		s.run(i, fmt.Sprint("op", i), fmt.Sprint("output", i-1), fmt.Sprint("output", i), nil)
	}
	within("while the build runs", held()-before)
	s.r.Close(false)
	j.settle()
	s = nil
	if err := j.cfg.Store.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	within("after it", held()-before)
	stored := 0
	for _, bucket := range []string{stepsBucket, buildsBucket} {
		j.cfg.Store.Scan(bucket, "", func(id string, value []byte) bool { stored += len(id) + len(value); return true })
	}
	within("on disk", int64(stored)+fixed)
	runtime.KeepAlive(vertices)
}

// held is how many bytes are reachable.
func held() int64 {
	runtime.GC()
	runtime.GC() // pools are kept for one more
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkSameText is what a step costs in a build of which all steps say the
// same, and none is what it was in the build before.
func BenchmarkSameText(b *testing.B) {
	for _, n := range []int{250, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			steps := make([]string, n)
			for i := range steps {
				steps[i] = "RUN make"
			}
			for b.Loop() {
				b.StopTimer()
				j := newJournal(b)
				j.sayTheSame(b, "before", steps)
				b.StartTimer()
				j.sayTheSame(b, "after", steps)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/step")
		})
	}
}

// sayTheSame runs a build whose steps have the given names.
func (j *Journal) sayTheSame(t testing.TB, ref string, names []string) {
	vertices := make([]*solver.Vertex, len(names))
	for i, name := range names {
		vertices[i] = &solver.Vertex{Name: name, Digest: digest.FromString(fmt.Sprint(ref, i))}
		if i > 0 {
			vertices[i].Inputs = []solver.Edge{{Vertex: vertices[i-1]}}
		}
	}
	s := j.scriptOf(t, ref, vertices)
	for i := range vertices {
		s.run(i, fmt.Sprint(ref, i), fmt.Sprint(ref, i-1), fmt.Sprint(ref, i), nil)
	}
	s.r.Close(false)
	j.settle()
}

// A step of thousands of actions takes no more than others, and what changed in
// one of them is a change.
func TestManyFacets(t *testing.T) {
	vertex := func(last string) *solver.Vertex {
		st := llb.Scratch()
		action := llb.Mkfile("/first", 0o644, nil)
		for i := range 2000 {
			action = action.Mkfile(fmt.Sprint("/", i), 0o644, nil)
		}
		return loaded(t, st.File(action.Mkfile("/last", 0o644, []byte(last))))
	}
	a, b := facetsOf(vertex("a"), nil).values(), facetsOf(vertex("b"), nil).values()
	if len(a) == 0 || len(a) > maxFacets {
		t.Errorf("%d facets, the most is %d", len(a), maxFacets)
	}
	if slices.Equal(a, b) || !slices.Equal(a, facetsOf(vertex("a"), nil).values()) {
		t.Errorf("facets don't tell what is the same: %v, %v", a, b)
	}
}

// BenchmarkGraph is what a step costs of a graph of a thousand that each make a
// file, and one that takes them all: where all changed, and where nothing did.
func BenchmarkGraph(b *testing.B) {
	const n, variants = 1000, 6
	var graphs [variants][]*solver.Execute
	for i := range graphs {
		graphs[i] = graphOf(b, n, i)
	}
	for _, ran := range []bool{true, false} {
		b.Run(fmt.Sprintf("ran=%v", ran), func(b *testing.B) {
			j := newJournal(b)
			build := func(i int) {
				now := time.Now()
				r := j.NewRecorder(Options{
					Ref: fmt.Sprint("build ", i), Key: func() (string, bool) { return "project", true },
					Shown: func(*solver.Vertex) progress.Vertex { return progress.Vertex{Started: &now, Completed: &now} },
				})
				graph := graphs[i%variants]
				for _, x := range graph {
					r.Announced(&solver.Announce{Vertex: x.Vertex, Inputs: x.Vertex.Inputs})
				}
				for _, x := range graph {
					if ran {
						r.Starts(x, progress.Scope{})
						r.Ended(x, &solver.Executed{Execute: x, Outputs: []solver.Output{{Result: result(fmt.Sprint("result of ", x.Vertex.Digest[7:31]))}}})
					}
				}
				r.Close(false)
				j.settle()
			}
			for i := range variants {
				build(i)
			}
			i, before := 0, processorTime(b)
			b.ReportAllocs()
			for b.Loop() {
				if i++; !ran {
					i = 0
				}
				build(i)
			}
			b.ReportMetric(float64((processorTime(b)-before).Nanoseconds())/float64(b.N*n), "cpu-ns/vertex")
		})
	}
}

// graphOf are the executions of a variant of a graph of n+1 steps.
func graphOf(b *testing.B, n, variant int) (out []*solver.Execute) {
	var all *llb.FileAction
	for i := range n {
		one := llb.Scratch().File(llb.Mkfile("/f", 0o644, fmt.Appendf(nil, "%d of %d", i, variant)))
		if to := fmt.Sprint("/", i); all == nil {
			all = llb.Copy(one, "/f", to)
		} else {
			all = all.Copy(one, "/f", to)
		}
	}
	root := loaded(b, llb.Scratch().File(all))
	s := &script{t: b}
	for _, in := range root.Inputs {
		s.steps = append(s.steps, in.Vertex)
	}
	s.steps = append(s.steps, root)
	for i, v := range s.steps {
		out = append(out, s.execute(i, string(v.Digest), string(v.Digest), string(v.Digest)))
	}
	return out
}
