package worker

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// benchSizes are how many records du, prune and start are measured with: the
// time of each record must not grow with their number.
var benchSizes = []int{1000, 5000, 20000, 100000}

// fill makes n records as a build of n steps leaves them, in chains of 50: each
// with a snapshot, and with the key that leads to it.
func fill(b *testing.B, w *Worker, n int) {
	b.Helper()
	var held []*cache.Ref
	var parent *cache.Ref
	release := func() {
		for _, ref := range slices.Backward(held) {
			ref.Release()
		}
		held, parent = nil, nil
	}
	key := func(i int) solver.Key { return solver.RootKey(digest.FromString(fmt.Sprint(i)), 0) }
	for i := range n {
		if i%50 == 0 {
			release()
		}
		u, err := w.Cache().New(b.Context(), parent, cache.Options{Description: fmt.Sprintf("mkfile /f%d", i)})
		must(b, err)
		ref, err := u.Commit(b.Context())
		must(b, err)
		save := solver.Save{Lookup: solver.Lookup{Op: digest.FromString("mkfile")}, Keys: []solver.Key{key(i)}, Result: ops.Result{Ref: ref}}
		if parent != nil {
			save.Inputs = [][]solver.InputKey{{{Key: key(i - 1)}}}
		}
		must(b, w.keys.Save(save))
		parent, held = ref, append(held, ref)
	}
	release()
	must(b, w.Store().Sync(b.Context()))
}

// quiet is without collector and log.
func quiet(b *testing.B, root string) *Worker {
	b.Helper()
	w, err := New(b.Context(), Config{Root: root, GC: GC{Off: true}})
	must(b, err)
	return w
}

// spent is the time that something took, of the clock and of all processors.
type spent struct{ wall, cpu time.Duration }

func (s *spent) add(more spent) { s.wall, s.cpu = s.wall+more.wall, s.cpu+more.cpu }

func measured(fn func()) spent {
	start, cpu := time.Now(), cpuTime()
	fn()
	return spent{time.Since(start), cpuTime() - cpu}
}

// cpuTime is what this process has used so far.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// perRecord runs a benchmark with each number of records, and reports what one
// record takes in each of the stages that run returns.
func perRecord(b *testing.B, run func(b *testing.B, n int) map[string]spent) {
	needRoot(b)
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			total := map[string]spent{}
			runs := 0
			for b.Loop() {
				for stage, s := range run(b, n) {
					sum := total[stage]
					sum.add(s)
					total[stage] = sum
				}
				runs++
			}
			for stage, s := range total {
				b.ReportMetric(float64(s.wall.Microseconds())/float64(runs*n), stage+"-µs/record")
				b.ReportMetric(float64(s.cpu.Microseconds())/float64(runs*n), stage+"-cpu-µs/record")
			}
		})
	}
}

func BenchmarkDiskUsage(b *testing.B) {
	perRecord(b, func(b *testing.B, n int) map[string]spent {
		w := quiet(b, b.TempDir())
		fill(b, w, n)
		du := func() {
			_, err := w.Cache().DiskUsage(b.Context(), nil, 0)
			must(b, err)
		}
		out := map[string]spent{"first": measured(du), "again": measured(du)}
		must(b, w.Close())
		return out
	})
}

func BenchmarkPruneAll(b *testing.B) {
	perRecord(b, func(b *testing.B, n int) map[string]spent {
		w := quiet(b, b.TempDir())
		fill(b, w, n)
		prune := measured(func() { must(b, w.Cache().Prune(b.Context(), cache.PruneOptions{All: true}, nil)) })
		return map[string]spent{"prune": prune, "deletion": measured(func() { must(b, w.Close()) })}
	})
}

// BenchmarkPruneToSize halves the cache, which takes an order among all.
func BenchmarkPruneToSize(b *testing.B) {
	perRecord(b, func(b *testing.B, n int) map[string]spent {
		w := quiet(b, b.TempDir())
		fill(b, w, n)
		usage, err := w.Cache().DiskUsage(b.Context(), nil, 0)
		must(b, err)
		total := int64(0)
		for _, u := range usage {
			total += u.Size
		}
		out := measured(func() { must(b, w.Cache().Prune(b.Context(), cache.PruneOptions{MaxUsedSpace: total / 2}, nil)) })
		must(b, w.Close())
		return map[string]spent{"prune": out}
	})
}

func BenchmarkStart(b *testing.B) {
	perRecord(b, func(b *testing.B, n int) map[string]spent {
		root := b.TempDir()
		w := quiet(b, root)
		fill(b, w, n)
		must(b, w.Close())
		w = nil
		before := heap()
		out := measured(func() { w = quiet(b, root) })
		b.ReportMetric(float64(heap()-before)/float64(n), "heap-B/record")
		must(b, w.Close())
		return map[string]spent{"start": out}
	})
}

// heap is what is in use of it.
func heap() int64 {
	var m runtime.MemStats
	for range 3 { // what has finalizers and what is pooled takes several
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkCollectNothing is a pass of the collector by upstream's default rules
// that finds nothing to remove: the most frequent one.
func BenchmarkCollectNothing(b *testing.B) {
	perRecord(b, func(b *testing.B, n int) map[string]spent {
		w := quiet(b, b.TempDir())
		fill(b, w, n)
		rules := []cache.PruneOptions{
			{Filters: []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"}, KeepDuration: 48 * time.Hour, MaxUsedSpace: 512 << 20},
			{KeepDuration: 60 * 24 * time.Hour, MaxUsedSpace: 1 << 40},
			{MaxUsedSpace: 1 << 40},
			{All: true, MaxUsedSpace: 1 << 40},
		}
		pass := func() { must(b, w.Cache().Collect(b.Context(), rules, nil)) }
		out := map[string]spent{"first": measured(pass), "again": measured(pass)}
		must(b, w.Close())
		return out
	})
}
