package main

import (
	"fmt"
	"math"
	"strings"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/executor"
)

// leastMemory is what a container needs to be set up at all.
const leastMemory = 4 << 20

// parseMost reads what a step gets at most.
func (cfg *config) parseMost() (executor.Most, error) {
	m := executor.Most{CPUs: cfg.Kiln.StepCPUs, Pids: cfg.Kiln.StepPids}
	if v := cfg.Kiln.StepMemory; v != nil && v != "" {
		text := strings.TrimSpace(fmt.Sprint(v))
		n, err := units.RAMInBytes(text)
		if err != nil || n < 0 {
			return m, fmt.Errorf("kiln.stepMemory (--step-memory): %q is neither a number of bytes nor a size such as 4GB", text)
		}
		m.Memory = n
	}
	switch {
	case m.Memory > 0 && m.Memory < leastMemory:
		return m, fmt.Errorf("kiln.stepMemory (--step-memory): no step can run in %s; the least is %s", units.BytesSize(float64(m.Memory)), units.BytesSize(leastMemory))
	case m.CPUs < 0 || math.IsNaN(m.CPUs) || m.CPUs > 1<<20:
		return m, fmt.Errorf("kiln.stepCPUs (--step-cpus): %v is no number of processors", m.CPUs)
	case m.Pids < 0:
		return m, fmt.Errorf("kiln.stepPids (--step-pids): %d is negative", m.Pids)
	}
	return m, nil
}
