//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

func list(settings []setting) (lines []string) {
	for _, s := range settings {
		line := s.file + " " + s.value
		if f := s.fallback; f != nil {
			line += " or " + f.file + " " + f.value
		}
		lines = append(lines, line)
	}
	return lines
}

func TestSettingsV2(t *testing.T) {
	for name, tc := range map[string]struct {
		r    specs.LinuxResources
		want string
		err  string
	}{
		"nothing": {},
		"memory": {
			r:    specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(50))}},
			want: "memory.swap.max 50,memory.max 100,memory.low 50",
		},
		"unlimited memory":     {r: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}}, want: "memory.swap.max max,memory.max max"},
		"swap without memory":  {r: specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: ptr(int64(5))}}, err: "memory must be, too"},
		"less swap than that":  {r: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(9)), Swap: ptr(int64(5))}}, err: "are less than"},
		"quota":                {r: specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(5000)), Period: ptr(uint64(10000))}}, want: "cpu.max 5000 10000"},
		"no quota":             {r: specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}}, want: "cpu.max max"},
		"least and most share": {r: specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(262144)), Cpus: "0-1"}}, want: "cpu.weight 10000,cpuset.cpus 0-1"},
		"processes":            {r: specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}, want: "pids.max max"},
		"throttle": {
			r: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{
				{LinuxBlockIODevice: specs.LinuxBlockIODevice{Major: 8, Minor: 1}, Rate: 77},
			}}},
			want: "io.max 8:1 rbps=77",
		},
		"weights": {
			r: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(1000)), WeightDevice: []specs.LinuxWeightDevice{
				{LinuxBlockIODevice: specs.LinuxBlockIODevice{Major: 8, Minor: 1}, Weight: ptr(uint16(10))},
			}}},
			want: "io.bfq.weight 1000 or io.weight 10000,io.bfq.weight 8:1 10 or io.weight 8:1 1",
		},
		"rdma": {
			r:    specs.LinuxResources{Rdma: map[string]specs.LinuxRdma{"mlx5_1": {HcaHandles: ptr(uint32(2)), HcaObjects: ptr(uint32(3))}, "mlx4_0": {HcaObjects: ptr(uint32(4))}, "no": {}}},
			want: "rdma.max mlx4_0 hca_object=4,rdma.max mlx5_1 hca_handle=2 hca_object=3",
		},
		"huge pages":      {r: specs.LinuxResources{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}}}, want: "hugetlb.2MB.max 4,hugetlb.2MB.rsvd.max 4"},
		"swappiness":      {r: specs.LinuxResources{Memory: &specs.LinuxMemory{Swappiness: ptr(uint64(0))}}, err: "memory.swappiness: cgroups of version 2"},
		"no OOM killer":   {r: specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(true)}}, err: "memory.disableOOMKiller"},
		"OOM killer":      {r: specs.LinuxResources{Memory: &specs.LinuxMemory{DisableOOMKiller: ptr(false)}}},
		"TCP buffers":     {r: specs.LinuxResources{Memory: &specs.LinuxMemory{KernelTCP: ptr(int64(5))}}, err: "memory.kernelTCP"},
		"real time":       {r: specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimeRuntime: ptr(int64(5))}}, err: "cpu.realtimeRuntime"},
		"real-time turns": {r: specs.LinuxResources{CPU: &specs.LinuxCPU{RealtimePeriod: ptr(uint64(5))}}, err: "cpu.realtimePeriod"},
		"network class":   {r: specs.LinuxResources{Network: &specs.LinuxNetwork{ClassID: ptr(uint32(5))}}, err: "resources.network"},
		"leaf weight":     {r: specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{LeafWeight: ptr(uint16(5))}}, err: "blockIO.leafWeight"},
		"as it is":        {r: specs.LinuxResources{Unified: map[string]string{"memory.high": "7"}}, want: "memory.high 7"},
		"no path":         {r: specs.LinuxResources{Unified: map[string]string{"../x": "7"}}, err: "not the name of a control file"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := settingsV2(&tc.r)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %q in it", err, tc.err)
				}
				return
			}
			if lines := strings.Join(list(got), ","); err != nil || lines != tc.want {
				t.Errorf("%s, %v; want %s", lines, err, tc.want)
			}
		})
	}
}

// On version 1 the limit of memory and swap together may not be below that of
// memory at any time.
func TestMemoryV1Order(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "memory.memsw.limit_in_bytes"), []byte("1000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	g := groups{V1: map[string]string{"memory": dir}}
	more := list(g.memoryV1(&specs.LinuxMemory{Limit: ptr(int64(2000)), Swap: ptr(int64(3000))}))
	less := list(g.memoryV1(&specs.LinuxMemory{Limit: ptr(int64(200)), Swap: ptr(int64(300))}))
	if want := []string{"memory.memsw.limit_in_bytes 3000", "memory.limit_in_bytes 2000"}; !slices.Equal(more, want) {
		t.Errorf("more: %v", more)
	}
	if want := []string{"memory.limit_in_bytes 200", "memory.memsw.limit_in_bytes 300"}; !slices.Equal(less, want) {
		t.Errorf("less: %v", less)
	}
}

// fakeGroup is a directory with control files, on no cgroup file system.
func fakeGroup(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for file, text := range files {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What a kernel doesn't have is done without, where that makes no difference.
func TestSettingsOfOtherKernels(t *testing.T) {
	g := groups{V2: fakeGroup(t, map[string]string{"memory.max": "max\n", "io.weight": "default 100\n", "hugetlb.2MB.max": "max\n"})}
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(100))}, BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(10))},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}},
	}
	if err := g.limit(r); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(g.V2, "io.weight")); err != nil || !strings.HasPrefix(string(text), "1") {
		t.Errorf("io.weight is %q, %v", text, err)
	}
	r.Memory.Swap = ptr(int64(150))
	if err := g.limit(r); err == nil || !strings.Contains(err.Error(), "memory.swap.max to 50") {
		t.Errorf("error %v", err)
	}
}

// A limit below what is used kills on version 2, unless that is to be asked first.
func TestLimitBelowUsage(t *testing.T) {
	g := groups{V2: fakeGroup(t, map[string]string{"memory.max": "max\n", "memory.current": "1000\n"})}
	r := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(999)), CheckBeforeUpdate: ptr(true)}}
	if err := g.limit(r); err == nil || !strings.Contains(err.Error(), "the container uses 1000 bytes") {
		t.Errorf("error %v", err)
	}
	r.Memory.Limit = ptr(int64(1000))
	if err := g.limit(r); err != nil {
		t.Error(err)
	}
}

func TestMissingController(t *testing.T) {
	g := groups{V1: map[string]string{"memory": t.TempDir()}}
	err := g.limit(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(3))}})
	if err == nil || !strings.Contains(err.Error(), "no cgroup controller pids") {
		t.Errorf("error %v", err)
	}
}

// A freezer that never freezes is given up with the context.
func TestFreezeGivesUp(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{"cgroup.freeze": "0\n", "cgroup.events": "populated 1\nfrozen 0\n"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	g := groups{V2: dir}
	if err := g.freeze(ctx, true); err == nil || !strings.Contains(err.Error(), "frozen 1") {
		t.Errorf("error %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte("populated 1\nfrozen 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.freeze(context.Background(), true); err != nil {
		t.Error(err)
	}
}
