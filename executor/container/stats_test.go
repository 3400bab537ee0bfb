//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// counted is a number of the statistics, and where the kernel has it: a file of
// one of the controllers, and the word before it, if there are several.
type counted struct {
	controller, file, word string
	times                  uint64
	get                    func(s *Stats) uint64
	some                   bool // it can't be 0 here
}

var countedV1 = []counted{
	{"cpuacct", "cpuacct.usage", "", 1, func(s *Stats) uint64 { return s.CPU.Usage.Total }, true},
	{"cpuacct", "cpuacct.stat", "user", 10_000_000, func(s *Stats) uint64 { return s.CPU.Usage.User }, false},
	{"cpuacct", "cpuacct.stat", "system", 10_000_000, func(s *Stats) uint64 { return s.CPU.Usage.Kernel }, false},
	{"cpu", "cpu.stat", "nr_periods", 1, func(s *Stats) uint64 { return s.CPU.Throttling.Periods }, false},
	{"cpu", "cpu.stat", "nr_throttled", 1, func(s *Stats) uint64 { return s.CPU.Throttling.ThrottledPeriods }, false},
	{"cpu", "cpu.stat", "throttled_time", 1, func(s *Stats) uint64 { return s.CPU.Throttling.ThrottledTime }, false},
	{"memory", "memory.usage_in_bytes", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Usage }, true},
	{"memory", "memory.max_usage_in_bytes", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Max }, true},
	{"memory", "memory.limit_in_bytes", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Limit }, true},
	{"memory", "memory.failcnt", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Failcnt }, false},
	{"memory", "memory.stat", "cache", 1, func(s *Stats) uint64 { return s.Memory.Cache }, true},
	{"memory", "memory.stat", "rss", 1, func(s *Stats) uint64 { return s.Memory.Raw["rss"] }, false},
	{"pids", "pids.current", "", 1, func(s *Stats) uint64 { return s.Pids.Current }, true},
	{"pids", "pids.max", "", 1, func(s *Stats) uint64 { return s.Pids.Limit }, true},
}

var countedV2 = []counted{
	{"", "cpu.stat", "usage_usec", 1000, func(s *Stats) uint64 { return s.CPU.Usage.Total }, true},
	{"", "cpu.stat", "user_usec", 1000, func(s *Stats) uint64 { return s.CPU.Usage.User }, false},
	{"", "cpu.stat", "system_usec", 1000, func(s *Stats) uint64 { return s.CPU.Usage.Kernel }, false},
	{"", "cpu.stat", "nr_periods", 1, func(s *Stats) uint64 { return s.CPU.Throttling.Periods }, false},
	{"", "memory.current", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Usage }, true},
	{"", "memory.max", "", 1, func(s *Stats) uint64 { return s.Memory.Usage.Limit }, true},
	{"", "memory.stat", "file", 1, func(s *Stats) uint64 { return s.Memory.Cache }, true},
	{"", "pids.current", "", 1, func(s *Stats) uint64 { return s.Pids.Current }, true},
	{"", "pids.max", "", 1, func(s *Stats) uint64 { return s.Pids.Limit }, true},
}

// pressures are of kernels that measure it.
var pressures = []counted{
	{"", "cpu.pressure", "some", 1, func(s *Stats) uint64 { return s.CPU.PSI.Some.Total }, false},
	{"", "memory.pressure", "full", 1, func(s *Stats) uint64 { return s.Memory.PSI.Full.Total }, false},
	{"", "io.pressure", "some", 1, func(s *Stats) uint64 { return s.Blkio.PSI.Some.Total }, false},
}

// Each number of a container's statistics is that of the kernel's file.
func TestStatsAreTheKernels(t *testing.T) {
	ctx := context.Background()
	bundle, spec := newBundle(t, "busybox dd if=/dev/zero of=/dev/shm/x bs=1M count=8; echo ready >/wait; sleep 1000 & wait")
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}
	spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(50_000)), Period: ptr(uint64(100_000))}
	spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(17))}
	b := createBox(t, bundle, spec)
	ready, err := os.OpenFile(filepath.Join(bundle, "rootfs/wait"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	b.start()
	if _, err := ready.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if err := b.Pause(ctx); err != nil { // so that they change little
		t.Fatal(err)
	}
	list := countedV1
	if b.Groups.V2 != "" {
		list = countedV2
		if _, err := os.ReadFile("/proc/pressure/cpu"); err == nil {
			list = slices.Concat(list, pressures)
		}
	}
	for _, c := range list {
		before := c.read(t, b.Groups)
		s, err := b.Stats()
		if err != nil {
			t.Fatal(err)
		}
		after := c.read(t, b.Groups) // the kernel may free memory at any time
		if got := c.get(s); got < min(before, after) || got > max(before, after) || c.some && got == 0 {
			t.Errorf("%s %s: %d, the kernel says %d and then %d", c.file, c.word, got, before, after)
		}
	}
}

// read returns the kernel's number.
func (c counted) read(t *testing.T, g groups) uint64 {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(g.dir(c.controller), c.file))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if c.word != "" && fields[0] != c.word {
			continue
		}
		_, last, _ := strings.Cut(fields[len(fields)-1], "=") // of pressure
		if last == "" {
			last = fields[len(fields)-1]
		}
		n, err := strconv.ParseUint(last, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", c.file, err)
		}
		return n * c.times
	}
	t.Fatalf("%s has no %s:\n%s", c.file, c.word, text)
	return 0
}
