package control

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// BenchmarkExplained compares builds without and with explanations (ns/op): one
// of which a file changed, so that three steps run, and one that is answered
// from the cache. cpu-µs/op is what the
// process used, whatever else the machine did. B/step and B/build are what the
// store keeps.
func BenchmarkExplained(b *testing.B) {
	for _, changed := range []bool{true, false} {
		for _, explained := range []bool{false, true} {
			b.Run(fmt.Sprintf("changed=%v/explained=%v", changed, explained), func(b *testing.B) {
				d, reg := newDaemonWith(b, time.Hour, explained), newRegistry(b)
				reg.tag(b, "latest", "base")
				p := newProject(b, d, reg, "bench")
				for i := range 500 {
					p.write(fmt.Sprintf("src/many/%d", i), fmt.Sprint(i))
				}
				p.quiet = true
				p.build()
				n, before := 0, processorTime(b)
				for b.Loop() {
					if n++; changed {
						p.write("src/main.go", fmt.Sprint("version ", n))
					}
					p.build()
				}
				d.explain.Close()
				b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(n), "cpu-µs/op")
				if explained {
					b.ReportMetric(d.average("explain.steps"), "B/step")
					b.ReportMetric(d.average("explain.builds"), "B/build")
				}
			})
		}
	}
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

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var ru syscall.Rusage
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &ru))
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
