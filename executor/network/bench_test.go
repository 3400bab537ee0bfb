//go:build linux

package network

import (
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
