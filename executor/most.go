package executor

import "cmp"

// Most is what a process gets at most, whatever its Resources say; zero values
// are no bound.
type Most struct {
	Memory int64   // bytes
	CPUs   float64 // processors that it can keep busy
	Pids   int64   // processes and threads at once
}

// defaultPeriod is the kernel's, in microseconds.
const defaultPeriod = 100_000

// leastQuota is the kernel's, in microseconds.
const leastQuota = 1000

// bound returns r with what m allows.
func (m Most) bound(r *Resources) *Resources {
	if m == (Most{}) {
		return r
	}
	var out Resources
	if r != nil {
		out = *r
	}
	out.Memory = lower(out.Memory, m.Memory)
	out.Pids = lower(out.Pids, m.Pids)
	if m.CPUs > 0 {
		out.CPUPeriod = cmp.Or(out.CPUPeriod, defaultPeriod)
		out.CPUQuota = lower(out.CPUQuota, max(leastQuota, int64(m.CPUs*float64(out.CPUPeriod))))
	}
	return &out
}

// lower is the lower of two limits, of which those that aren't positive are
// none.
func lower(limit, most int64) int64 {
	if most > 0 && (limit <= 0 || limit > most) {
		return most
	}
	return limit
}
