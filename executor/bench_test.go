//go:build linux && (amd64 || arm64)

package executor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/launch"
	"golang.org/x/sys/unix"
)

// ticksPerMicrosecond measures the time stamp counter.
func ticksPerMicrosecond(b *testing.B, l *launch.Launcher) float64 {
	b.Helper()
	const pause = 50 * time.Millisecond
	p := new(launch.Program)
	p.Stage("pause")
	p.Call("", unix.SYS_PPOLL, 0, 0, p.Words(0, uintptr(pause)), 0, 0)
	if _, err := l.Launch(context.Background(), p, launch.Options{CgroupFD: -1}); !errors.Is(err, launch.ErrNotExecuted) {
		b.Fatal(err)
	}
	return float64(p.Times()[0].Ticks) / float64(pause.Microseconds())
}

// BenchmarkRun is a whole Run of /bin/true, by runtime and network. What the
// built-in runtime's child spends in each stage is reported as mean µs.
func BenchmarkRun(b *testing.B) {
	for name, binary := range runtimes {
		for network, mode := range map[string]NetMode{"host": NetHost, "none": NetNone} {
			b.Run(name+"/"+network, func(b *testing.B) {
				e := newTest(b, Config{Binary: binary})
				stages := map[string]uint64{}
				rate := 1.0
				if bi, ok := e.rt.(*builtin); ok {
					rate = ticksPerMicrosecond(b, bi.launcher)
					e.observe = func(x exit) {
						for _, s := range x.times() {
							stages[s.Stage] += s.Ticks
						}
					}
				}
				p := process(b, "")
				p.Args, p.Network = []string{"/bin/true"}, mode
				lower := busyboxRoot(b)
				// On a disk, what an overlay makes and removes in its work directory
				// can take longer than all the rest.
				shm, err := os.MkdirTemp("/dev/shm", "kiln-bench")
				if err != nil {
					b.Fatal(err)
				}
				defer os.RemoveAll(shm)
				var took []float64
				for b.Loop() {
					b.StopTimer()
					root := overlayIn(b, shm, lower)
					root[0].Options = append(root[0].Options, "volatile") // as the snapshotter does
					p.ID, p.Root = newID(), root
					b.StartTimer()
					start := time.Now()
					if r := run(b, e, p); r.err != nil {
						b.Fatal(r.err)
					}
					took = append(took, float64(time.Since(start).Microseconds()))
				}
				slices.Sort(took)
				b.ReportMetric(took[len(took)/2], "median-µs")
				b.ReportMetric(took[0], "least-µs")
				for stage, ticks := range stages {
					b.ReportMetric(float64(ticks)/rate/float64(b.N), stage+"-µs")
				}
			})
		}
	}
}

func overlayIn(b *testing.B, dir, lower string) []mount.Mount {
	b.Helper()
	base := filepath.Join(dir, newID())
	upper, work := filepath.Join(base, "upper"), filepath.Join(base, "work")
	mkdir(b, upper)
	mkdir(b, work)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work}}}
}
