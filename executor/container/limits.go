//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
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
	// fallbacks are files that other kernels have instead.
	fallbacks []string
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
	for _, s := range list {
		if err := g.set(s); err != nil {
			return err
		}
	}
	return nil
}

func (g groups) set(s setting) error {
	dir := g.dir(s.controller)
	if dir == "" {
		return fmt.Errorf("set limit %s to %s: this machine has no cgroup controller %s", s.file, s.value, s.controller)
	}
	err := writeControl(filepath.Join(dir, s.file), s.value)
	for _, file := range s.fallbacks {
		if errors.Is(err, os.ErrNotExist) {
			err = writeControl(filepath.Join(dir, file), s.value)
		}
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
	return slices.Concat(g.memoryV1(r.Memory), cpuV1(r.CPU), cpuset(r.CPU), pids(r.Pids), blkioV1(r.BlockIO), hugepages(r.HugepageLimits, "limit_in_bytes"), network(r.Network)), nil
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
		list = append(list, setting{controller: "blkio", file: "blkio.weight", value: text(*b.Weight), fallbacks: []string{"blkio.bfq.weight"}})
	}
	for _, d := range b.WeightDevice {
		if d.Weight != nil {
			value := fmt.Sprintf("%d:%d %d", d.Major, d.Minor, *d.Weight)
			list = append(list, setting{controller: "blkio", file: "blkio.weight_device", value: value, fallbacks: []string{"blkio.bfq.weight_device"}})
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
		list = append(list, setting{controller: "hugetlb", file: fmt.Sprintf("hugetlb.%s.%s", l.Pagesize, suffix), value: text(l.Limit)})
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

func settingsV2(r *specs.LinuxResources) (list []setting, err error) {
	add := func(controller, file, value string) {
		list = append(list, setting{controller: controller, file: file, value: value})
	}
	if m := r.Memory; m != nil {
		if list, err = memoryV2(m); err != nil {
			return nil, err
		}
	}
	if c := r.CPU; c != nil {
		if c.Idle != nil {
			add("cpu", "cpu.idle", text(*c.Idle))
		}
		if c.Shares != nil && *c.Shares != 0 {
			shares := min(max(*c.Shares, 2), 262144)
			add("cpu", "cpu.weight", text(1+(shares-2)*9999/262142))
		}
		if c.Burst != nil {
			add("cpu", "cpu.max.burst", text(*c.Burst))
		}
		if value := quotaV2(c); value != "" {
			add("cpu", "cpu.max", value)
		}
	}
	list = slices.Concat(list, cpuset(r.CPU), pids(r.Pids))
	if b := r.BlockIO; b != nil {
		if b.Weight != nil && *b.Weight != 0 {
			w := uint64(*b.Weight)
			// The old range of weights is 10-1000, the new one 1-10000.
			list = append(list, setting{controller: "io", file: "io.bfq.weight", value: text(w), fallbacks: nil})
			list[len(list)-1].fallbacks = []string{"io.weight"}
		}
		for _, t := range throttles(b) {
			for _, d := range t.devices {
				add("io", "io.max", fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, t.v2, d.Rate))
			}
		}
	}
	list = append(list, hugepages(r.HugepageLimits, "max")...)
	for file, value := range r.Unified {
		if strings.Contains(file, "/") || file == ".." {
			return nil, fmt.Errorf("linux.resources.unified: %q is not the name of a control file", file)
		}
		controller, _, _ := strings.Cut(file, ".")
		add(controller, file, value)
	}
	return list, nil
}

func memoryV2(m *specs.LinuxMemory) (list []setting, err error) {
	add := func(file string, n int64) {
		value := "max"
		if n >= 0 {
			value = text(n)
		}
		list = append(list, setting{controller: "memory", file: file, value: value})
	}
	limit := int64(0)
	if m.Limit != nil {
		limit = *m.Limit
	}
	swap := m.Swap
	if swap == nil && limit == -1 {
		swap = m.Limit
	}
	if swap != nil && *swap != 0 {
		switch { // version 2 counts swap alone
		case *swap == -1:
			add("memory.swap.max", -1)
		case limit <= 0:
			return nil, errors.New("linux.resources.memory: swap is limited, so memory must be, too")
		case *swap < limit:
			return nil, fmt.Errorf("linux.resources.memory: memory and swap together (%d) are less than memory (%d)", *swap, limit)
		default:
			add("memory.swap.max", *swap-limit)
		}
	}
	if limit != 0 {
		add("memory.max", limit)
	}
	if m.Reservation != nil && *m.Reservation != 0 {
		add("memory.low", *m.Reservation)
	}
	return list, nil
}

func quotaV2(c *specs.LinuxCPU) string {
	if c.Quota == nil && c.Period == nil {
		return ""
	}
	quota, period := "max", ""
	if c.Quota != nil && *c.Quota > 0 {
		quota = text(*c.Quota)
	}
	if c.Period != nil && *c.Period != 0 {
		period = " " + text(*c.Period)
	}
	return quota + period
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
