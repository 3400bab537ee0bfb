package worker

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
)

// BenchmarkBuildWhileCollecting measures builds of one step: alone, while many
// records are being removed, and while the files of those are deleted. Nobody
// should wait for the collector. It says most where a commit waits for a disk:
// with TMPDIR on ext4, not on a tmpfs. How many records go while a build is under
// way says whether it waits for them, whatever else the machine does.
func BenchmarkBuildWhileCollecting(b *testing.B) {
	needRoot(b)
	for _, n := range []int{10000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { buildWhileCollecting(b, n) })
	}
}

func buildWhileCollecting(b *testing.B, n int) {
	var alone, removing, deleting []time.Duration
	var meanwhile []int64
	for b.Loop() {
		w := quiet(b, b.TempDir())
		fill(b, w, n)
		took, _ := builds(b, w, 1000, nil, nil)
		alone = append(alone, took...)

		var work sync.WaitGroup
		var removed atomic.Int64
		done := make(chan struct{})
		work.Go(func() {
			defer close(done)
			must(b, w.Cache().Prune(b.Context(), cache.PruneOptions{All: true}, func(cache.Usage) error { removed.Add(1); return nil }))
		})
		took, records := builds(b, w, n, done, &removed)
		removing, meanwhile = append(removing, took...), append(meanwhile, records...)
		work.Wait()
		took, _ = builds(b, w, 1000, nil, nil)
		deleting = append(deleting, took...)
		must(b, w.Close())
	}
	reportTimes(b, "alone", alone)
	reportTimes(b, "removing", removing)
	reportTimes(b, "deleting", deleting)
	slices.Sort(meanwhile)
	b.ReportMetric(float64(meanwhile[len(meanwhile)/2]), "removing-p50-records")
	b.ReportMetric(float64(meanwhile[len(meanwhile)*99/100]), "removing-p99-records")
}

// builds returns how long each of n builds takes, or of fewer until done is
// closed, and by how much counter, unless nil, grew meanwhile. Each is of a new step.
func builds(b *testing.B, w *Worker, n int, done <-chan struct{}, counter *atomic.Int64) (took []time.Duration, counted []int64) {
	b.Helper()
	for range n {
		select {
		case <-done:
			return took, counted
		default:
		}
		start, before := time.Now(), int64(0)
		if counter != nil {
			before = counter.Load()
		}
		must(b, mkfileOf(b, w, []byte(start.Format(time.RFC3339Nano))))
		took = append(took, time.Since(start))
		if counter != nil {
			counted = append(counted, counter.Load()-before)
		}
	}
	return took, counted
}

func reportTimes(b *testing.B, when string, took []time.Duration) {
	b.Helper()
	if len(took) == 0 {
		b.Fatalf("no build was measured %s", when)
	}
	slices.Sort(took)
	for name, share := range map[string]float64{"p50": 0.5, "p99": 0.99, "longest": 1} {
		at := took[min(len(took)-1, int(share*float64(len(took))))]
		b.ReportMetric(float64(at.Microseconds()), when+"-"+name+"-µs")
	}
	b.ReportMetric(float64(len(took)), when+"-builds")
}
