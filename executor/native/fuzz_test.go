//go:build linux && (amd64 || arm64)

package native

import (
	"math/bits"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/launch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func FuzzMountOptions(f *testing.F) {
	f.Add("bind", "rbind,ro,nosuid,rnoexec,rslave,size=4k")
	f.Add("tmpfs", "ro,rw,noatime,strictatime,relatime,mode=755")
	f.Add("bind", "r,rr,rro,ratime,rnoatime,defaults,")
	f.Fuzz(func(t *testing.T, kind, options string) {
		o, err := parseMountOptions(kind, strings.Split(options, ","))
		if err == nil && (o.set&o.clear != 0 || o.setRec&o.clearRec != 0) {
			t.Errorf("an attribute is set and cleared: %+v", o)
		}
	})
}

func FuzzParseCPUs(f *testing.F) {
	for _, s := range []string{"0", "0-3,7", "3-1", "8191", "8192", "0-", "-1", "", "4294967296", "1-2-3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, list string) {
		mask, err := parseCPUs(list)
		n := 0
		for _, w := range mask {
			n += bits.OnesCount(uint(w))
		}
		if err == nil && n == 0 || len(mask) > maxCPU/bits.UintSize {
			t.Errorf("%d processors in %d words", n, len(mask))
		}
	})
}

// The program of a step is made of whatever a client sends.
func FuzzProgram(f *testing.F) {
	f.Add("sh", "A=b", "/work", "host", "/m/x", "d/e", uint32(0), uint32(0))
	f.Add("/bin/sh", "PATH=:/bin:", "", "", "m", "", uint32(1000), uint32(1<<32-1))
	f.Add("../x", "PATH", "/../..", "\x00", "/", "..", uint32(1<<32-1), uint32(1))
	f.Fuzz(func(t *testing.T, arg, env, cwd, hostname, dest, selector string, uid, gid uint32) {
		spec := &specs.Spec{
			Hostname: hostname, Root: &specs.Root{Readonly: uid%2 == 0},
			Process: &specs.Process{Args: []string{arg}, Env: []string{env}, Cwd: cwd, User: specs.User{UID: uid, GID: gid, AdditionalGids: []uint32{gid}}},
			Mounts:  []specs.Mount{{Destination: dest, Type: "tmpfs", Source: "x", Options: []string{selector}}},
			Linux:   &specs.Linux{MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{dest}},
		}
		c := &Container{Spec: spec, Root: 5, Netns: -1, Alive: 3, Stdio: [3]int{-1, 7, 7}, Binds: []Bind{{Dest: dest, Make: dest, FD: 4, Selector: selector}}, Cgroup: Cgroup{Dir: -1}}
		b := &builder{Program: new(launch.Program), c: c, spec: spec}
		if err := b.build(); err != nil {
			t.Error(err)
		}
	})
}

// Whatever numbers files have, no other one stays open.
func FuzzCloseBut(f *testing.F) {
	f.Add([]byte{3, 4, 5})
	f.Add([]byte{9, 3, 200, 9})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, fds []byte) {
		open := map[int]bool{}
		var needed []int
		for _, fd := range fds {
			if fd >= 3 {
				needed = append(needed, int(fd))
				open[int(fd)] = true
			}
		}
		closed := map[int]bool{}
		for _, r := range closeRanges(3, needed) {
			if r.first > r.last {
				t.Fatalf("%v: range %v", needed, r)
			}
			for fd := r.first; fd <= min(r.last, 300); fd++ {
				closed[int(fd)] = true
			}
		}
		for fd := 3; fd <= 300; fd++ {
			if closed[fd] == open[fd] {
				t.Errorf("%v: %d is closed: %v", needed, fd, closed[fd])
			}
		}
	})
}
