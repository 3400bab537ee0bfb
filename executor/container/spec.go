//go:build linux && (amd64 || arm64)

package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/executor/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// LoadSpec reads and checks config.json of a bundle.
func LoadSpec(bundle string) (*specs.Spec, error) {
	name := filepath.Join(bundle, "config.json")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("JSON specification file %s not found; make one with the command spec", name)
	}
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	s, err := parseSpec(b)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %s: %w", name, err)
	}
	return s, nil
}

func parseSpec(b []byte) (*specs.Spec, error) {
	s := &specs.Spec{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, err
	}
	return s, check(s)
}

// check refuses what a container can't be made from, so that nothing of the
// spec is silently left out.
func check(s *specs.Spec) error {
	switch {
	case !knownVersion.MatchString(s.Version):
		return fmt.Errorf("ociVersion %q: this runtime knows versions 1.x", s.Version)
	case s.Linux == nil:
		return errors.New("no section linux")
	case s.Root == nil || s.Root.Path == "":
		return errors.New("no root.path")
	case s.Process == nil:
		return errors.New("no section process")
	case s.Linux.IntelRdt != nil:
		return errors.New("linux.intelRdt: this runtime doesn't control caches and the bandwidth of memory; remove it")
	case s.Linux.MemoryPolicy != nil:
		return errors.New("linux.memoryPolicy: this runtime doesn't set memory policies; remove it, or use resources.cpu.mems")
	case s.Linux.Personality != nil && len(s.Linux.Personality.Flags) > 0:
		return fmt.Errorf("linux.personality.flags %q: there are none", s.Linux.Personality.Flags)
	case s.Linux.Personality != nil && s.Linux.Personality.Domain != specs.PerLinux && s.Linux.Personality.Domain != specs.PerLinux32:
		return fmt.Errorf("linux.personality.domain %q is neither LINUX nor LINUX32", s.Linux.Personality.Domain)
	case len(s.Linux.NetDevices) > 0:
		return errors.New("linux.netDevices: this runtime doesn't move network devices; remove them")
	}
	mapped, mounts, clocks := false, false, false
	seen := map[specs.LinuxNamespaceType]bool{}
	for _, ns := range s.Linux.Namespaces {
		if seen[ns.Type] {
			return fmt.Errorf("linux.namespaces: %s is there twice", ns.Type)
		}
		seen[ns.Type] = true
		mapped = mapped || ns.Type == specs.UserNamespace && ns.Path == ""
		mounts = mounts || ns.Type == specs.MountNamespace
		clocks = clocks || ns.Type == specs.TimeNamespace && ns.Path == ""
	}
	for clock := range s.Linux.TimeOffsets {
		switch {
		case !clocks:
			return errors.New("linux.timeOffsets: there is no new time namespace to set clocks in")
		case clock != "monotonic" && clock != "boottime":
			return fmt.Errorf("linux.timeOffsets: %q is neither monotonic nor boottime", clock)
		}
	}
	switch {
	case !mounts:
		return errors.New("linux.namespaces: a container needs a mount namespace; without one its mounts would be the machine's")
	case mapped && (len(s.Linux.UIDMappings) == 0 || len(s.Linux.GIDMappings) == 0):
		return errors.New("linux.uidMappings and gidMappings: a user namespace needs both")
	case !seen[specs.UserNamespace] && len(s.Linux.UIDMappings)+len(s.Linux.GIDMappings) > 0:
		return errors.New("linux.uidMappings: there is no user namespace to use them in")
	case s.Hostname != "" && !seen[specs.UTSNamespace]:
		return errors.New("hostname: it can't be set without a private uts namespace")
	case s.Domainname != "" && !seen[specs.UTSNamespace]:
		return errors.New("domainname: it can't be set without a private uts namespace")
	}
	for _, do := range []func() error{
		func() error { return checkPaths(s) }, func() error { return checkHooks(s.Hooks) }, func() error { return CheckProcess(s.Process) },
	} {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

var knownVersion = regexp.MustCompile(`^1\.\d+\.\d+([-+].*)?$`)

// checkPaths refuses places in the container that are none.
func checkPaths(s *specs.Spec) error {
	for i, m := range s.Mounts {
		if m.Destination == "" {
			return fmt.Errorf("mounts: number %d (%s) has no destination", i+1, strings.TrimSpace(m.Type+" "+m.Source))
		}
	}
	for what, list := range map[string][]string{"linux.maskedPaths": s.Linux.MaskedPaths, "linux.readonlyPaths": s.Linux.ReadonlyPaths} {
		for _, p := range list {
			if !filepath.IsAbs(p) {
				return fmt.Errorf("%s: %q must be absolute", what, p)
			}
		}
	}
	return nil
}

// CheckProcess refuses a process that can't be run.
func CheckProcess(p *specs.Process) error {
	switch {
	case len(p.Args) == 0 || p.Args[0] == "":
		return errors.New("process.args: no command to run")
	case !filepath.IsAbs(p.Cwd):
		return fmt.Errorf("process.cwd %q: it must be an absolute path", p.Cwd)
	}
	for _, text := range append(slices.Clone(p.Args), p.Cwd) {
		if strings.ContainsRune(text, 0) {
			return fmt.Errorf("process: %q contains a zero byte", text)
		}
	}
	if err := checkNumbers(p); err != nil {
		return err
	}
	for _, kv := range p.Env { // the value may be a secret
		name, _, ok := strings.Cut(kv, "=")
		switch {
		case strings.ContainsRune(kv, 0):
			return fmt.Errorf("process.env: %q contains a zero byte", name)
		case !ok:
			return fmt.Errorf("process.env: %q isn't NAME=VALUE", name)
		case name == "":
			return errors.New("process.env: a value has no name; write NAME=VALUE")
		}
	}
	return nil
}

// noID is what system calls take as "leave it as it is".
const noID = 1<<32 - 1

// checkNumbers refuses what the kernel would refuse without saying why.
func checkNumbers(p *specs.Process) error {
	for _, id := range append([]uint32{p.User.UID, p.User.GID}, p.User.AdditionalGids...) {
		if id == noID {
			return fmt.Errorf("process.user: %d is no id", id)
		}
	}
	if n := p.OOMScoreAdj; n != nil && (*n < -1000 || *n > 1000) {
		return fmt.Errorf("process.oomScoreAdj %d: it is from -1000 to 1000", *n)
	}
	if size := p.ConsoleSize; size != nil && max(size.Height, size.Width) > math.MaxUint16 {
		return fmt.Errorf("process.consoleSize: %d rows, %d columns: a terminal has at most %d", size.Height, size.Width, math.MaxUint16)
	}
	seen := map[string]bool{}
	for _, l := range p.Rlimits {
		switch {
		case seen[l.Type]:
			return fmt.Errorf("process.rlimits: %s is there twice", l.Type)
		case l.Soft > l.Hard:
			return fmt.Errorf("process.rlimits: %s: the soft limit, %d, is above the hard one, %d", l.Type, l.Soft, l.Hard)
		}
		seen[l.Type] = true
	}
	return nil
}

// filter compiles the spec's seccomp profile.
func filter(s *specs.Spec) ([]unix.SockFilter, error) {
	p := s.Linux.Seccomp
	if p == nil {
		return nil, nil
	}
	if p.ListenerPath != "" {
		return nil, fmt.Errorf("linux.seccomp.listenerPath %s: this runtime has no seccomp agents; remove it", p.ListenerPath)
	}
	f, err := seccomp.Compile(p)
	if err != nil {
		return nil, fmt.Errorf("linux.seccomp: %w", err)
	}
	return f, nil
}

// withEnv returns p with an environment in which each variable is there once,
// with its last value, and HOME as the container's passwd file has it unless
// it is set.
func withEnv(p *specs.Process, rootFD int) (*specs.Process, error) {
	copied := *p
	copied.Env = lastValues(p.Env)
	if slices.ContainsFunc(copied.Env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") && kv != "HOME=" }) {
		return &copied, nil
	}
	u, err := rootfs.New(rootFD).User(fmt.Sprintf("%d:%d", p.User.UID, p.User.GID))
	if err != nil {
		return nil, fmt.Errorf("find home of user %d: %w", p.User.UID, err)
	}
	copied.Env = append(slices.DeleteFunc(copied.Env, func(kv string) bool { return kv == "HOME=" }), "HOME="+u.Home)
	return &copied, nil
}

// lastValues keeps the last of several values of a variable, as programs differ
// in which they take.
func lastValues(env []string) (list []string) {
	seen := map[string]bool{}
	for _, kv := range slices.Backward(env) {
		name, _, _ := strings.Cut(kv, "=")
		if !seen[name] {
			seen[name] = true
			list = append(list, kv)
		}
	}
	slices.Reverse(list)
	return list
}
