package executor

import "testing"

func TestMost(t *testing.T) {
	all := Most{Memory: 100, CPUs: 1.5, Pids: 7}
	for _, c := range []struct {
		most     Most
		in, want *Resources
	}{
		{Most{}, nil, nil},
		{all, nil, &Resources{Memory: 100, CPUPeriod: 100_000, CPUQuota: 150_000, Pids: 7}},
		{all, &Resources{Memory: 99, MemorySwap: 120, CPUPeriod: 20_000, CPUQuota: 10_000, CpusetCpus: "0", Pids: 6},
			&Resources{Memory: 99, MemorySwap: 120, CPUPeriod: 20_000, CPUQuota: 10_000, CpusetCpus: "0", Pids: 6}},
		{all, &Resources{Memory: -1, CPUPeriod: 20_000, CPUQuota: 40_000, CPUShares: 3}, &Resources{Memory: 100, CPUPeriod: 20_000, CPUQuota: 30_000, CPUShares: 3, Pids: 7}},
		{Most{CPUs: 0.001}, &Resources{Memory: 5}, &Resources{Memory: 5, CPUPeriod: 100_000, CPUQuota: 1000}},
		{Most{Pids: 2}, &Resources{CPUQuota: -1}, &Resources{CPUQuota: -1, Pids: 2}},
	} {
		got := c.most.bound(c.in)
		if (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
			t.Errorf("%+v of %+v: %+v, want %+v", c.most, c.in, got, c.want)
		}
	}
}
