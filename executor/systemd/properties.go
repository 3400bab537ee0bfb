//go:build linux && (amd64 || arm64)

package systemd

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func property(name string, value any) dbus.Property {
	return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
}

// properties describe the unit of a container.
func properties(u container.Unit) ([]dbus.Property, error) {
	io := "BlockIOAccounting"
	if u.V2 {
		io = "IOAccounting"
	}
	props := []dbus.Property{
		property("Description", u.Description), property("Slice", u.Slice), property("Delegate", true), property("PIDs", []uint32{uint32(u.Pid)}),
		property("MemoryAccounting", true), property("CPUAccounting", true), property("TasksAccounting", true), property(io, true),
		// It lives until its container's end, also while the machine is stopped.
		property("DefaultDependencies", false),
	}
	props = append(props, limits(u.V2, u.Resources)...)
	more, err := annotated(u.Annotations)
	return append(props, more...), err
}

// unlimited is systemd's infinity.
const unlimited = uint64(math.MaxUint64)

func size(n int64) uint64 {
	if n < 0 {
		return unlimited
	}
	return uint64(n)
}

// limits are those that systemd has properties for. All are written to the
// cgroup, too.
func limits(v2 bool, r *specs.LinuxResources) (props []dbus.Property) {
	if r == nil {
		return nil
	}
	add := func(name string, value any) { props = append(props, property(name, value)) }
	if m := r.Memory; m != nil {
		name := "MemoryLimit"
		if v2 {
			name = "MemoryMax"
		}
		if m.Limit != nil && *m.Limit != 0 {
			add(name, size(*m.Limit))
		}
		if v2 && m.Reservation != nil && *m.Reservation != 0 {
			add("MemoryLow", size(*m.Reservation))
		}
		if v2 && m.Swap != nil && *m.Swap == -1 {
			add("MemorySwapMax", unlimited)
		} else if v2 && m.Swap != nil && m.Limit != nil && *m.Limit > 0 && *m.Swap >= *m.Limit {
			add("MemorySwapMax", uint64(*m.Swap-*m.Limit)) // version 2 counts swap alone
		}
	}
	if c := r.CPU; c != nil {
		props = append(props, processor(v2, c)...)
	}
	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit != 0 {
		add("TasksMax", size(*r.Pids.Limit))
	}
	return props
}

func processor(v2 bool, c *specs.LinuxCPU) (props []dbus.Property) {
	if c.Shares != nil && *c.Shares != 0 {
		if v2 {
			shares := min(max(*c.Shares, 2), 262144)
			props = append(props, property("CPUWeight", 1+(shares-2)*9999/262142))
		} else {
			props = append(props, property("CPUShares", *c.Shares))
		}
	}
	period := uint64(100_000)
	if c.Period != nil && *c.Period != 0 {
		period = *c.Period
		if v2 {
			props = append(props, property("CPUQuotaPeriodUSec", period))
		}
	}
	if c.Quota != nil && *c.Quota != 0 {
		perSecond := unlimited
		if *c.Quota > 0 {
			// Systemd counts in hundredths of a processor; not less than asked for.
			const step = 10_000
			perSecond = (uint64(*c.Quota)*1_000_000/period + step - 1) / step * step
		}
		props = append(props, property("CPUQuotaPerSecUSec", perSecond))
	}
	return props
}

var propertyName = regexp.MustCompile(`^[A-Za-z]{3,}$`)

// annotated are the properties that a spec's annotations ask for, such as
// "org.systemd.property.TimeoutStopUSec": "uint64 1234".
func annotated(annotations map[string]string) (props []dbus.Property, err error) {
	const prefix = "org.systemd.property."
	for key, text := range annotations {
		name, ok := strings.CutPrefix(key, prefix)
		if !ok {
			continue
		}
		if !propertyName.MatchString(name) {
			return nil, fmt.Errorf("annotation %s: %q is not the name of a property of systemd", key, name)
		}
		value, err := godbus.ParseVariant(text, godbus.Signature{})
		if err != nil {
			return nil, fmt.Errorf("annotation %s: %q is not a value: %w", key, text, err)
		}
		props = append(props, dbus.Property{Name: name, Value: value})
	}
	slices.SortFunc(props, func(a, b dbus.Property) int { return strings.Compare(a.Name, b.Name) })
	return props, nil
}
