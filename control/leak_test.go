package control

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	control "github.com/moby/buildkit/api/services/control"
)

// Builds that are answered from the cache leave nothing: neither goroutines nor
// memory, but for the few bytes by which the last builds are explained.
func TestCachedBuildsLeaveNothing(t *testing.T) {
	const steps, builds = 40, 100
	// perBuild is less than what the graph of one build takes, many times over.
	const perBuild = 6 << 10
	d := newDaemonWith(t, time.Millisecond, true)
	st := llb.Scratch()
	for i := range steps {
		st = st.File(llb.Mkfile(fmt.Sprint("/", i), 0o644, nil))
	}
	def, err := st.Marshal()
	must(t, err)
	n := 0
	run := func(times int) {
		t.Helper()
		for range times {
			n++
			_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: fmt.Sprint("cached ", n), Definition: def})
			must(t, err)
		}
		d.expectForgotten(t, n)
	}
	run(builds) // the history is full then
	goroutines, bytes := runtime.NumGoroutine(), heldBytes()
	run(builds)
	if more := heldBytes() - bytes; more > builds*perBuild {
		t.Errorf("%d cached builds left %d bytes each, the most is %d", builds, more/builds, perBuild)
	} else {
		t.Logf("%d bytes a build", more/builds)
	}
	atMost(t, goroutines, "goroutines", runtime.NumGoroutine)
}

// expectForgotten waits until nothing is left of the first n builds.
func (d *daemon) expectForgotten(t *testing.T, n int) {
	t.Helper()
	atMost(t, 0, "builds that have ended", func() (held int) {
		for i := range n {
			if _, err := d.builds.Get(context.Background(), fmt.Sprint("cached ", i+1), 0); err == nil {
				held++
			}
		}
		return held
	})
	d.explain.Forget("") // after what is to be kept is
	must(t, d.worker.Store().Sync(t.Context()))
}

// atMost waits until there are no more of some things than that.
func atMost(t *testing.T, most int, what string, count func() int) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for {
		n := count()
		if n <= most {
			return
		}
		select {
		case <-tick.C:
		case <-late:
			t.Errorf("there are still %d %s, the most is %d", n, what, most)
			return
		}
	}
}

// heldBytes is how much memory is in use.
func heldBytes() int {
	runtime.GC()
	runtime.GC() // pools are kept for one more
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
