//go:build linux && (amd64 || arm64)

package container

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Whatever config.json holds, it is refused or can be used without a panic,
// and no limit is set in a file outside the container's cgroup.
func FuzzSpec(f *testing.F) {
	example, err := json.Marshal(Example())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	for _, s := range []string{
		`{}`, `null`, `{"ociVersion":"1.2.0","linux":{},"root":{"path":"/"},"process":{"args":["x"],"cwd":"/"}}`,
		`{"ociVersion":"1.0","root":{"path":"r"},"process":{"args":["x"],"cwd":"/","env":["A\u0000"],"capabilities":{"bounding":["CAP_NOT"]}},"linux":{"namespaces":[{"type":"mount"}],"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":9,"op":"SCMP_CMP_EQ"}]}]}}}`,
		`{"ociVersion":"1.0","root":{"path":"r"},"process":{"args":["x"],"cwd":"/"},"linux":{"namespaces":[{"type":"mount"}],"resources":{"unified":{"../../x":"1"},"memory":{"limit":-1,"swap":5},"cpu":{"quota":1,"shares":1},"hugepageLimits":[{"pageSize":"../2MB","limit":1}],"blockIO":{"weight":10,"throttleReadBpsDevice":[{"major":1,"minor":2,"rate":3}]}}}`,
		`{"ociVersion":"1.0","root":{"path":"r"},"process":{"args":["x"],"cwd":"/"},"linux":{"namespaces":[{"type":"mount"}],"resources":{"hugepageLimits":[{"pageSize":"../2MB","limit":1}]}}}`,
		`{"ociVersion":"1.0","root":{"path":"r"},"process":{"args":["x"],"cwd":"/"},"linux":{"namespaces":[{"type":"mount"}],"resources":{"unified":{"..":"1"}}}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSpec(b)
		if err != nil {
			return
		}
		filter(s) //nolint:errcheck // that it returns is all
		if s.Linux.Resources == nil {
			return
		}
		for _, g := range []groups{{V2: "/none"}, {V1: map[string]string{"cpu,cpuacct": "/none", "memory": "/none", "blkio": "/none"}}} {
			list, err := g.settings(s.Linux.Resources)
			if err != nil {
				continue
			}
			for _, l := range list {
				for s := &l; s != nil; s = s.fallback {
					if strings.Contains(s.file, "/") || s.file == ".." {
						t.Errorf("limit %+v is set in another directory", *s)
					}
				}
			}
		}
	})
}

// What control files and /proc/self/cgroup hold is read or refused.
func FuzzControlFiles(f *testing.F) {
	f.Add("usage_usec 5\nuser_usec x\n", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\n254:0 Read 4096\nTotal 5\n", "12:cpu,cpuacct:/a\n0::/b\n1:name=systemd:/c:d\n")
	f.Add("max", "8:0", "::")
	f.Add("18446744073709551616", "a:b c=d", ":")
	f.Fuzz(func(t *testing.T, table, io, own string) {
		dir := t.TempDir()
		for name, text := range map[string]string{
			"cpu.stat": table, "memory.stat": table, "memory.max": table, "pids.max": table, "cpuacct.stat": table, "cpuacct.usage_percpu": table,
			"io.stat": io, "blkio.throttle.io_service_bytes": io, "blkio.throttle.io_serviced": io, "own": own,
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		two := &counters{g: groups{V2: dir}}
		two.v2(&Stats{})
		one := &counters{g: groups{V1: map[string]string{"cpu": dir, "cpuacct": dir, "memory": dir, "pids": dir, "blkio": dir}}}
		one.v1(&Stats{})
		if _, err := ownCgroups(filepath.Join(dir, "own")); err != nil {
			t.Error(err)
		}
	})
}
