package control

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"
)

// BenchmarkExplained compares builds without and with explanations, of two
// daemons that build in turn: builds of which a file changed, so that three
// steps run, and builds that are answered from the cache. plain-µs/op is what
// the processors do for a build without, its steps included; explained-µs/op is
// how much more it is with, the writing of records after its end included, and
// explained-% the ratio. They are medians, of builds and of pairs of builds.
// B/step and B/build are what the store keeps.
func BenchmarkExplained(b *testing.B) {
	for _, changed := range []bool{true, false} {
		b.Run(fmt.Sprintf("changed=%v", changed), func(b *testing.B) {
			plain, explained := newBuilder(b, false), newBuilder(b, true)
			turns := [2]*builder{plain, explained}
			for n := 0; b.Loop(); n++ {
				for _, t := range turns {
					t.build(n, changed)
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
			b.ReportMetric(explained.p.d.average("explain.steps"), "B/step")
			b.ReportMetric(explained.p.d.average("explain.builds"), "B/build")
		})
	}
}

// builder builds a project of 500 files again and again.
type builder struct {
	p     *project
	spent []time.Duration // of the processors, for each build
}

func newBuilder(b *testing.B, explained bool) *builder {
	b.Helper()
	d, reg := newDaemonWith(b, time.Hour, explained), newRegistry(b)
	reg.tag(b, "latest", "base")
	p := newProject(b, d, reg, "bench")
	for i := range 500 {
		p.write(fmt.Sprintf("src/many/%d", i), fmt.Sprint(i))
	}
	p.quiet = true
	p.build()
	return &builder{p: p}
}

func (t *builder) build(n int, changed bool) {
	if changed {
		t.p.write("src/main.go", fmt.Sprint("version ", n))
	}
	before := processorTime(t.p.t)
	t.p.build()
	t.p.d.explain.Close()
	t.spent = append(t.spent, processorTime(t.p.t)-before)
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
