// Package cgroup makes the control groups that processes run in.
//
// A Tree is what the machine has: version 1 hierarchies (one or more
// controllers each), the version 2 hierarchy, or both (hybrid: version 1 has
// the controllers, version 2 is not used). A Manager makes, limits, measures,
// kills and removes Groups in it; each process gets one.
//
// A group costs little on the way of a step: some are always made ahead, they
// are removed in the background, and on version 1 only controllers that are of
// use are joined (memory and pids; cpu and cpuset if limited), through the
// group's tasks file, which spares the kernel a lock across all processes. What
// devices may be used is the same for all confined processes: on version 1 they
// share one group of the devices controller, on version 2 one BPF program.
//
// All names a manager makes start with its prefix, so that after a crash it
// finds what is its own and can share a parent with others.
package cgroup

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Tree says where cgroup file systems are mounted.
type Tree struct {
	V1 []Hierarchy // those with controllers, in order of mounting
	V2 string      // mount point, "" if V1 has the controllers
	// Bare are the mount points of hierarchies without controllers. Groups are
	// never made there, but runtimes such as runc make them.
	Bare []string
	// Unprivileged: devices are not confined here. The processes are in a user
	// namespace, whose root can't make device nodes.
	Unprivileged bool
}

// Mounts are the mount points of all hierarchies.
func (t *Tree) Mounts() []string {
	list := slices.Clone(t.Bare)
	for _, h := range t.V1 {
		list = append(list, h.Dir)
	}
	if t.V2 != "" {
		list = append(list, t.V2)
	}
	return list
}

// Hierarchy is one version 1 mount.
type Hierarchy struct {
	Dir         string
	Name        string // as below /sys/fs/cgroup, such as "cpu,cpuacct"
	Controllers []string
}

var controllers = []string{"blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}

// Detect reads the machine's mounts.
func Detect() (*Tree, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	defer f.Close()
	t, err := parseMounts(f)
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	return t, nil
}

// cgroupMount is a line of mountinfo about one.
type cgroupMount struct {
	dir, kind string
	options   []string // of the file system: controllers, or a name
}

// usual is where cgroups are mounted. The same may be mounted elsewhere, too, and
// not for long: criu does so while it works.
const usual = "/sys/fs/cgroup"

func (m cgroupMount) isUsual() bool { return m.dir == usual || strings.HasPrefix(m.dir, usual+"/") }

func readMounts(r io.Reader) (list []cgroupMount, err error) {
	scan := bufio.NewScanner(r)
	scan.Buffer(nil, 16<<20) // the line of an overlay names all its layers
	for scan.Scan() {
		// 36 35 98:0 /root /mount/point opts optional... - type source superopts
		before, after, ok := strings.Cut(scan.Text(), " - ")
		pre, post := strings.Fields(before), strings.Fields(after)
		if !ok || len(pre) < 6 || len(post) < 3 || post[0] != "cgroup" && post[0] != "cgroup2" {
			continue
		}
		list = append(list, cgroupMount{unescape(pre[4]), post[0], strings.Split(post[2], ",")})
	}
	slices.SortStableFunc(list, func(a, b cgroupMount) int {
		switch {
		case a.isUsual() == b.isUsual():
			return 0
		case a.isUsual():
			return -1
		}
		return 1
	})
	return list, scan.Err()
}

func parseMounts(r io.Reader) (*Tree, error) {
	list, err := readMounts(r)
	if err != nil {
		return nil, err
	}
	t, named := &Tree{}, map[string]bool{}
	for _, m := range list {
		if m.kind == "cgroup2" {
			t.V2 = cmp.Or(t.V2, m.dir)
			continue
		}
		var has []string
		bare := true
		for _, o := range m.options {
			known := slices.Contains(controllers, o)
			if known && t.hierarchy(o) == nil {
				has = append(has, o)
			}
			bare = bare && !known
		}
		switch name := strings.Join(m.options, ","); {
		case len(has) > 0:
			t.V1 = append(t.V1, Hierarchy{Dir: m.dir, Name: filepath.Base(m.dir), Controllers: has})
		case bare && !named[name]:
			named[name] = true
			t.Bare = append(t.Bare, m.dir)
		}
	}
	switch {
	case t.hierarchy("memory") != nil || t.hierarchy("devices") != nil:
		if t.V2 != "" {
			t.Bare = append(t.Bare, t.V2)
		}
		t.V2 = ""
	case t.V2 != "":
		t.V1 = nil
	default:
		return nil, fmt.Errorf("no cgroup file system is mounted")
	}
	return t, nil
}

// hierarchy returns the one with a controller, or nil.
func (t *Tree) hierarchy(controller string) *Hierarchy {
	for i, h := range t.V1 {
		if slices.Contains(h.Controllers, controller) {
			return &t.V1[i]
		}
	}
	return nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
