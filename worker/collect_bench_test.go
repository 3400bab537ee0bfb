package worker

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
)

// BenchmarkBuildWhileCollecting measures builds of one step alone, and while
// 20,000 records are being removed: nobody waits for the collector.
func BenchmarkBuildWhileCollecting(b *testing.B) {
	needRoot(b)
	const records, builds = 20000, 200
	for _, collecting := range []bool{false, true} {
		b.Run(fmt.Sprintf("collecting=%t", collecting), func(b *testing.B) {
			var took []time.Duration
			for b.Loop() {
				w := quiet(b, b.TempDir())
				fill(b, w, records)
				var work sync.WaitGroup
				done := make(chan struct{})
				if collecting {
					work.Go(func() {
						defer close(done)
						must(b, w.Cache().Prune(b.Context(), cache.PruneOptions{All: true}, nil))
					})
				}
				for n := range builds {
					start := time.Now()
					must(b, mkfile(b, w, 1000+n, 'a'))
					select {
					case <-done:
					default:
						took = append(took, time.Since(start))
					}
				}
				work.Wait()
				must(b, w.Close())
			}
			slices.Sort(took)
			for name, q := range map[string]float64{"median": 0.5, "99%": 0.99, "longest": 1} {
				b.ReportMetric(float64(took[min(len(took)-1, int(q*float64(len(took))))].Microseconds()), name+"-µs")
			}
			b.ReportMetric(float64(len(took)), "builds")
		})
	}
}
