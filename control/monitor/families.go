package monitor

import (
	"bytes"
	"os"
	"runtime"
	rtmetrics "runtime/metrics"
	"strconv"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/metrics"
	"github.com/kilnbuild/kiln/internal/version"
	"github.com/kilnbuild/kiln/worker/verify"
)

// addCache adds what the cache holds.
func (m *Monitor) addCache() {
	read := func(value func(*cache.Totals) int64) func() float64 {
		return func() float64 { return float64(value(&m.totals)) }
	}
	m.set.Func(metrics.GaugeKind, "kiln_cache_records", "Cache records, by type.", []string{"type"}, func(emit func(float64, ...string)) {
		for typ, n := range m.totals.Records {
			emit(float64(n), string(typ))
		}
	})
	m.gauge("kiln_cache_bytes", "Disk space of cache records that were measured.", read(func(t *cache.Totals) int64 { return t.Bytes }))
	m.gauge("kiln_cache_records_unmeasured", "Cache records whose disk space isn't in kiln_cache_bytes yet.", read(func(t *cache.Totals) int64 { return int64(t.Unmeasured) }))
	m.counter("kiln_cache_evicted_records_total", "Cache records that were removed by rules, by prune, or because they were lost.", read(func(t *cache.Totals) int64 { return t.Evictions }))
	m.counter("kiln_cache_evicted_bytes_total", "Disk space that removals by rules and by prune have freed.", read(func(t *cache.Totals) int64 { return t.EvictedBytes }))
}

func (m *Monitor) counter(name, help string, value func() float64) {
	m.set.Func(metrics.CounterKind, name, help, nil, func(emit func(float64, ...string)) { emit(value()) })
}

// addVerify adds what the verifier has found.
func (m *Monitor) addVerify() {
	if m.cfg.Verify == nil {
		return
	}
	m.set.Func(metrics.CounterKind, "kiln_verify_total", "Cache hits that were to be verified, by outcome.", []string{"outcome"}, func(emit func(float64, ...string)) {
		counts := m.cfg.Verify.Summary().Counts
		for _, o := range verify.Outcomes {
			emit(float64(counts[o]), string(o))
		}
	})
	m.gauge("kiln_verify_queued", "Cache hits that wait to be verified.", func() float64 { return float64(m.cfg.Verify.Summary().Queued) })
}

// addProcess adds what collectors of Go programs by custom find.
func (m *Monitor) addProcess() {
	begun := time.Now()
	m.gauge("process_start_time_seconds", "When the process began, in seconds since 1970.", func() float64 { return float64(begun.UnixMilli()) / 1000 })
	m.set.Func(metrics.GaugeKind, "process_resident_memory_bytes", "Memory of the process.", nil, func(emit func(float64, ...string)) {
		if n, ok := residentPages(); ok {
			emit(float64(n) * float64(os.Getpagesize()))
		}
	})
	m.set.Func(metrics.GaugeKind, "process_open_fds", "Open file descriptors.", nil, func(emit func(float64, ...string)) {
		if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
			emit(float64(len(fds)))
		}
	})
	m.set.Func(metrics.GaugeKind, "kiln_info", "What runs.", []string{"version", "revision", "go"}, func(emit func(float64, ...string)) {
		emit(1, version.Protocol(), version.Revision, runtime.Version())
	})
	m.gauge("go_goroutines", "Goroutines.", func() float64 { return float64(runtime.NumGoroutine()) })
	for _, r := range []struct {
		kind              metrics.Kind
		name, help, value string
	}{
		{metrics.GaugeKind, "go_memstats_heap_alloc_bytes", "Heap in use.", "/memory/classes/heap/objects:bytes"},
		{metrics.GaugeKind, "go_memstats_sys_bytes", "Memory that the runtime has from the system.", "/memory/classes/total:bytes"},
		{metrics.CounterKind, "go_memstats_alloc_bytes_total", "Heap that was ever allocated.", "/gc/heap/allocs:bytes"},
		{metrics.CounterKind, "go_gc_cycles_total", "Garbage collections of the runtime.", "/gc/cycles/total:gc-cycles"},
	} {
		m.set.Func(r.kind, r.name, r.help, nil, func(emit func(float64, ...string)) {
			sample := []rtmetrics.Sample{{Name: r.value}}
			if rtmetrics.Read(sample); sample[0].Value.Kind() == rtmetrics.KindUint64 {
				emit(float64(sample[0].Value.Uint64()))
			}
		})
	}
}

// residentPages reads the second field of statm.
func residentPages() (uint64, bool) {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(data)
	if len(fields) < 2 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(fields[1]), 10, 64)
	return n, err == nil
}
