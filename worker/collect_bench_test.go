package worker

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
)

// BenchmarkBuildWhileCollecting measures builds of one step: alone, while 20,000
// records are being removed, and while the files of those are deleted. Nobody
// should wait for the collector. It says most where a commit waits for a disk:
// with TMPDIR on ext4, not on a tmpfs.
func BenchmarkBuildWhileCollecting(b *testing.B) {
	needRoot(b)
	var alone, removing, deleting []time.Duration
	for b.Loop() {
		w := quiet(b, b.TempDir())
		fill(b, w, 20000)
		alone = append(alone, builds(b, w, 1000, nil)...)

		var work sync.WaitGroup
		done := make(chan struct{})
		work.Go(func() {
			defer close(done)
			must(b, w.Cache().Prune(b.Context(), cache.PruneOptions{All: true}, nil))
		})
		removing = append(removing, builds(b, w, 100000, done)...)
		work.Wait()
		deleting = append(deleting, builds(b, w, 1000, nil)...)
		must(b, w.Close())
	}
	reportTimes(b, "alone", alone)
	reportTimes(b, "removing", removing)
	reportTimes(b, "deleting", deleting)
}

// builds returns how long each of n builds takes, or of fewer until done is
// closed. Each is of a new step.
func builds(b *testing.B, w *Worker, n int, done <-chan struct{}) (took []time.Duration) {
	b.Helper()
	for range n {
		select {
		case <-done:
			return took
		default:
		}
		start := time.Now()
		must(b, mkfileOf(b, w, []byte(start.Format(time.RFC3339Nano))))
		took = append(took, time.Since(start))
	}
	return took
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
