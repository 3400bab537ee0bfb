package footprint

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// headroom is by how much the heap grows until the collector runs, if it is
// larger than that already: Go's rule, as much again as is in use, has the peak
// of a large build be mostly garbage. In a heap of twice the headroom and more it
// is half of what is in use, so that the collector doesn't run all the time.
const headroom = 32 << 20

// percentFor is how much the heap may grow when live bytes are in use.
func percentFor(live uint64) int {
	if live <= headroom {
		return 100
	}
	return int(max(50, 100*headroom/live))
}

// Pace has the collector keep to the headroom from now on. Who sets GOGC is
// obeyed instead.
func Pace() {
	if os.Getenv("GOGC") == "" {
		paceAfter(100)
	}
}

// paceAfter looks at the heap after the next collection, before which the
// percentage was old. The runtime calls what belongs to a thing that nobody holds
// when that has been collected.
func paceAfter(old int) {
	type sentinel struct{ _ *byte } // a pointer keeps it from sharing its place with others
	runtime.AddCleanup(new(sentinel), func(old int) {
		now := percentFor(liveBytes())
		if now != old { // it stops the world for a moment
			debug.SetGCPercent(now)
		}
		paceAfter(now)
	}, old)
}

// liveBytes is what the last collection found in use.
func liveBytes() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
