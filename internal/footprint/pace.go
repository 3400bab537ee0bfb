package footprint

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// headroom is by how much the heap grows until the collector runs, if it is
// larger than that already: Go's rule, as much again as is in use, has the peak
// of a large build be mostly garbage. In a heap of twice the headroom and more it
// is half of what is in use, so that the collector doesn't run all the time.
const headroom = 24 << 20

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

// endingRoom is headroom for a process that ends: more than its last commit takes.
const endingRoom = 128 << 20

// ending is held while the pace is set, and true once Ending has set it for good.
var ending struct {
	sync.Mutex
	bool
}

// Ending is Pace for a process that does nothing more but close what it has: garbage
// goes with it, and looking for that takes as long as the rest of the end.
func Ending() {
	if os.Getenv("GOGC") != "" {
		return
	}
	ending.Lock()
	defer ending.Unlock()
	ending.bool = true
	debug.SetGCPercent(percentEnding(liveBytes()))
}

// percentEnding is percentFor a process that ends.
func percentEnding(live uint64) int {
	return max(percentFor(live), int(100*endingRoom/max(live, 1<<20)))
}

// paceAfter looks at the heap after the next collection, before which the
// percentage was old. The runtime calls what belongs to a thing that nobody holds
// when that has been collected.
func paceAfter(old int) {
	type sentinel struct{ _ *byte } // a pointer keeps it from sharing its place with others
	runtime.AddCleanup(new(sentinel), func(old int) {
		ending.Lock()
		defer ending.Unlock()
		if ending.bool {
			return
		}
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
