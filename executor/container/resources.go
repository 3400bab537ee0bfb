//go:build linux && (amd64 || arm64)

package container

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// CPUSetStats say where a container may run, and what version 1 knows beyond
// that.
type CPUSetStats struct {
	CPUs                  []uint16 `json:"cpus,omitempty"`
	CPUExclusive          uint64   `json:"cpu_exclusive"`
	Mems                  []uint16 `json:"mems,omitempty"`
	MemHardwall           uint64   `json:"mem_hardwall"`
	MemExclusive          uint64   `json:"mem_exclusive"`
	MemoryMigrate         uint64   `json:"memory_migrate"`
	MemorySpreadPage      uint64   `json:"memory_spread_page"`
	MemorySpreadSlab      uint64   `json:"memory_spread_slab"`
	MemoryPressure        uint64   `json:"memory_pressure"`
	SchedLoadBalance      uint64   `json:"sched_load_balance"`
	SchedRelaxDomainLevel int64    `json:"sched_relax_domain_level"`
}

// HugetlbStats are of one size of huge pages, in bytes.
type HugetlbStats struct {
	Usage   uint64 `json:"usage,omitempty"`
	Max     uint64 `json:"max,omitempty"`
	Failcnt uint64 `json:"failcnt"`
}

// PSIStats are how long processes waited for a resource, on version 2.
type PSIStats struct {
	Some PSIData `json:"some"`
	Full PSIData `json:"full"`
}

// PSIData are shares of time in percent over seconds, and a sum in
// microseconds.
type PSIData struct {
	Avg10  float64 `json:"avg10"`
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
	Total  uint64  `json:"total"`
}

func (r *counters) cpuset() (s CPUSetStats) {
	list := func(file string) []uint16 {
		text := r.read("cpuset", file)
		if text == "" {
			text = r.read("cpuset", strings.Replace(file, "cpuset.", "cpuset.effective_", 1))
		}
		return r.numbers(file, text)
	}
	if r.g.V2 != "" {
		s.CPUs = r.numbers("cpuset.cpus", r.read("cpuset", "cpuset.cpus.effective"))
		s.Mems = r.numbers("cpuset.mems", r.read("cpuset", "cpuset.mems.effective"))
		return s
	}
	s.CPUs, s.Mems = list("cpuset.cpus"), list("cpuset.mems")
	for file, n := range map[string]*uint64{
		"cpu_exclusive": &s.CPUExclusive, "mem_hardwall": &s.MemHardwall, "mem_exclusive": &s.MemExclusive, "memory_migrate": &s.MemoryMigrate,
		"memory_spread_page": &s.MemorySpreadPage, "memory_spread_slab": &s.MemorySpreadSlab, "memory_pressure": &s.MemoryPressure, "sched_load_balance": &s.SchedLoadBalance,
	} {
		*n = r.number("cpuset", "cpuset."+file)
	}
	// -1 is the machine's level.
	if text := r.read("cpuset", "cpuset.sched_relax_domain_level"); strings.HasPrefix(text, "-") {
		s.SchedRelaxDomainLevel = -int64(r.parse("cpuset.sched_relax_domain_level", text[1:]))
	} else {
		s.SchedRelaxDomainLevel = int64(r.parse("cpuset.sched_relax_domain_level", text))
	}
	return s
}

// numbers reads a list such as "0-2,5".
func (r *counters) numbers(file, text string) (list []uint16) {
	for part := range strings.SplitSeq(text, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		if part == "" {
			continue
		}
		for n := r.parse(file, first); n <= min(r.parse(file, last), 1<<16-1); n++ {
			list = append(list, uint16(n))
		}
	}
	return list
}

// hugetlb reads what the kernel has for each size of huge pages.
func (r *counters) hugetlb() map[string]HugetlbStats {
	list := map[string]HugetlbStats{}
	dir := r.g.dir("hugetlb")
	if dir == "" {
		return list
	}
	usage, most, failures := ".usage_in_bytes", ".max_usage_in_bytes", ".failcnt"
	if r.g.V2 != "" {
		usage, most, failures = ".current", "", ""
	}
	files, err := filepath.Glob(filepath.Join(dir, "hugetlb.*"+usage))
	if err != nil {
		r.err = err
	}
	for _, file := range files {
		size := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "hugetlb."), usage)
		if strings.HasSuffix(size, ".rsvd") {
			continue
		}
		h := HugetlbStats{Usage: r.number("hugetlb", filepath.Base(file))}
		if most != "" {
			h.Max, h.Failcnt = r.number("hugetlb", "hugetlb."+size+most), r.number("hugetlb", "hugetlb."+size+failures)
		} else {
			h.Failcnt = r.table("hugetlb", "hugetlb."+size+".events")["max"]
		}
		list[size] = h
	}
	return list
}

// pressure reads cpu.pressure and the like; nil if the kernel doesn't measure
// it, or not in version 1.
func (r *counters) pressure(controller string) *PSIStats {
	if r.g.V2 == "" {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(r.g.V2, controller+".pressure"))
	if err != nil {
		return nil // turned off on the kernel's command line: then even a read fails
	}
	var s PSIStats
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || !slices.Contains([]string{"some", "full"}, fields[0]) {
			continue
		}
		d := &s.Some
		if fields[0] == "full" {
			d = &s.Full
		}
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			if name == "total" {
				d.Total = r.parse(controller+".pressure", value)
				continue
			}
			n, err := strconv.ParseFloat(value, 64)
			if into := map[string]*float64{"avg10": &d.Avg10, "avg60": &d.Avg60, "avg300": &d.Avg300}[name]; into != nil && err == nil {
				*into = n
			}
		}
	}
	return &s
}
