package footprint

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"
)

func TestPercentFor(t *testing.T) {
	const mb = 1 << 20
	for live, want := range map[uint64]int{0: 100, 4 * mb: 100, 24 * mb: 100, 30 * mb: 80, 48 * mb: 50, 1 << 40: 50} {
		if got := percentFor(live); got != want {
			t.Errorf("%d bytes: %d %%, want %d", live, got, want)
		}
	}
}

// The pace follows the heap as it grows and as it shrinks.
func TestPace(t *testing.T) {
	t.Setenv("GOGC", "")
	t.Cleanup(func() { debug.SetGCPercent(100) })
	Pace()
	held := make([]byte, 2*headroom)
	expectPercent(t, 50)
	runtime.KeepAlive(held)
	expectPercent(t, 100)
}

// A process that ends collects hardly anything, however often it has collected.
func TestEnding(t *testing.T) {
	t.Setenv("GOGC", "")
	t.Cleanup(func() {
		ending.Lock()
		defer ending.Unlock()
		ending.bool = false
		debug.SetGCPercent(100)
	})
	Pace()
	expectPercent(t, 100)
	Ending()
	for range 3 {
		runtime.GC()
		sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(sample)
		if got := sample[0].Value.Uint64(); got < 1000 {
			t.Errorf("the heap grows by %d %%, want room for %d MB", got, endingRoom>>20)
		}
	}
	const mb = 1 << 20
	for live, want := range map[uint64]int{0: 12800, 64 * mb: 200, 128 * mb: 100, 1 << 40: 50} {
		if got := percentEnding(live); got != want {
			t.Errorf("%d bytes: %d %%, want %d", live, got, want)
		}
	}
}

func expectPercent(t *testing.T, want uint64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		runtime.GC()
		sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(sample)
		got := sample[0].Value.Uint64()
		if got == want {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("after a minute of collections the heap still grows by %d %%, want %d", got, want)
		}
	}
}
