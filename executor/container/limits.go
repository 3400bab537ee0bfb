//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// setting is a value for a control file of a controller.
type setting struct {
	controller, file, value string
	fallback                *setting // what other kernels have instead
	optional                bool     // not all kernels have it, nor need it
}

// limit sets what r says; what it doesn't mention stays as it is.
func (g groups) limit(r *specs.LinuxResources) error {
	if r == nil {
		return nil
	}
	list, err := g.settings(r)
	if err != nil {
		return err
	}
	if err := g.checkUsage(r.Memory); err != nil {
		return err
	}
	// A value may not fit to another one's old value, such as a burst to a quota.
	var again []setting
	for _, s := range list {
		switch err := g.set(s); {
		case errors.Is(err, unix.EINVAL):
			again = append(again, s)
		case err != nil:
			return err
		}
	}
	for _, s := range again {
		if err := g.set(s); err != nil {
			return err
		}
	}
	return nil
}

// checkUsage keeps a limit of memory, which on version 2 would kill the container
// that is above it, from doing so if that is not wanted.
func (g groups) checkUsage(m *specs.LinuxMemory) error {
	if g.V2 == "" || m == nil || m.CheckBeforeUpdate == nil || !*m.CheckBeforeUpdate || m.Limit == nil || *m.Limit <= 0 {
		return nil
	}
	if used := g.value("memory", "memory.current"); used > *m.Limit {
		return fmt.Errorf("set limit memory.max to %d: the container uses %d bytes, and checkBeforeUpdate is set", *m.Limit, used)
	}
	return nil
}

func (g groups) set(s setting) error {
	dir := g.dir(s.controller)
	if dir == "" {
		return fmt.Errorf("set limit %s to %s: this machine has no cgroup controller %s", s.file, s.value, s.controller)
	}
	err := writeControl(filepath.Join(dir, s.file), s.value)
	if errors.Is(err, os.ErrNotExist) && s.fallback != nil {
		return g.set(*s.fallback)
	}
	if errors.Is(err, os.ErrNotExist) && s.optional {
		return nil
	}
	if err != nil {
		return fmt.Errorf("set limit %s to %s: %w", s.file, s.value, err)
	}
	return nil
}

func (g groups) settings(r *specs.LinuxResources) ([]setting, error) {
	for _, l := range r.HugepageLimits {
		if strings.Contains(l.Pagesize, "/") {
			return nil, fmt.Errorf("linux.resources.hugepageLimits: %q is not the size of a page", l.Pagesize)
		}
	}
	if g.V2 != "" {
		return settingsV2(r)
	}
	if len(r.Unified) > 0 {
		return nil, errors.New("linux.resources.unified: this machine has cgroups of version 1")
	}
	return slices.Concat(g.memoryV1(r.Memory), cpuV1(r.CPU), cpuset(r.CPU), pids(r.Pids), blkioV1(r.BlockIO), hugepages(r.HugepageLimits, "limit_in_bytes"), network(r.Network), rdma(r.Rdma)), nil
}

func text[T int64 | uint64 | uint16 | uint32](v T) string { return fmt.Sprint(v) }

// memoryV1 orders memory, and memory with swap, so that the first is never
// above the second.
func (g groups) memoryV1(m *specs.LinuxMemory) (list []setting) {
	if m == nil {
		return nil
	}
	add := func(file string, v *int64) {
		if v != nil && *v != 0 {
			list = append(list, setting{controller: "memory", file: "memory." + file, value: text(*v)})
		}
	}
	swap := m.Swap
	if swap == nil && m.Limit != nil && *m.Limit == -1 {
		swap = m.Limit
	}
	if m.Limit != nil && swap != nil && (*swap == -1 || *swap > g.value("memory", "memory.memsw.limit_in_bytes")) {
		add("memsw.limit_in_bytes", swap)
		add("limit_in_bytes", m.Limit)
	} else {
		add("limit_in_bytes", m.Limit)
		add("memsw.limit_in_bytes", swap)
	}
	add("soft_limit_in_bytes", m.Reservation)
	add("kmem.tcp.limit_in_bytes", m.KernelTCP)
	if m.Swappiness != nil {
		list = append(list, setting{controller: "memory", file: "memory.swappiness", value: text(*m.Swappiness)})
	}
	if m.DisableOOMKiller != nil && *m.DisableOOMKiller {
		list = append(list, setting{controller: "memory", file: "memory.oom_control", value: "1"})
	}
	return list
}

func cpuV1(c *specs.LinuxCPU) (list []setting) {
	if c == nil {
		return nil
	}
	unsigned := func(file string, v *uint64) {
		if v != nil && *v != 0 {
			list = append(list, setting{controller: "cpu", file: "cpu." + file, value: text(*v)})
		}
	}
	signed := func(file string, v *int64) {
		if v != nil && *v != 0 {
			list = append(list, setting{controller: "cpu", file: "cpu." + file, value: text(*v)})
		}
	}
	unsigned("shares", c.Shares)
	unsigned("cfs_period_us", c.Period)
	signed("cfs_quota_us", c.Quota)
	if c.Burst != nil {
		list = append(list, setting{controller: "cpu", file: "cpu.cfs_burst_us", value: text(*c.Burst)})
	}
	unsigned("rt_period_us", c.RealtimePeriod)
	signed("rt_runtime_us", c.RealtimeRuntime)
	signed("idle", c.Idle)
	return list
}

func cpuset(c *specs.LinuxCPU) (list []setting) {
	if c != nil && c.Cpus != "" {
		list = append(list, setting{controller: "cpuset", file: "cpuset.cpus", value: c.Cpus})
	}
	if c != nil && c.Mems != "" {
		list = append(list, setting{controller: "cpuset", file: "cpuset.mems", value: c.Mems})
	}
	return list
}

func pids(p *specs.LinuxPids) []setting {
	if p == nil || p.Limit == nil || *p.Limit == 0 {
		return nil
	}
	value := "max"
	if *p.Limit > 0 {
		value = text(*p.Limit)
	}
	return []setting{{controller: "pids", file: "pids.max", value: value}}
}

func blkioV1(b *specs.LinuxBlockIO) (list []setting) {
	if b == nil {
		return nil
	}
	if b.Weight != nil && *b.Weight != 0 {
		list = append(list, setting{controller: "blkio", file: "blkio.weight", value: text(*b.Weight), fallback: &setting{controller: "blkio", file: "blkio.bfq.weight", value: text(*b.Weight)}})
	}
	if b.LeafWeight != nil && *b.LeafWeight != 0 {
		list = append(list, setting{controller: "blkio", file: "blkio.leaf_weight", value: text(*b.LeafWeight)})
	}
	for _, d := range b.WeightDevice {
		if d.Weight != nil {
			value := fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.Weight)
			list = append(list, setting{controller: "blkio", file: "blkio.weight_device", value: value, fallback: &setting{controller: "blkio", file: "blkio.bfq.weight_device", value: value}})
		}
		if d.LeafWeight != nil {
			list = append(list, setting{controller: "blkio", file: "blkio.leaf_weight_device", value: fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.LeafWeight)})
		}
	}
	for _, t := range throttles(b) {
		for _, d := range t.devices {
			list = append(list, setting{controller: "blkio", file: "blkio.throttle." + t.v1, value: fmt.Sprintf("%d:%d %d", d.Major, d.Minor, d.Rate)})
		}
	}
	return list
}

type throttle struct {
	v1, v2  string
	devices []specs.LinuxThrottleDevice
}

func throttles(b *specs.LinuxBlockIO) []throttle {
	return []throttle{
		{"read_bps_device", "rbps", b.ThrottleReadBpsDevice}, {"write_bps_device", "wbps", b.ThrottleWriteBpsDevice},
		{"read_iops_device", "riops", b.ThrottleReadIOPSDevice}, {"write_iops_device", "wiops", b.ThrottleWriteIOPSDevice},
	}
}

func hugepages(limits []specs.LinuxHugepageLimit, suffix string) (list []setting) {
	for _, l := range limits {
		// Newer kernels also count pages that are reserved and not used yet.
		list = append(list, setting{controller: "hugetlb", file: fmt.Sprintf("hugetlb.%s.%s", l.Pagesize, suffix), value: text(l.Limit)},
			setting{controller: "hugetlb", file: fmt.Sprintf("hugetlb.%s.rsvd.%s", l.Pagesize, suffix), value: text(l.Limit), optional: true})
	}
	return list
}

// rdma limits are the same on both versions.
func rdma(limits map[string]specs.LinuxRdma) (list []setting) {
	for _, device := range slices.Sorted(maps.Keys(limits)) {
		value := device
		if n := limits[device].HcaHandles; n != nil {
			value += " hca_handle=" + text(*n)
		}
		if n := limits[device].HcaObjects; n != nil {
			value += " hca_object=" + text(*n)
		}
		if value != device {
			list = append(list, setting{controller: "rdma", file: "rdma.max", value: value})
		}
	}
	return list
}

func network(n *specs.LinuxNetwork) (list []setting) {
	if n == nil {
		return nil
	}
	if n.ClassID != nil && *n.ClassID != 0 {
		list = append(list, setting{controller: "net_cls", file: "net_cls.classid", value: text(*n.ClassID)})
	}
	for _, p := range n.Priorities {
		list = append(list, setting{controller: "net_prio", file: "net_prio.ifpriomap", value: fmt.Sprintf("%s %d", p.Name, p.Priority)})
	}
	return list
}

// value reads a control file that is one number; 0 if it can't be read.
func (g groups) value(controller, file string) int64 {
	b, err := os.ReadFile(filepath.Join(g.dir(controller), file))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0 // "max"
	}
	return n
}

// protect makes the out-of-memory killer more or less likely to choose a
// process.
func protect(pid int, score *int) error {
	if score == nil {
		return nil
	}
	err := writeControl(fmt.Sprintf("/proc/%d/oom_score_adj", pid), strconv.Itoa(*score))
	if errors.Is(err, unix.ESRCH) {
		return nil // its end is told otherwise
	}
	if err != nil {
		return fmt.Errorf("set oomScoreAdj %d: %w", *score, err)
	}
	return nil
}
