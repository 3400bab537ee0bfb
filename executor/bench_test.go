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
	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/internal/cleanup"
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
// built-in runtime's child spends in each stage is reported as the median, for one
// run in which it had to wait for a processor would hide all others in a mean.
func BenchmarkRun(b *testing.B) {
	for name, binary := range runtimes {
		for network, mode := range map[string]NetMode{"host": NetHost, "none": NetNone} {
			b.Run(name+"/"+network, func(b *testing.B) {
				e := newTest(b, Config{Binary: binary})
				stages := map[string][]float64{} // µs
				rate := 1.0
				if bi, ok := e.rt.(*builtin); ok {
					rate = ticksPerMicrosecond(b, bi.launcher)
					e.observe = func(x exit) {
						sum := map[string]uint64{} // some stages come twice
						for _, s := range x.times {
							sum[s.Stage] += s.Ticks
						}
						for stage, ticks := range sum {
							stages[stage] = append(stages[stage], float64(ticks)/rate)
						}
					}
				}
				p := process(b, "")
				p.Args, p.Network = []string{"/bin/true"}, mode
				lower := busyboxRoot(b)
				shm := memoryDir(b)
				var took []float64
				for b.Loop() {
					b.StopTimer()
					p.ID, p.Root = newID(), overlayIn(b, shm, lower)
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
				for stage, took := range stages {
					slices.Sort(took)
					b.ReportMetric(took[len(took)/2], stage+"-µs")
				}
			})
		}
	}
}

// memoryDir is a directory for overlays: on a disk, what one makes and removes in its
// work directory can take longer than all the rest.
func memoryDir(b *testing.B) string {
	b.Helper()
	shm, err := os.MkdirTemp("/dev/shm", "kiln-bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(shm) })
	return shm
}

func overlayIn(b *testing.B, dir, lower string) []mount.Mount {
	b.Helper()
	base := filepath.Join(dir, newID())
	upper, work := filepath.Join(base, "upper"), filepath.Join(base, "work")
	mkdir(b, upper)
	mkdir(b, work)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + lower, "upperdir=" + upper, "workdir=" + work, "volatile"}}} // as the snapshotter does
}

// BenchmarkPrepare is what is done before there is a process, by stage. The cgroup
// is one that wasn't made ahead.
func BenchmarkPrepare(b *testing.B) {
	e := newTest(b, Config{})
	lower, shm := busyboxRoot(b), memoryDir(b)
	p := process(b, "true")
	p.Root, p.Network = overlayIn(b, shm, lower), NetNone
	p.Mounts = []Mount{{Dest: "/new/mount", Source: bindMount(b.TempDir())}}
	open, err := e.rt.opener(p, nil)
	if err != nil {
		b.Fatal(err)
	}
	view, err := open(p.Root)
	if err != nil {
		b.Fatal(err)
	}
	defer view.Close()
	root := rootfs.New(view.FD())
	other := overlayIn(b, shm, lower) // which nobody has open
	group := cgroupSpec(p)
	group.AllDevices = true // as none that is made ahead
	for _, stage := range []struct {
		name string
		do   func(t *task, undo *cleanup.Stack) error
	}{
		{"network", func(_ *task, undo *cleanup.Stack) error { _, err := e.takeNetwork(b.Context(), p, undo); return err }},
		{"root", func(_ *task, undo *cleanup.Stack) error {
			v, err := open(other)
			if err == nil {
				undo.Add(v.Close)
			}
			return err
		}},
		{"user", func(*task, *cleanup.Stack) error { _, err := root.User("builder"); return err }},
		{"files", func(_ *task, undo *cleanup.Stack) error { _, err := e.openFiles(p, undo); return err }},
		{"mounts", func(_ *task, undo *cleanup.Stack) error { _, err := openSources(open, p.Mounts, undo); return err }},
		{"mount points", func(t *task, undo *cleanup.Stack) (err error) {
			if t.sources, err = openSources(open, p.Mounts, undo); err != nil {
				return err
			}
			stubs, err := e.mountPoints(t, root)
			if err == nil {
				undo.Add(stubs.Remove)
			}
			return err
		}},
		{"cwd", func(*task, *cleanup.Stack) error { return root.MakeCwd("/tmp", 0, 0) }},
		{"spec", func(*task, *cleanup.Stack) error {
			_, err := makeSpec(p, rootfs.User{}, nil, e.confinement)
			return err
		}},
		{"cgroup", func(_ *task, undo *cleanup.Stack) error {
			group.ID = newID() // they are removed in the background
			g, err := e.cgroups.Take(b.Context(), group)
			if err == nil {
				undo.AddFunc(g.Release)
			}
			return err
		}},
		{"all", func(_ *task, undo *cleanup.Stack) error { _, err := e.prepare(b.Context(), p, undo); return err }},
	} {
		b.Run(stage.name, func(b *testing.B) {
			for b.Loop() {
				var undo cleanup.Stack
				t := &task{p: p, makePoints: map[string]string{}}
				if err := errors.Join(stage.do(t, &undo), undo.Run()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
