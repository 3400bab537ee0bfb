//go:build linux && (amd64 || arm64)

package container

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Stats are what a container uses and used, in the form of runc's events.
type Stats struct {
	CPU     CPUStats                `json:"cpu"`
	CPUSet  CPUSetStats             `json:"cpuset"`
	Memory  MemoryStats             `json:"memory"`
	Pids    PidsStats               `json:"pids"`
	Blkio   BlkioStats              `json:"blkio"`
	Hugetlb map[string]HugetlbStats `json:"hugetlb"`
}

// CPUStats are times in nanoseconds.
type CPUStats struct {
	Usage struct {
		Total        uint64   `json:"total,omitempty"`
		Percpu       []uint64 `json:"percpu,omitempty"`
		PercpuKernel []uint64 `json:"percpu_kernel,omitempty"`
		PercpuUser   []uint64 `json:"percpu_user,omitempty"`
		Kernel       uint64   `json:"kernel"`
		User         uint64   `json:"user"`
	} `json:"usage"`
	Throttling struct {
		Periods          uint64 `json:"periods,omitempty"`
		ThrottledPeriods uint64 `json:"throttledPeriods,omitempty"`
		ThrottledTime    uint64 `json:"throttledTime,omitempty"`
	} `json:"throttling"`
	PSI *PSIStats `json:"psi,omitempty"`
}

// MemoryEntry is one kind of memory, in bytes.
type MemoryEntry struct {
	Limit   uint64 `json:"limit"`
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

// MemoryStats are in bytes; Raw is the kernel's memory.stat.
type MemoryStats struct {
	Cache     uint64            `json:"cache,omitempty"`
	Usage     MemoryEntry       `json:"usage"`
	Swap      MemoryEntry       `json:"swap"`
	Kernel    MemoryEntry       `json:"kernel"`
	KernelTCP MemoryEntry       `json:"kernelTCP"`
	Raw       map[string]uint64 `json:"raw,omitempty"`
	PSI       *PSIStats         `json:"psi,omitempty"`
}

// PidsStats count processes; Limit is 0 if there is none.
type PidsStats struct {
	Current uint64 `json:"current,omitempty"`
	Limit   uint64 `json:"limit,omitempty"`
}

// BlkioStats count I/O by device.
type BlkioStats struct {
	Bytes []BlkioEntry `json:"ioServiceBytesRecursive,omitempty"`
	Count []BlkioEntry `json:"ioServicedRecursive,omitempty"`
	PSI   *PSIStats    `json:"psi,omitempty"`
}

// BlkioEntry is a counter of one device and operation.
type BlkioEntry struct {
	Major uint64 `json:"major,omitempty"`
	Minor uint64 `json:"minor,omitempty"`
	Op    string `json:"op,omitempty"`
	Value uint64 `json:"value,omitempty"`
}

// Stats reads the counters of a container that hasn't ended.
func (c *Container) Stats() (*Stats, error) {
	if _, err := c.in("read statistics of", Created, Running, Paused); err != nil {
		return nil, err
	}
	r, s := &counters{g: c.Groups}, &Stats{}
	r.all(s)
	return s, r.err
}

// OOMKills counts processes that the kernel killed for want of memory.
func (c *Container) OOMKills() (uint64, error) {
	r := &counters{g: c.Groups}
	file := "memory.oom_control"
	if c.Groups.V2 != "" {
		file = "memory.events"
	}
	n := r.table("memory", file)["oom_kill"]
	return n, r.err
}

// counters reads control files. What the kernel doesn't count is 0.
type counters struct {
	g   groups
	err error
}

func (r *counters) read(controller, file string) string {
	dir := r.g.dir(controller)
	if dir == "" {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.err = errors.Join(r.err, fmt.Errorf("read statistics: %w", err))
	}
	return strings.TrimSpace(string(b))
}

// unlimited is how a limit that isn't set is told.
const unlimited = ^uint64(0)

func (r *counters) number(controller, file string) uint64 {
	return r.parse(file, r.read(controller, file))
}

func (r *counters) parse(file, text string) uint64 {
	switch text {
	case "":
		return 0
	case "max":
		return unlimited
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		r.err = errors.Join(r.err, fmt.Errorf("read statistics: %s: %w", file, err))
	}
	return n
}

// table reads lines of a name and a number.
func (r *counters) table(controller, file string) map[string]uint64 {
	t := map[string]uint64{}
	for line := range strings.Lines(r.read(controller, file)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			t[name] = r.parse(file, value)
		}
	}
	return t
}

// all reads what there is.
func (r *counters) all(s *Stats) {
	if r.g.V2 != "" {
		r.v2(s)
	} else {
		r.v1(s)
	}
	s.CPUSet, s.Hugetlb = r.cpuset(), r.hugetlb()
	s.CPU.PSI, s.Memory.PSI, s.Blkio.PSI = r.pressure("cpu"), r.pressure("memory"), r.pressure("io")
}

func (r *counters) v1(s *Stats) {
	s.CPU.Usage.Total = r.number("cpuacct", "cpuacct.usage")
	for _, f := range strings.Fields(r.read("cpuacct", "cpuacct.usage_percpu")) {
		s.CPU.Usage.Percpu = append(s.CPU.Usage.Percpu, r.parse("cpuacct.usage_percpu", f))
	}
	r.percpu(s)
	const tick = 10_000_000 // USER_HZ is 100
	stat := r.table("cpuacct", "cpuacct.stat")
	s.CPU.Usage.User, s.CPU.Usage.Kernel = stat["user"]*tick, stat["system"]*tick
	stat = r.table("cpu", "cpu.stat")
	t := &s.CPU.Throttling
	t.Periods, t.ThrottledPeriods, t.ThrottledTime = stat["nr_periods"], stat["nr_throttled"], stat["throttled_time"]
	for prefix, e := range map[string]*MemoryEntry{"": &s.Memory.Usage, "memsw.": &s.Memory.Swap, "kmem.": &s.Memory.Kernel, "kmem.tcp.": &s.Memory.KernelTCP} {
		file := func(name string) uint64 { return r.number("memory", "memory."+prefix+name) }
		*e = MemoryEntry{Limit: file("limit_in_bytes"), Usage: file("usage_in_bytes"), Max: file("max_usage_in_bytes"), Failcnt: file("failcnt")}
	}
	s.Memory.Raw = r.table("memory", "memory.stat")
	s.Memory.Cache = s.Memory.Raw["cache"]
	r.pids(s)
	s.Blkio.Bytes = r.blkio("blkio.throttle.io_service_bytes")
	s.Blkio.Count = r.blkio("blkio.throttle.io_serviced")
}

// percpu reads a table of times by processor and kind.
func (r *counters) percpu(s *Stats) {
	const file = "cpuacct.usage_all"
	for line := range strings.Lines(r.read("cpuacct", file)) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] != "cpu" {
			s.CPU.Usage.PercpuUser = append(s.CPU.Usage.PercpuUser, r.parse(file, f[1]))
			s.CPU.Usage.PercpuKernel = append(s.CPU.Usage.PercpuKernel, r.parse(file, f[2]))
		}
	}
}

func (r *counters) pids(s *Stats) {
	s.Pids.Current = r.number("pids", "pids.current")
	if limit := r.number("pids", "pids.max"); limit != unlimited {
		s.Pids.Limit = limit
	}
}

// blkio reads lines such as "254:0 Read 4096".
func (r *counters) blkio(file string) (list []BlkioEntry) {
	scan := bufio.NewScanner(strings.NewReader(r.read("blkio", file)))
	for scan.Scan() {
		var e BlkioEntry
		if n, err := fmt.Sscanf(scan.Text(), "%d:%d %s %d", &e.Major, &e.Minor, &e.Op, &e.Value); err == nil && n == 4 {
			list = append(list, e)
		}
	}
	return list
}

func (r *counters) v2(s *Stats) {
	const micro = 1000
	stat := r.table("cpu", "cpu.stat")
	u, t := &s.CPU.Usage, &s.CPU.Throttling
	u.Total, u.User, u.Kernel = stat["usage_usec"]*micro, stat["user_usec"]*micro, stat["system_usec"]*micro
	t.Periods, t.ThrottledPeriods, t.ThrottledTime = stat["nr_periods"], stat["nr_throttled"], stat["throttled_usec"]*micro
	m := &s.Memory
	m.Usage = MemoryEntry{Limit: r.number("memory", "memory.max"), Usage: r.number("memory", "memory.current"), Max: r.number("memory", "memory.peak")}
	m.Swap = r.swapV2(m.Usage)
	m.Raw = r.table("memory", "memory.stat")
	m.Cache = m.Raw["file"]
	r.pids(s)
	scan := bufio.NewScanner(strings.NewReader(r.read("io", "io.stat")))
	for scan.Scan() {
		fields := strings.Fields(scan.Text())
		var e BlkioEntry
		if len(fields) == 0 {
			continue
		}
		if _, err := fmt.Sscanf(fields[0], "%d:%d", &e.Major, &e.Minor); err != nil {
			continue
		}
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			e.Value = r.parse("io.stat", value)
			switch name {
			case "rbytes", "wbytes":
				e.Op = map[byte]string{'r': "Read", 'w': "Write"}[name[0]]
				s.Blkio.Bytes = append(s.Blkio.Bytes, e)
			case "rios", "wios":
				e.Op = map[byte]string{'r': "Read", 'w': "Write"}[name[0]]
				s.Blkio.Count = append(s.Blkio.Count, e)
			}
		}
	}
}

// swapV2 counts memory and swap together, as version 1 does and runc tells it.
func (r *counters) swapV2(memory MemoryEntry) MemoryEntry {
	used := r.read("memory", "memory.swap.current")
	if used == "" {
		return MemoryEntry{} // the kernel doesn't count it
	}
	e := MemoryEntry{Limit: r.number("memory", "memory.swap.max"), Usage: r.parse("memory.swap.current", used) + memory.Usage}
	switch {
	case memory.Limit == unlimited:
		e.Limit = unlimited
	case e.Limit != unlimited:
		e.Limit += memory.Limit
	}
	return e
}
