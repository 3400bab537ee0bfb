//go:build linux

package network

import (
	"slices"
	"sync"
	"testing"
	"time"
)

// BenchmarkMake makes and removes namespaces.
func BenchmarkMake(b *testing.B) {
	zero := 0
	for _, mode := range []Mode{None, Bridge} {
		b.Run(string(mode), func(b *testing.B) {
			n := open(b, b.TempDir(), Config{Mode: mode, PoolSize: &zero})
			make := map[Mode]func() (*Namespace, error){
				None:   func() (*Namespace, error) { return create(func(*Namespace) error { return nil }) },
				Bridge: func() (*Namespace, error) { return n.Default.(*bridge).connect(b.Context()) },
			}[mode]
			var removing time.Duration
			for b.Loop() {
				ns, err := make()
				must(b, err)
				start := time.Now()
				must(b, ns.remove())
				removing += time.Since(start)
			}
			b.ReportMetric(float64(removing.Nanoseconds())/float64(b.N), "ns-removing/op")
		})
	}
}

// BenchmarkTake takes namespaces and gives them back, to be used again or not.
func BenchmarkTake(b *testing.B) {
	for _, mode := range []Mode{None, Bridge} {
		for name, done := range map[string]func(*Namespace){"release": (*Namespace).Release, "discard": (*Namespace).Discard} {
			b.Run(string(mode)+"/"+name, func(b *testing.B) {
				n := open(b, b.TempDir(), Config{Mode: mode})
				for b.Loop() {
					done(take(b, n.Default))
				}
			})
		}
	}
}

// BenchmarkTakeAtOnce has as many steps as a wide build begins together take a
// namespace each, and then give it back. Few are made ahead: it shows how long the
// others wait for theirs. Having only so many made at once as there are processors,
// while the others wait for one to be given back, was three times slower on the
// bridge: the kernel's own waiting is shared by all that are made together.
func BenchmarkTakeAtOnce(b *testing.B) {
	const steps = 50
	for _, mode := range []Mode{None, Bridge} {
		b.Run(string(mode), func(b *testing.B) {
			n := open(b, b.TempDir(), Config{Mode: mode})
			var all, longest []float64 // ms
			for b.Loop() {
				waits := make([]float64, steps)
				var taking sync.WaitGroup
				taken := make([]*Namespace, steps)
				for i := range steps {
					taking.Go(func() {
						start := time.Now()
						ns, err := n.Default.Take(b.Context(), "")
						if err != nil {
							b.Error(err)
							return
						}
						taken[i], waits[i] = ns, float64(time.Since(start).Microseconds())/1000
					})
				}
				taking.Wait()
				for _, ns := range taken {
					if ns != nil {
						ns.Release()
					}
				}
				all, longest = append(all, waits...), append(longest, slices.Max(waits))
			}
			slices.Sort(all)
			slices.Sort(longest)
			b.ReportMetric(all[len(all)/2], "median-ms")
			b.ReportMetric(longest[len(longest)/2], "longest-ms")
		})
	}
}
