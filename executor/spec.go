package executor

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/rootfs"
	mobyseccomp "github.com/moby/profiles/seccomp"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const defaultHostname = "buildkitsandbox"

// defaultCaps are Docker's.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP",
	"CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

var maskedPaths = sync.OnceValue(func() []string {
	list := []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
	}
	throttle, err := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")
	if err != nil {
		panic(fmt.Sprintf("internal error: %v", err)) // of the pattern alone
	}
	return append(list, throttle...)
})

var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

func standardMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
	}
}

// specVersion is the oldest version that has all that makeSpec uses: crun before
// 1.9 refuses newer ones.
const specVersion = "1.0.2"

// confinement is what an executor's processes have in common.
type confinement struct {
	cgroupNS    bool
	machinePIDs bool
	appArmor    string
}

// makeSpec turns p into an OCI runtime spec, the only description of a
// container that runtimes get. binds are p's own mounts and the generated
// files, with the path they can be found at.
func makeSpec(p Process, user rootfs.User, binds []specs.Mount, c confinement) (*specs.Spec, error) {
	env, err := environment(p.Env, user.Home)
	if err != nil {
		return nil, err
	}
	s := &specs.Spec{
		Version:  specVersion,
		Hostname: p.Hostname,
		Root:     &specs.Root{Readonly: p.ReadonlyRoot},
		Process: &specs.Process{
			Args: p.Args, Env: env, Cwd: path.Join("/", p.Cwd),
			User:    specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.Groups},
			Rlimits: rlimits(p.Ulimits),
			// As in every build container, sudo and ping work.
			NoNewPrivileges: false,
			Capabilities:    &specs.LinuxCapabilities{Bounding: defaultCaps, Permitted: defaultCaps, Effective: defaultCaps},
		},
		Mounts: append(standardMounts(), binds...),
		Linux: &specs.Linux{
			Namespaces:    c.namespaces(),
			MaskedPaths:   maskedPaths(),
			ReadonlyPaths: readonlyPaths,
			Resources:     resources(p.Resources),
		},
	}
	if s.Hostname == "" {
		s.Hostname = defaultHostname
	}
	if p.Security == SecurityInsecure {
		return s, makeInsecure(s)
	}
	s.Linux.Resources.Devices = confinedDevices()
	s.Process.ApparmorProfile = c.appArmor
	if s.Linux.Seccomp, err = seccompProfile(); err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	return s, nil
}

// seccompProfile is Docker's for the default capabilities. Nobody may change
// what it returns.
var seccompProfile = sync.OnceValues(func() (*specs.LinuxSeccomp, error) {
	return mobyseccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: defaultCaps}}})
})

// environment makes names unique, the last value winning, and sets HOME.
func environment(env []string, home string) ([]string, error) {
	at := map[string]int{}
	var list []string
	for _, kv := range env {
		name, value, ok := strings.Cut(kv, "=")
		// A value may be a secret, which is in no error.
		switch {
		case !ok:
			return nil, errors.New("invalid environment variable: it has no =")
		case name == "":
			return nil, errors.New("invalid environment variable: it has no name")
		case strings.ContainsRune(kv, 0):
			return nil, fmt.Errorf("environment variable %q contains a zero byte", name)
		}
		if name == "HOME" && value == "" {
			continue
		}
		if i, ok := at[name]; ok {
			list[i] = kv
			continue
		}
		at[name] = len(list)
		list = append(list, kv)
	}
	if _, ok := at["HOME"]; !ok {
		list = append(list, "HOME="+home)
	}
	return list, nil
}

func rlimits(limits []Ulimit) (list []specs.POSIXRlimit) {
	for _, u := range limits {
		list = append(list, specs.POSIXRlimit{Type: rlimitType(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)})
	}
	return list
}

func rlimitType(name string) string { return "RLIMIT_" + strings.ToUpper(name) }

// namespaces are all that a container has but that of its network.
func (c confinement) namespaces() []specs.LinuxNamespace {
	var list []specs.LinuxNamespace
	if !c.machinePIDs {
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	list = append(list, specs.LinuxNamespace{Type: specs.IPCNamespace}, specs.LinuxNamespace{Type: specs.UTSNamespace}, specs.LinuxNamespace{Type: specs.MountNamespace})
	if c.cgroupNS {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return list
}

func resources(r *Resources) *specs.LinuxResources {
	s := &specs.LinuxResources{}
	if r == nil {
		return s
	}
	if r.Memory != 0 || r.MemorySwap != 0 {
		s.Memory = &specs.LinuxMemory{Limit: nonzero(r.Memory), Swap: nonzero(r.MemorySwap)}
	}
	cpu := specs.LinuxCPU{Shares: nonzero(r.CPUShares), Period: nonzero(r.CPUPeriod), Quota: nonzero(r.CPUQuota), Cpus: r.CpusetCpus, Mems: r.CpusetMems}
	if cpu != (specs.LinuxCPU{}) {
		s.CPU = &cpu
	}
	if r.Pids != 0 {
		s.Pids = &specs.LinuxPids{Limit: &r.Pids}
	}
	return s
}

func nonzero[T int64 | uint64](v T) *T {
	if v == 0 {
		return nil
	}
	return &v
}

// confinedDevices are the rules of package cgroup in terms of the spec.
func confinedDevices() []specs.LinuxDeviceCgroup {
	list := []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, r := range cgroup.DefaultDevices {
		d := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Access: r.Access}
		if r.Block {
			d.Type = "b"
		}
		if r.Major >= 0 {
			d.Major = &r.Major
		}
		if r.Minor >= 0 {
			d.Minor = &r.Minor
		}
		list = append(list, d)
	}
	return list
}

// insecureDevices are nodes that insecure containers have in addition.
var insecureDevices = []specs.LinuxDevice{
	{Path: "/dev/kmsg", Type: "c", Major: 1, Minor: 11},
	{Path: "/dev/cuse", Type: "c", Major: 10, Minor: 203},
	{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229},
	{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232},
	{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200},
	{Path: "/dev/loop-control", Type: "c", Major: 10, Minor: 237},
}

// spareLoops is how many loop devices an insecure container has beyond those
// in use.
const spareLoops = 8

// makeInsecure lifts every confinement but the namespaces.
func makeInsecure(s *specs.Spec) error {
	caps, err := ownCaps()
	if err != nil {
		return fmt.Errorf("capabilities of this process: %w", err)
	}
	s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps, Inheritable: caps, Ambient: caps}
	s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Access: "rwm"}, {Allow: true, Type: "b", Access: "rwm"}}
	for i, m := range s.Mounts {
		if m.Type == "sysfs" || m.Type == "cgroup" {
			s.Mounts[i].Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		}
	}
	s.Linux.Devices = slices.Clone(insecureDevices)
	used, err := filepath.Glob("/sys/block/loop[0-9]*/loop")
	if err != nil {
		return fmt.Errorf("list loop devices: %w", err)
	}
	for i := range len(used) + spareLoops {
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: fmt.Sprintf("/dev/loop%d", i), Type: "b", Major: 7, Minor: int64(i)})
	}
	return nil
}

// ownCaps are the capabilities that this process can give away.
var ownCaps = sync.OnceValues(func() (names []string, err error) {
	c, err := capability.NewPid2(os.Getpid())
	if err != nil {
		return nil, err
	}
	if err := c.Load(); err != nil {
		return nil, err
	}
	for _, known := range capability.ListKnown() {
		if c.Get(capability.PERMITTED, known) && c.Get(capability.BOUNDING, known) {
			names = append(names, "CAP_"+strings.ToUpper(known.String()))
		}
	}
	return names, nil
})
