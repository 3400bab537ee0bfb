//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
)

// memoryLimitFile is where a container reads its limit.
func memoryLimitFile(t *testing.T) string {
	t.Helper()
	tree, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if tree.V2 != "" {
		return "/sys/fs/cgroup/memory.max"
	}
	return "/sys/fs/cgroup/memory/memory.limit_in_bytes"
}

// compat: CTL-095
func TestOutOfMemory(t *testing.T) {
	const limit = 32 << 20
	each(t, allRuntimes, func(t *testing.T, e *executor) {
		p := process(t, "exec dd if=/dev/zero of=/dev/null bs=200M count=1")
		p.Resources = &Resources{Memory: limit, MemorySwap: limit}
		r := run(t, e, p)
		var exit *ExitError
		if !errors.As(r.err, &exit) || exit.Cause.Kind != CauseOOM || exit.Code != 137 || r.usage.OOMKills < 1 {
			t.Fatalf("error %v, usage %+v", r.err, r.usage)
		}
		if !strings.Contains(exit.Error(), "out of memory") || !strings.Contains(exit.Error(), "the limit is 32MiB") {
			t.Errorf("message %q", exit.Error())
		}
		least, most := int64(limit/2), int64(limit)
		if !cgrouptest.CountsPeak(t) {
			least, most = 0, 0 // it isn't known
		}
		if r.usage.MemoryPeak < least || r.usage.MemoryPeak > most {
			t.Errorf("peak is %d, want %d to %d", r.usage.MemoryPeak, least, most)
		}
	})
}

// A limit below what the set-up of a container takes must not harm this
// process, which shares memory with the child then.
func TestTinyMemoryLimit(t *testing.T) {
	e := newTest(t, Config{})
	for _, limit := range []int64{4096, 65536, 262144} {
		p := process(t, "exit 0")
		p.Resources = &Resources{Memory: limit, MemorySwap: limit}
		if r := run(t, e, p); r.err == nil {
			t.Logf("a shell ran in %d bytes", limit)
		}
	}
}

// The bounds of an executor hold for steps that ask for nothing, and what they
// are refused is the cause of their failure.
func TestMostProcesses(t *testing.T) {
	each(t, allRuntimes, func(t *testing.T, e *executor) {
		e.cfg.Most = Most{Pids: 20}
		r := run(t, e, process(t, "i=0; while [ $i -lt 100 ]; do sleep 1000 & i=$((i+1)); done"))
		var exit *ExitError
		if strings.HasSuffix(e.cfg.Binary, "crun") && r.usage.PidsPeak == 0 {
			t.Log("a kernel before 6.1 doesn't tell it of what crun removes")
			return
		}
		if !errors.As(r.err, &exit) || exit.Cause.Kind != CauseProcesses || !strings.Contains(exit.Error(), "20 at once; raise it (kilnd --step-pids)") {
			t.Errorf("error %v", r.err)
		}
		output(t, e, process(t, "for i in 1 2 3; do sleep 0 & done; wait"))
	})
}

func TestLimitsAreSeen(t *testing.T) {
	file := memoryLimitFile(t)
	cpuFiles, cpu := "cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us cpu/cpu.shares", "50000\n100000\n512"
	if strings.HasSuffix(file, "memory.max") {
		cpuFiles, cpu = "cpu.max cpu.weight", "50000 100000\n20"
	}
	observe(t, []observation{
		{name: "memory", script: "cat " + file, change: func(_ *testing.T, p *Process) { p.Resources = &Resources{Memory: 64 << 20} }, want: strconv.Itoa(64 << 20)},
		{name: "cpu", script: "cd /sys/fs/cgroup; cat " + cpuFiles, change: func(_ *testing.T, p *Process) {
			p.Resources = &Resources{CPUQuota: 50000, CPUPeriod: 100000, CPUShares: 512}
		}, want: cpu},
		{name: "cpuset", script: "while read k v; do if [ $k = Cpus_allowed_list: ]; then echo $v; fi; done < /proc/self/status", change: func(_ *testing.T, p *Process) {
			p.Resources = &Resources{CpusetCpus: "0"}
		}, want: "0"},
	})
}

// compat: LLB-036
func TestUsage(t *testing.T) {
	each(t, allRuntimes, func(t *testing.T, e *executor) {
		r := run(t, e, process(t, "dd if=/dev/zero of=/dev/null bs=8M count=20 2>/dev/null; sleep 0.01 & sleep 0.01 & wait"))
		if r.err != nil {
			t.Fatal(r.err)
		}
		least := int64(8 << 20)
		if !cgrouptest.CountsPeak(t) {
			least = 0
		}
		if u := r.usage; u.CPU <= 0 || u.MemoryPeak < least || least == 0 && u.MemoryPeak != 0 || u.OOMKills != 0 {
			t.Errorf("usage %+v", u)
		}
		if u := r.usage; u.PidsPeak != 0 && u.PidsPeak < 3 {
			t.Errorf("pids peak %d", u.PidsPeak)
		}
	})
}

// compat: LLB-025
func TestCgroupParent(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "cat /proc/self/cgroup")
		p.CgroupParent = "/kiln/test-parent"
		out := output(t, e, p)
		if !strings.Contains(out, "memory:/kiln/test-parent/") && !strings.Contains(out, "0::/") {
			t.Errorf("cgroups:\n%s", out)
		}
		p.ID, p.CgroupParent = newID(), ""
		if out := output(t, e, p); !strings.Contains(out, "memory:/kiln/test/") && !strings.Contains(out, "0::/") {
			t.Errorf("cgroups by default:\n%s", out)
		}
		if _, err := os.ReadDir(e.parents.dir); err != nil {
			t.Errorf("the parent isn't remembered: %v", err)
		}
	})
}
