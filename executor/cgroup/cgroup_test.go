package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
	"golang.org/x/sys/unix"
)

func TestParseMounts(t *testing.T) {
	for name, tc := range map[string]struct {
		mounts string
		want   *Tree
	}{
		"version 2": {"25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n", &Tree{V2: "/sys/fs/cgroup"}},
		"version 1": {`33 32 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
34 32 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 32 0:32 /docker/x /sys/fs/cgroup/memory rw shared:1 master:2 - cgroup cgroup rw,memory
36 32 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices
`, &Tree{V1: []Hierarchy{
			{"/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct", []string{"cpu", "cpuacct"}},
			{"/sys/fs/cgroup/memory", "memory", []string{"memory"}},
			{"/sys/fs/cgroup/devices", "devices", []string{"devices"}},
		}, Bare: []string{"/sys/fs/cgroup/systemd"}}},
		"hybrid": {"1 2 0:3 / /a\\040b/memory rw - cgroup cgroup rw,memory\n4 5 0:6 / /a/unified rw - cgroup2 cgroup2 rw\n", &Tree{V1: []Hierarchy{{"/a b/memory", "memory", []string{"memory"}}}, Bare: []string{"/a/unified"}}},
		// As criu mounts them while it works.
		"elsewhere, too": {`30 1 0:30 / /tmp/yard/systemd rw - cgroup cgroup rw,name=systemd
31 1 0:31 / /tmp/yard/memory rw - cgroup cgroup rw,memory
32 1 0:32 / /tmp/yard/two rw - cgroup2 cgroup2 rw
33 1 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
34 1 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
35 1 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`, &Tree{V1: []Hierarchy{{"/sys/fs/cgroup/memory", "memory", []string{"memory"}}}, Bare: []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"}}},
		"version 2 beside useless version 1": {"1 2 0:3 / /net rw - cgroup cgroup rw,net_cls\n4 5 0:6 / /two rw - cgroup2 cgroup2 rw\n", &Tree{V2: "/two"}},
		"none":                               {"1 2 0:3 / / rw - ext4 /dev/vda rw\nnonsense\n", nil},
	} {
		got, err := parseMounts(strings.NewReader(tc.mounts))
		if (err != nil) != (tc.want == nil) || tc.want != nil && !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("1 2 0:3 / /a rw - cgroup cgroup rw,memory\n")
	f.Add("1 2 0:3 / /a\\040b\\134 rw shared:1 - cgroup2 none rw\n - - \n")
	f.Add("1 2 0:3 / /" + strings.Repeat("lowerdir+=/long/path,", 8000) + " rw - overlay overlay rw\n4 5 0:6 / /two rw - cgroup2 cgroup2 rw\n")
	f.Fuzz(func(t *testing.T, s string) {
		if tree, err := parseMounts(strings.NewReader(s)); err == nil && (tree.V2 == "") == (len(tree.V1) == 0) {
			t.Errorf("%+v", tree)
		}
	})
}

func TestLimitSettings(t *testing.T) {
	all := dir{path: "d", h: &Hierarchy{Controllers: []string{"memory", "cpu", "cpuset", "pids"}}}
	for _, tc := range []struct {
		l      Limits
		v1, v2 []setting
	}{
		{Limits{}, nil, nil},
		{Limits{Memory: 100, MemorySwap: 150}, []setting{{"d", "memory.limit_in_bytes", "100"}, {"d", "memory.memsw.limit_in_bytes", "150"}}, []setting{{"d", "memory.max", "100"}, {"d", "memory.swap.max", "50"}}},
		{Limits{Memory: 100, MemorySwap: -1}, []setting{{"d", "memory.limit_in_bytes", "100"}, {"d", "memory.memsw.limit_in_bytes", "-1"}}, []setting{{"d", "memory.max", "100"}, {"d", "memory.swap.max", "max"}}},
		{Limits{Memory: -1}, []setting{{"d", "memory.limit_in_bytes", "-1"}}, []setting{{"d", "memory.max", "max"}}},
		{Limits{CPUShares: 1024}, []setting{{"d", "cpu.shares", "1024"}}, []setting{{"d", "cpu.weight", "39"}}},
		{Limits{CPUShares: 1 << 20}, []setting{{"d", "cpu.shares", "1048576"}}, []setting{{"d", "cpu.weight", "10000"}}},
		{Limits{CPUQuota: 5000}, []setting{{"d", "cpu.cfs_quota_us", "5000"}}, []setting{{"d", "cpu.max", "5000 100000"}}},
		{Limits{CPUQuota: -1, CPUPeriod: 1000}, []setting{{"d", "cpu.cfs_period_us", "1000"}, {"d", "cpu.cfs_quota_us", "-1"}}, []setting{{"d", "cpu.max", "max 1000"}}},
		{Limits{CpusetCpus: "0-1", CpusetMems: "0"}, []setting{{"d", "cpuset.cpus", "0-1"}, {"d", "cpuset.mems", "0"}}, []setting{{"d", "cpuset.cpus", "0-1"}, {"d", "cpuset.mems", "0"}}},
		{Limits{Pids: 9}, []setting{{"d", "pids.max", "9"}}, []setting{{"d", "pids.max", "9"}}},
	} {
		if got := tc.l.v1(all); !slices.Equal(got, tc.v1) {
			t.Errorf("%+v on version 1: %v", tc.l, got)
		}
		if got := tc.l.v2("d"); !slices.Equal(got, tc.v2) {
			t.Errorf("%+v on version 2: %v", tc.l, got)
		}
	}
}

// fakeV2 is a directory that looks like a version 2 group.
func fakeV2(t *testing.T, files map[string]string) string {
	t.Helper()
	path := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(path, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestUsageV2(t *testing.T) {
	path := fakeV2(t, map[string]string{
		"cpu.stat": "usage_usec 1500\nuser_usec 1\n", "memory.peak": "4096\n", "memory.events": "low 0\noom 3\noom_kill 2\n", "pids.peak": "7\n",
		"memory.max": "8192\n",
	})
	u, err := (&Group{m: &Manager{tree: &Tree{V2: filepath.Dir(path)}}, dirs: []dir{{path: path}}}).Usage()
	if want := (Usage{CPU: 1500000, MemoryPeak: 4096, PidsPeak: 7, OOMKills: 2, OOMLimit: 8192}); err != nil || u != want {
		t.Errorf("%+v %v", u, err)
	}
	// Older kernels count less: Linux 5.15 no peaks. That memory ran out is known.
	path = fakeV2(t, map[string]string{"cpu.stat": "usage_usec 1\n", "memory.events": "oom_kill 1\n", "memory.max": "8192\n"})
	u, err = (&Group{m: &Manager{tree: &Tree{V2: filepath.Dir(path)}}, dirs: []dir{{path: path}}}).Usage()
	if want := (Usage{CPU: 1000, OOMKills: 1, OOMLimit: 8192}); err != nil || u != want {
		t.Errorf("%+v %v", u, err)
	}
	if _, err = (&Group{dirs: []dir{{path: fakeV2(t, map[string]string{"memory.peak": "nonsense\n"})}}}).Usage(); err == nil {
		t.Error("nonsense was read as a number")
	}
}

func TestEnableControllers(t *testing.T) {
	path := fakeV2(t, map[string]string{"cgroup.controllers": "cpuset cpu io memory hugetlb pids\n", "cgroup.subtree_control": "cpu memory pids io\n"})
	if err := enableControllers(path, true); err != nil {
		t.Fatal(err)
	}
	// The fake file keeps what was written over its start.
	if b, err := os.ReadFile(filepath.Join(path, "cgroup.subtree_control")); err != nil || !strings.HasPrefix(string(b), "+cpuset") {
		t.Errorf("%q %v", b, err)
	}
}

// testTree is the machine's tree, or the version 2 hierarchy beside it.
func testTree(t *testing.T, v2 bool) *Tree {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes cgroups")
	}
	tree, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if v2 && tree.V2 == "" {
		return &Tree{V2: cgrouptest.V2(t)}
	}
	return tree
}

// log makes what a manager logs fail the test.
type log struct{ t *testing.T }

func (l log) Write(p []byte) (int, error) {
	l.t.Errorf("the manager logged: %s", p)
	return len(p), nil
}

func newManager(t *testing.T, tree *Tree, others ...string) *Manager {
	t.Helper()
	m, err := New(Config{Tree: tree, Parent: "/kiln/cgroup-test", Prefix: fmt.Sprintf("p%d", os.Getpid()), Log: slog.New(slog.NewTextHandler(log{t}, nil))}, others)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// start runs a shell script in g.
func start(t *testing.T, g *Group, script string) (*exec.Cmd, io.Reader) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "for f in $JOIN; do echo 0 > /proc/$DAEMON/fd/$f; done; "+script)
	var join []string
	for _, fd := range g.JoinFDs() {
		join = append(join, fmt.Sprint(fd))
	}
	cmd.Env = append(os.Environ(), "JOIN="+strings.Join(join, " "), fmt.Sprintf("DAEMON=%d", os.Getpid()))
	if fd := g.CloneFD(); fd >= 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

func TestGroups(t *testing.T) {
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, testTree(t, v2))
			for i, spec := range []Spec{{ID: "a"}, {ID: "b", AllDevices: true}, {ID: "c", Parent: "/kiln/cgroup-test/other"}} {
				g, err := m.Take(context.Background(), spec)
				if err != nil {
					t.Fatal(err)
				}
				// The first may be denied, the second not.
				cmd, out := start(t, g, "cat /proc/self/cgroup; mknod $0.dev c 1 11; exec 3< $0.dev && echo allowed || echo denied; echo x > /dev/null && echo fine")
				text, err := io.ReadAll(out)
				if err != nil {
					t.Fatal(err)
				}
				cmd.Wait() //nolint:errcheck // the redirection fails in some shells
				if !strings.Contains(string(text), "/kiln/cgroup-test/") || spec.Parent != "" && !strings.Contains(string(text), spec.Parent) {
					t.Errorf("group %d is not below its parent:\n%s", i, text)
				}
				if strings.Contains(string(text), "allowed") != spec.AllDevices {
					t.Errorf("group %d, device:\n%s", i, text)
				}
				if _, err := g.Usage(); err != nil {
					t.Error(err)
				}
				g.Release()
			}
			os.Remove("/bin/sh.dev")
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if left := m.Leftovers(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// What a runtime makes inside a group may go, and what it has counted stays.
func TestAround(t *testing.T) {
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, testTree(t, v2))
			a, err := m.Around(Spec{ID: "around", Limits: Limits{}})
			if err != nil {
				t.Fatal(err)
			}
			if inside, outside := a.Inside.Path(), a.Path(); filepath.Dir(inside) != outside {
				t.Errorf("%s isn't in %s", inside, outside)
			}
			for _, dir := range append(a.Inside.Dirs(), m.roots(a.Inside.Path())...) {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.Inside.Remove(); err != nil {
				t.Fatal(err)
			}
			if u, err := a.Usage(); err != nil || u.OOMKills != 0 {
				t.Errorf("usage %+v, %v", u, err)
			}
			if err := a.Remove(); err != nil {
				t.Error(err)
			}
			for _, dir := range m.roots(a.Path()) {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestKill(t *testing.T) {
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, testTree(t, v2))
			g, err := m.Take(context.Background(), Spec{ID: "kill"})
			if err != nil {
				t.Fatal(err)
			}
			cmd, out := start(t, g, "echo ready; for i in 1 2 3 4 5 6 7 8 9; do (setsid sleep 1000 &); done; wait; sleep 1000")
			if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
				t.Fatal(err)
			}
			if err := g.Kill(); err != nil {
				t.Error(err)
			}
			for _, dir := range g.Dirs() {
				if b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")); err != nil || len(b) > 0 {
					t.Errorf("%s has processes %q (%v)", dir, b, err)
				}
			}
			cmd.Wait() //nolint:errcheck // killed
			g.Release()
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A new manager removes what one that crashed has left, and leaves others
// alone.
func TestSweep(t *testing.T) {
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			tree := testTree(t, v2)
			m := newManager(t, tree)
			var cmds []*exec.Cmd
			var dirs []string
			for _, spec := range []Spec{{ID: "own"}, {ID: "other", Parent: "/kiln/cgroup-test/other"}} {
				g, err := m.Take(context.Background(), spec)
				if err != nil {
					t.Fatal(err)
				}
				cmd, out := start(t, g, "echo ready; sleep 1000 & sleep 1000")
				if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
					t.Fatal(err)
				}
				for _, d := range g.Dirs() {
					dirs = append(dirs, d)
					if v2 { // as a container with a cgroup namespace may do
						if err := os.Mkdir(filepath.Join(d, "inner"), 0o755); err != nil {
							t.Fatal(err)
						}
					}
				}
				cmds = append(cmds, cmd)
			}
			roots := m.roots("/kiln/cgroup-test")
			foreign := filepath.Join(roots[len(roots)-1], "foreign")
			if err := os.Mkdir(foreign, 0o755); err != nil {
				t.Fatal(err)
			}
			defer unix.Rmdir(filepath.Dir(foreign))
			defer unix.Rmdir(foreign)
			m.stop() // the first manager does no more
			m.filler.Wait()
			successor := newManager(t, tree, "/kiln/cgroup-test/other")
			for _, cmd := range cmds {
				if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
					t.Errorf("a left process ended with %v", err)
				}
			}
			for _, d := range dirs {
				if b, err := os.ReadFile(filepath.Join(d, "cgroup.procs")); err == nil && len(b) > 0 {
					t.Errorf("%s is left with processes %s", d, b)
				}
			}
			if _, err := os.Stat(foreign); err != nil {
				t.Errorf("another's group is gone: %v", err)
			}
			if err := successor.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A runtime that outlived its daemon removes its groups while the next daemon
// sweeps them.
func TestSweepBesideSomebodyElse(t *testing.T) {
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, testTree(t, v2))
			defer m.Close()
			for _, root := range m.roots("/kiln") {
				// Beside what other tests make and remove.
				path := fmt.Sprintf("%s-sweep-%d", root, os.Getpid())
				for range 300 {
					if err := os.Mkdir(path, 0o755); err != nil {
						t.Fatal(err)
					}
					removed := make(chan error)
					go func() { removed <- unix.Rmdir(path) }()
					err := RemoveTree(path)
					if other := <-removed; other != nil && other != unix.ENOENT {
						t.Fatal(other)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

// Two daemons have one parent. Whenever one ends it removes that if it is empty;
// the other makes it again, and from when it has reserved a group on it stays.
func TestParentRemovedMeanwhile(t *testing.T) {
	const parent = "/kiln/cgroup-test/two"
	for name, v2 := range map[string]bool{"machine": false, "version 2": true} {
		t.Run(name, func(t *testing.T) {
			tree := testTree(t, v2)
			m := newManager(t, tree)
			m.stop() // it makes groups ahead
			m.filler.Wait()
			var removals map[string]int
			m.mkdir = func(path string, mode fs.FileMode) error {
				if removals[path]++; removals[path] <= 3 {
					if err := unix.Rmdir(filepath.Dir(path)); err != nil {
						t.Errorf("remove parent: %v", err)
					}
				}
				return os.Mkdir(path, mode)
			}
			for _, reserve := range []func(Spec) (interface{ Remove() error }, error){
				func(s Spec) (interface{ Remove() error }, error) { return m.Reserve(s) },
				func(s Spec) (interface{ Remove() error }, error) { return m.Around(s) },
			} {
				removals = map[string]int{}
				g, err := reserve(Spec{ID: "reserved", Parent: parent})
				if err != nil {
					t.Fatal(err)
				}
				for _, dir := range m.roots(parent) {
					if err := unix.Rmdir(dir); err == nil {
						t.Errorf("%s is removed with a group in it", dir)
					}
				}
				if err := g.Remove(); err != nil {
					t.Error(err)
				}
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			for _, dir := range m.roots(parent) {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
		})
	}
}

// A name that is taken stays with who has it.
func TestReserveTaken(t *testing.T) {
	m := newManager(t, testTree(t, false))
	defer m.Close()
	g, err := m.Reserve(Spec{ID: "taken"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Reserve(Spec{ID: "taken"}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("reserved twice: %v", err)
	}
	for _, dir := range g.Dirs() {
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	}
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// A group that can't be made is an error, and of one that can't be made
// completely nothing stays.
func TestTakeFails(t *testing.T) {
	m := newManager(t, testTree(t, false))
	spec := Spec{ID: "twice", AllDevices: true}
	first, err := m.Take(context.Background(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Take(context.Background(), spec); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a group that is there was taken: %v", err)
	}
	dirs := first.Dirs()
	if len(dirs) > 1 { // of the last hierarchy alone
		for _, dir := range dirs[:len(dirs)-1] {
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := m.Take(context.Background(), spec); !errors.Is(err, fs.ErrExist) {
			t.Errorf("a group was taken a part of which is there: %v", err)
		}
		for _, dir := range dirs[:len(dirs)-1] {
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left (%v)", dir, err)
			}
		}
	}
	first.Release()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestBadNames(t *testing.T) {
	m := newManager(t, testTree(t, false))
	defer m.Close()
	if g, err := m.Take(context.Background(), Spec{ID: "../x", AllDevices: true}); err == nil {
		g.Release()
		t.Error("a path was taken as a name")
	}
	if got := m.Existing(Spec{ID: "x", Parent: "../../up"}).Path(); !strings.HasPrefix(got, "/up/") {
		t.Errorf("parent leads out: %s", got)
	}
}

// The device program's meaning, by a plain evaluation of its instructions.
func TestDeviceProgram(t *testing.T) {
	const mknod, read, write = 1, 2, 4
	prog := deviceProgram(DefaultDevices)
	for _, tc := range []struct {
		kind, access, major, minor uint32
		allowed                    bool
	}{
		{2, read | write, 1, 3, true}, {2, read, 1, 5, true}, {2, mknod, 9, 9, true}, {1, mknod, 8, 0, true},
		{1, read, 8, 0, false}, {1, mknod | read, 8, 0, false}, {2, read, 1, 1, false}, {2, write, 136, 77, true}, {2, read, 10, 229, false}, {1, read, 1, 3, false},
	} {
		if got := evaluate(t, prog, tc.access<<16|tc.kind, tc.major, tc.minor); got != tc.allowed {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}

// evaluate runs the few instructions that device programs use.
func evaluate(t *testing.T, prog []insn, ctx ...uint32) bool {
	t.Helper()
	var r [11]uint64
	for pc := 0; pc < len(prog); pc++ {
		i := prog[pc]
		dst, src := i.reg&15, i.reg>>4
		switch i.op {
		case 0x61:
			r[dst] = uint64(ctx[i.off/4])
		case 0xbc:
			r[dst] = uint64(uint32(r[src]))
		case 0x54:
			r[dst] = uint64(uint32(r[dst]) & uint32(i.imm))
		case 0x74:
			r[dst] = uint64(uint32(r[dst]) >> i.imm)
		case 0xb7:
			r[dst] = uint64(i.imm)
		case 0x15:
			if r[dst] == uint64(i.imm) {
				pc += int(i.off)
			}
		case 0x55:
			if r[dst] != uint64(i.imm) {
				pc += int(i.off)
			}
		case 0x95:
			return r[0] == 1
		default:
			t.Fatalf("instruction %#x", i.op)
		}
	}
	t.Fatal("the program has no end")
	return false
}

// Of rules that contradict each other the first that matches counts, and one
// that denies does so for any part of what is asked for.
func TestDeviceProgramDenies(t *testing.T) {
	const mknod, read, write = 1, 2, 4
	prog := deviceProgram([]DeviceRule{
		{Deny: true, Major: 1, Minor: 3, Access: "w"}, {Major: 1, Minor: -1, Access: "rwm"}, {Deny: true, Any: true, Major: -1, Minor: -1, Access: "rwm"},
		{Block: true, Major: 8, Minor: 0, Access: "rwm"},
	})
	for _, tc := range []struct {
		kind, access, major, minor uint32
		allowed                    bool
	}{
		{2, read, 1, 3, true}, {2, write, 1, 3, false}, {2, read | write, 1, 3, false}, {2, read | write, 1, 5, true},
		{1, read, 8, 0, false}, {2, mknod, 5, 1, false},
	} {
		if got := evaluate(t, prog, tc.access<<16|tc.kind, tc.major, tc.minor); got != tc.allowed {
			t.Errorf("%+v: %v", tc, got)
		}
	}
}

// The kernel refuses instructions that can't be reached.
func TestLoadDevicePrograms(t *testing.T) {
	all := DeviceRule{Any: true, Major: -1, Minor: -1, Access: "rwm"}
	none := all
	none.Deny = true
	for name, rules := range map[string][]DeviceRule{
		"default":                  DefaultDevices,
		"no rules":                 nil,
		"denies the rest":          append(DefaultDevices[:len(DefaultDevices):len(DefaultDevices)], none),
		"rules behind all devices": append([]DeviceRule{all}, DefaultDevices...),
	} {
		fd, err := loadDeviceProgram(rules)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err := unix.Close(fd); err != nil {
			t.Error(err)
		}
	}
}

// Groups of threads list no processes; those belong to a group around them.
func TestRemoveGroupsOfThreads(t *testing.T) {
	top := filepath.Join(testTree(t, true).V2, fmt.Sprintf("kiln-threads-%d", os.Getpid()))
	below := filepath.Join(top, "a", "b")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := RemoveTree(top); err != nil {
			t.Error(err)
		}
	})
	for _, dir := range []string{filepath.Dir(below), below} {
		if err := write(filepath.Join(dir, "cgroup.type"), "threaded"); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // killed
	for _, dir := range []string{top, below} {
		if err := write(filepath.Join(dir, "cgroup.procs"), fmt.Sprint(cmd.Process.Pid)); err != nil {
			t.Fatal(errors.Join(err, cmd.Process.Kill()))
		}
	}
	if err := RemoveTree(top); err != nil {
		t.Error(errors.Join(err, cmd.Process.Kill()))
	}
	if _, err := os.Stat(top); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the group is still there: %v", err)
	}
}

// Without swap in the kernel there is none to limit.
func TestKernelWithoutSwap(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "memory.stat"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for value, want := range map[string]string{"0": "", "max": "", "4096": "doesn't count swap"} {
		err := setting{dir, "memory.swap.max", value}.write()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error %v", value, err)
		}
	}
	err := setting{t.TempDir(), "memory.swap.max", "0"}.write()
	if err == nil || !strings.Contains(err.Error(), "has no controller memory") {
		t.Errorf("without the controller: error %v", err)
	}
}
