package worker

import (
	"fmt"
	"os"
	"path/filepath"
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

// fill makes n records as a build of n steps leaves them, in chains of 50: each
// with a snapshot of one file, and with the key that leads to it.
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
		file := filepath.Join(w.cfg.Root, "snapshots", u.Interrupted().Snapshot, "fs", "f")
		must(b, os.WriteFile(file, []byte("content"), 0o644))
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

// stages measures what records go through, one stage after the other.
type stages struct {
	b    *testing.B
	runs int
	cpu  map[string]time.Duration // by stage, for each record, of all runs
	wall map[string]time.Duration
}

// measure adds what fn takes for each of n records.
func (s *stages) measure(stage string, n int, fn func()) {
	runtime.GC() // else a stage pays for the one before
	start, cpu := time.Now(), cpuTime()
	fn()
	s.wall[stage] += time.Since(start) / time.Duration(n)
	s.cpu[stage] += (cpuTime() - cpu) / time.Duration(n)
}

func (s *stages) report() {
	for stage := range s.cpu {
		for name, took := range map[string]time.Duration{"-µs": s.wall[stage], "-cpu-µs": s.cpu[stage]} {
			s.b.ReportMetric(float64(took.Nanoseconds())/1e3/float64(s.runs), stage+name)
		}
	}
}

// cpuTime is what this process has used so far, on all processors.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRecords measures what each of many records costs: at a start, in du,
// in the collector and in prune, with the deletion of their files: of few records
// most are deleted after the prune, of many most beside it. None of it may grow
// with their number. With
// TMPDIR on a tmpfs 100,000 take half a minute; elsewhere most of the time goes
// into making their directories.
func BenchmarkRecords(b *testing.B) {
	needRoot(b)
	for _, n := range []int{1000, 10000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := &stages{b: b, cpu: map[string]time.Duration{}, wall: map[string]time.Duration{}}
			for b.Loop() {
				live(s, n)
				s.runs++
			}
			s.report()
		})
	}
}

// live takes n records through all stages.
func live(s *stages, n int) {
	b := s.b
	root := b.TempDir()
	w := quiet(b, root)
	fill(b, w, n)
	must(b, w.Close())
	w = nil
	before := heap()
	s.measure("start", n, func() { w = quiet(b, root) })
	b.ReportMetric(float64(heap()-before)/float64(n), "heap-B")

	total := int64(0)
	du := func() {
		usage, err := w.Cache().DiskUsage(b.Context(), nil, 0)
		must(b, err)
		total = 0
		for _, u := range usage {
			total += u.Size
		}
	}
	s.measure("du-first", n, du)
	s.measure("du-again", n, du)
	s.measure("collect-nothing", n, func() { must(b, w.Cache().Collect(b.Context(), upstreamsRules(), nil)) })

	prune := func(opts cache.PruneOptions) (removed int) {
		must(b, w.Cache().Prune(b.Context(), opts, func(cache.Usage) error { removed++; return nil }))
		must(b, w.snapshots.Settle(b.Context()))
		return removed
	}
	s.measure("prune-to-half", n/2, func() { n -= prune(cache.PruneOptions{MaxUsedSpace: total / 2}) })
	if n == 0 {
		b.Fatal("prune to half the size removed everything")
	}
	s.measure("prune-all", n, func() { prune(cache.PruneOptions{All: true}) })
	must(b, w.Close())
}

// upstreamsRules are its default ones, on a disk that is big enough: a pass by them,
// which removes nothing, is the collector's most frequent one.
func upstreamsRules() []cache.PruneOptions {
	return []cache.PruneOptions{
		{Filters: []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"}, KeepDuration: 48 * time.Hour, MaxUsedSpace: 512 << 20},
		{KeepDuration: 60 * 24 * time.Hour, MaxUsedSpace: 1 << 40},
		{MaxUsedSpace: 1 << 40},
		{All: true, MaxUsedSpace: 1 << 40},
	}
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
