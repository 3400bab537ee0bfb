//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// settingsV2 fails for what version 1 has alone: such a limit would be none.
func settingsV2(r *specs.LinuxResources) (list []setting, err error) {
	if name := onlyV1(r); name != "" {
		return nil, fmt.Errorf("linux.resources.%s: cgroups of version 2, which this machine has, know no such limit", name)
	}
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
	list = append(list, ioV2(r.BlockIO)...)
	list = append(list, hugepages(r.HugepageLimits, "max")...)
	list = append(list, rdma(r.Rdma)...)
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
		// A kernel that doesn't count swap can't give any, nor limit it.
		none := file == "memory.swap.max" && n <= 0
		list = append(list, setting{controller: "memory", file: file, value: value, optional: none})
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

func ioV2(b *specs.LinuxBlockIO) (list []setting) {
	if b == nil {
		return nil
	}
	weigh := func(prefix string, w *uint16) {
		if w != nil && *w != 0 {
			// The old range of weights is 10-1000, the new one 1-10000.
			converted := 1 + (uint64(max(*w, 10))-10)*9999/990
			list = append(list, setting{controller: "io", file: "io.bfq.weight", value: prefix + text(*w), fallback: &setting{controller: "io", file: "io.weight", value: prefix + text(converted)}})
		}
	}
	weigh("", b.Weight)
	for _, d := range b.WeightDevice {
		weigh(fmt.Sprintf("%d:%d ", d.Major, d.Minor), d.Weight)
	}
	for _, t := range throttles(b) {
		for _, d := range t.devices {
			list = append(list, setting{controller: "io", file: "io.max", value: fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, t.v2, d.Rate)})
		}
	}
	return list
}

// onlyV1 names a limit of r that version 2 doesn't have, or "".
func onlyV1(r *specs.LinuxResources) string {
	if m := r.Memory; m != nil {
		switch {
		case m.Swappiness != nil:
			return "memory.swappiness"
		case m.DisableOOMKiller != nil && *m.DisableOOMKiller:
			return "memory.disableOOMKiller"
		case m.KernelTCP != nil && *m.KernelTCP != 0:
			return "memory.kernelTCP"
		}
	}
	if c := r.CPU; c != nil {
		switch {
		case c.RealtimeRuntime != nil && *c.RealtimeRuntime != 0:
			return "cpu.realtimeRuntime"
		case c.RealtimePeriod != nil && *c.RealtimePeriod != 0:
			return "cpu.realtimePeriod"
		}
	}
	if n := r.Network; n != nil && (n.ClassID != nil && *n.ClassID != 0 || len(n.Priorities) > 0) {
		return "network"
	}
	if b := r.BlockIO; b != nil {
		leaf := func(w *uint16) bool { return w != nil && *w != 0 }
		if leaf(b.LeafWeight) || slices.ContainsFunc(b.WeightDevice, func(d specs.LinuxWeightDevice) bool { return leaf(d.LeafWeight) }) {
			return "blockIO.leafWeight"
		}
	}
	return ""
}
