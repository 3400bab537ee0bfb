//go:build linux && (amd64 || arm64)

package container

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the kernel counts on version 2 is told as runc tells it.
func TestStatsV2(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"cpu.stat":     "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 7\nnr_throttled 1\nthrottled_usec 4\n",
		"cpu.pressure": "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n", "memory.pressure": "",
		"cpuset.cpus.effective": "0-2,5\n", "cpuset.mems.effective": "0\n", "memory.current": "10\n", "memory.peak": "20\n", "memory.max": "100\n",
		"memory.stat": "file 3\n", "pids.current": "2\n", "pids.max": "9\n", "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n",
		"memory.swap.current": "5\n", "memory.swap.max": "7\n", "hugetlb.2MB.current": "4096\n", "hugetlb.2MB.events": "max 6\n", "hugetlb.2MB.rsvd.current": "1\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, s := &counters{g: groups{V2: dir}}, &Stats{}
	r.all(s)
	if r.err != nil {
		t.Fatal(r.err)
	}
	got, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"cpu":{"usage":{"total":5000,"kernel":2000,"user":3000},"throttling":{"periods":7,"throttledPeriods":1,"throttledTime":4000},` +
		`"psi":{"some":{"avg10":1.5,"avg60":0.25,"avg300":0,"total":77},"full":{"avg10":0,"avg60":0,"avg300":0,"total":5}}},` +
		`"cpuset":{"cpus":[0,1,2,5],"cpu_exclusive":0,"mems":[0],"mem_hardwall":0,"mem_exclusive":0,"memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"memory_pressure":0,"sched_load_balance":0,"sched_relax_domain_level":0},` +
		`"memory":{"cache":3,"usage":{"limit":100,"usage":10,"max":20,"failcnt":0},"swap":{"limit":107,"usage":15,"failcnt":0},"kernel":{"limit":0,"failcnt":0},"kernelTCP":{"limit":0,"failcnt":0},"raw":{"file":3},` +
		`"psi":{"some":{"avg10":0,"avg60":0,"avg300":0,"total":0},"full":{"avg10":0,"avg60":0,"avg300":0,"total":0}}},` +
		`"pids":{"current":2,"limit":9},"blkio":{"ioServiceBytesRecursive":[{"major":8,"op":"Read","value":1},{"major":8,"op":"Write","value":2}],` +
		`"ioServicedRecursive":[{"major":8,"op":"Read","value":3},{"major":8,"op":"Write","value":4}]},"hugetlb":{"2MB":{"usage":4096,"failcnt":6}}}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// Before Linux 5.19 there is no peak: it is left out, and all else is told.
	if err := os.Remove(filepath.Join(dir, "memory.peak")); err != nil {
		t.Fatal(err)
	}
	r, s = &counters{g: groups{V2: dir}}, &Stats{}
	r.all(s)
	got, err = json.Marshal(s)
	if without := strings.Replace(want, `"max":20,`, "", 1); r.err != nil || err != nil || string(got) != without {
		t.Errorf("without a peak: %v %v\ngot  %s\nwant %s", r.err, err, got, without)
	}
}

// A number that isn't one is an error that names the file.
func TestStatsOfBrokenFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cpuset.cpus.effective"), []byte("0-x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &counters{g: groups{V2: dir}}
	if r.all(&Stats{}); r.err == nil {
		t.Error("no error")
	}
}

// Memory and swap together have no limit if one of them has none.
func TestSwapV2(t *testing.T) {
	for _, tc := range []struct {
		memory, swap string
		want         uint64
	}{{"100", "7", 107}, {"max", "7", unlimited}, {"100", "max", unlimited}, {"max", "max", unlimited}} {
		r, s := &counters{g: groups{V2: fakeGroup(t, map[string]string{"memory.max": tc.memory, "memory.swap.max": tc.swap, "memory.swap.current": "0"})}}, &Stats{}
		if r.v2(s); r.err != nil || s.Memory.Swap.Limit != tc.want {
			t.Errorf("memory %s, swap %s: %+v (%v), want %d", tc.memory, tc.swap, s.Memory.Swap, r.err, tc.want)
		}
	}
}
