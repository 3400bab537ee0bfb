package control

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
)

// BenchmarkExplained compares builds without and with explanations, of two
// daemons that build in turn: builds of a project of which a file changed, so
// that three steps run, and such that are answered from the cache; and of a
// graph of a thousand steps that each take next to nothing, of which all run, or
// none. plain-µs/op is what the processors do for a build without, its steps
// included; explained-µs/op is how much more it is with, the writing of records
// after its end included, and explained-% the ratio. They are medians, of builds
// and of pairs of builds. B/step and B/build are what the store keeps.
func BenchmarkExplained(b *testing.B) {
	for _, kind := range []string{"project", "graph"} {
		for _, changed := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/changed=%v", kind, changed), func(b *testing.B) {
				compareExplained(b, kind, changed)
			})
		}
	}
}

func compareExplained(b *testing.B, kind string, changed bool) {
	plain, explained := newBuilder(b, kind, false), newBuilder(b, kind, true)
	turns := [2]*builder{plain, explained}
	for n := 0; b.Loop(); n++ {
		for _, t := range turns {
			if changed {
				t.change(n)
			}
			t.measure()
		}
		slices.Reverse(turns[:])
	}
	more := make([]time.Duration, len(plain.spent))
	for i, spent := range explained.spent {
		more[i] = spent - plain.spent[i]
	}
	b.ReportMetric(median(plain.spent), "plain-µs/op")
	b.ReportMetric(median(more), "explained-µs/op")
	b.ReportMetric(100*median(more)/median(plain.spent), "explained-%")
	b.ReportMetric(explained.d.average("explain.steps"), "B/step")
	b.ReportMetric(explained.d.average("explain.builds"), "B/build")
}

// builder builds the same thing again and again.
type builder struct {
	d      *daemon
	change func(n int)
	build  func()
	spent  []time.Duration // of the processors, for each build
}

func newBuilder(b *testing.B, kind string, explained bool) *builder {
	b.Helper()
	t := &builder{d: newDaemonWith(b, time.Millisecond, explained)}
	if kind == "graph" {
		t.buildGraph()
	} else {
		t.buildProject()
	}
	t.build()
	return t
}

// buildProject has t build a project of 500 files.
func (t *builder) buildProject() {
	reg := newRegistry(t.d.t)
	reg.tag(t.d.t, "latest", "base")
	p := newProject(t.d.t, t.d, reg, "bench")
	for i := range 500 {
		p.write(fmt.Sprintf("src/many/%d", i), fmt.Sprint(i))
	}
	p.quiet = true
	t.change = func(n int) { p.write("src/main.go", fmt.Sprint("version ", n)) }
	t.build = func() { p.build() }
}

// buildGraph has t build a graph of a thousand files, each made by a step.
func (t *builder) buildGraph() {
	var def *pb.Definition
	t.change = func(n int) {
		var all *llb.FileAction
		for i := range 1000 {
			one := llb.Scratch().File(llb.Mkfile("/f", 0o644, fmt.Appendf(nil, "%d of %d", i, n)))
			if to := fmt.Sprint("/", i); all == nil {
				all = llb.Copy(one, "/f", to)
			} else {
				all = all.Copy(one, "/f", to)
			}
		}
		var err error
		def, err = llb.Scratch().File(all).Marshal()
		must(t.d.t, err)
	}
	t.change(-1)
	t.build = func() {
		req := &control.SolveRequest{Ref: fmt.Sprint("graph", time.Now().UnixNano()), Definition: def}
		_, err := t.d.control().Solve(t.d.t.Context(), req)
		must(t.d.t, err)
	}
}

func (t *builder) measure() {
	before := processorTime(t.d.t)
	t.build()
	t.d.explain.Forget("") // after what is to be kept is
	t.spent = append(t.spent, processorTime(t.d.t)-before)
}

// median is in microseconds.
func median(all []time.Duration) float64 {
	all = slices.Sorted(slices.Values(all))
	return float64(all[len(all)/2].Microseconds())
}

// average is how many bytes an entry of the bucket takes.
func (d *daemon) average(bucket string) float64 {
	bytes, n := 0, 0
	d.worker.Store().Scan(bucket, "", func(key string, value []byte) bool {
		bytes += len(key) + len(value)
		n++
		return true
	})
	return float64(bytes) / float64(n)
}

// processorTime is what this process and those that it has started have used.
func processorTime(t testing.TB) (spent time.Duration) {
	t.Helper()
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var ru syscall.Rusage
		must(t, syscall.Getrusage(who, &ru))
		spent += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	return spent
}
