//go:build linux && (amd64 || arm64)

package native

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/nofile"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var rlimitTypes = map[string]uintptr{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_STACK": unix.RLIMIT_STACK,
	"RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

// RlimitType is the number of a limit as a spec names it.
func RlimitType(name string) (int, bool) {
	kind, ok := rlimitTypes[name]
	return int(kind), ok
}

func (b *builder) hostname() error {
	if name := b.spec.Hostname; name != "" {
		b.Call("hostname "+name, unix.SYS_SETHOSTNAME, b.Bytes([]byte(name)), uintptr(len(name)))
	}
	if name := b.spec.Domainname; name != "" {
		b.Call("domain name "+name, unix.SYS_SETDOMAINNAME, b.Bytes([]byte(name)), uintptr(len(name)))
	}
	return nil
}

func (b *builder) limits() error {
	setsFiles := false
	for _, l := range b.spec.Process.Rlimits {
		kind, ok := rlimitTypes[l.Type]
		if !ok {
			return fmt.Errorf("invalid rlimit type: %s", l.Type)
		}
		setsFiles = setsFiles || l.Type == "RLIMIT_NOFILE"
		b.Call(fmt.Sprintf("%s=%d:%d", l.Type, l.Soft, l.Hard), unix.SYS_PRLIMIT64, 0, kind, b.Words(uintptr(l.Soft), uintptr(l.Hard)), 0)
	}
	if !setsFiles {
		l := nofile.Limit
		b.Call("RLIMIT_NOFILE", unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, b.Words(uintptr(l.Cur), uintptr(l.Max)), 0)
	}
	return nil
}

func (b *builder) filterUnlessNoNewPrivileges() error {
	if b.spec.Process.NoNewPrivileges {
		return nil
	}
	return b.filter()
}

func (b *builder) filterIfNoNewPrivileges() error {
	if b.spec.Process.NoNewPrivileges {
		b.Call("no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1)
		return b.filter()
	}
	return nil
}

func (b *builder) filter() error {
	f := b.seccomp
	if len(f) == 0 {
		return nil
	}
	flags, err := b.seccompFlags()
	if err != nil {
		return err
	}
	prog := b.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&f[0])), len(f)*int(unsafe.Sizeof(f[0]))))
	b.Call("filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, b.Words(uintptr(len(f)), prog))
	return nil
}

var seccompFlags = map[specs.LinuxSeccompFlag]uintptr{
	"SECCOMP_FILTER_FLAG_TSYNC": unix.SECCOMP_FILTER_FLAG_TSYNC, specs.LinuxSeccompFlagLog: unix.SECCOMP_FILTER_FLAG_LOG,
	specs.LinuxSeccompFlagSpecAllow:        unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
	specs.LinuxSeccompFlagWaitKillableRecv: 0, // of seccomp agents, of which there are none
}

// seccompFlags are those of the profile. One that says nothing leaves
// speculation as it is, since the mitigation costs much and helps little.
func (b *builder) seccompFlags() (flags uintptr, err error) {
	p := b.spec.Linux.Seccomp
	if p == nil || len(p.Flags) == 0 {
		return unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, nil
	}
	for _, f := range p.Flags {
		flag, ok := seccompFlags[f]
		if !ok {
			return 0, fmt.Errorf("linux.seccomp.flags: %q is none that Linux has", f)
		}
		flags |= flag
	}
	return flags, nil
}

// lastCap is the highest capability of this kernel.
var lastCap = sync.OnceValues(func() (int, error) {
	v, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(v)))
})

// user drops privileges.
func (b *builder) user() error {
	p := b.spec.Process
	sets, err := parseCaps(p.Capabilities)
	if err != nil {
		return err
	}
	last, err := lastCap()
	if err != nil {
		return err
	}
	for c := range last + 1 {
		if sets.bounding&(1<<c) == 0 {
			b.Call("bounding set", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c))
		}
	}
	b.Call("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1)
	groups := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(p.User.AdditionalGids))), 4*len(p.User.AdditionalGids))
	b.Call("groups", unix.SYS_SETGROUPS, uintptr(len(p.User.AdditionalGids)), b.Bytes(groups))
	uid, gid := uintptr(p.User.UID), uintptr(p.User.GID)
	b.Call(fmt.Sprintf("group %d", gid), unix.SYS_SETRESGID, gid, gid, gid)
	b.Call(fmt.Sprintf("user %d", uid), unix.SYS_SETRESUID, uid, uid, uid)
	b.Call("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0)
	b.Call(capabilityStep, unix.SYS_CAPSET, b.capHeader(), b.capData(sets))
	b.Call("ambient set", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL)
	// One that isn't permitted and inheritable can't be ambient; runc drops such
	// ones, too, and has some in its own example.
	ambient := sets.ambient & sets.permitted & sets.inheritable
	for c := range last + 1 {
		if ambient&(1<<c) != 0 {
			b.Call("ambient set", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c))
		}
	}
	return nil
}

const capabilityStep = "capabilities"

// Grantable parts names of capabilities into those that a process of the spec can
// have and others: the kernel doesn't know them, or this process lacks them and
// the container has no users of its own.
func Grantable(s *specs.Spec, names []string) (can, cannot []string, err error) {
	last, err := lastCap()
	if err != nil {
		return nil, nil, fmt.Errorf("look for the kernel's capabilities: %w", err)
	}
	users := slices.ContainsFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UserNamespace })
	for _, name := range names {
		if n, known := capNumber(name); known && n <= last && (users || !lacked(n)) {
			can = append(can, name)
		} else {
			cannot = append(cannot, name)
		}
	}
	return can, cannot, nil
}

// lacked says whether this process can't have or give a capability.
func lacked(n int) bool {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(n), 0, 0, 0)
	return err == nil && has == 0
}

// lackedCaps are those that a process asks for and this one doesn't have.
func lackedCaps(c *specs.LinuxCapabilities) (names []string) {
	for _, name := range c.Permitted {
		if n, known := capNumber(name); known && lacked(n) {
			names = append(names, name)
		}
	}
	return names
}

// orphan ends the process with its parent.
func (b *builder) orphan() error {
	// Cleared by a change of user, so it comes after that; then the parent may be gone
	// already.
	b.Call("parent-death signal", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL))
	poll := []unix.PollFd{{Fd: int32(b.c.Alive), Events: unix.POLLIN}}
	fds := b.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&poll[0])), unsafe.Sizeof(poll[0])))
	b.Call("parent has ended", unix.SYS_PPOLL, fds, 1, b.Words(0, 0), 0, 0).MustBeZero()
	return nil
}

func (b *builder) capHeader() uintptr {
	return b.Words(unix.LINUX_CAPABILITY_VERSION_3) // and pid 0, the upper half: the words are little-endian
}

func (b *builder) capData(s capSets) uintptr {
	// Two structs of effective, permitted and inheritable, for the lower and the
	// upper 32 capabilities.
	words := []uint32{
		uint32(s.effective), uint32(s.permitted), uint32(s.inheritable),
		uint32(s.effective >> 32), uint32(s.permitted >> 32), uint32(s.inheritable >> 32),
	}
	return b.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), 4*len(words)))
}

type capSets struct{ bounding, effective, permitted, inheritable, ambient uint64 }

func parseCaps(c *specs.LinuxCapabilities) (s capSets, err error) {
	if c == nil {
		return s, nil
	}
	for _, set := range []struct {
		names []string
		bits  *uint64
	}{{c.Bounding, &s.bounding}, {c.Effective, &s.effective}, {c.Permitted, &s.permitted}, {c.Inheritable, &s.inheritable}, {c.Ambient, &s.ambient}} {
		for _, name := range set.names {
			n, ok := capNumber(name)
			if !ok {
				return s, fmt.Errorf("unknown capability %q", name)
			}
			*set.bits |= 1 << n
		}
	}
	return s, nil
}

// capNumber returns the number of a capability named as in "CAP_CHOWN".
func capNumber(name string) (int, bool) {
	n, ok := capNumbers()[name]
	return n, ok
}

var capNumbers = sync.OnceValue(func() map[string]int {
	m := map[string]int{}
	for _, c := range capability.ListKnown() {
		m["CAP_"+strings.ToUpper(c.String())] = int(c)
	}
	return m
})
