package executor

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/internal/cleanup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// containerRuntime is a way to run a container.
type containerRuntime interface {
	// opener returns how to make the root and then the mounts of p visible.
	opener(p Process, undo *cleanup.Stack) (openView, error)
	// run runs t's process to its end.
	run(ctx context.Context, t *task) (exit, error)
	close() error
}

// task is a Process made ready for a runtime.
type task struct {
	p          Process
	watch      *watcher
	root       view
	spec       *specs.Spec
	netns      *network.Namespace // nil: the machine's
	sources    []source           // what is mounted besides the standard mounts, parents first
	makePoints map[string]string  // by destination: mount points to be made inside other mounts
	observed   bool               // the stages of the start are timed
	// result is what Exec returns of a further process, whose task is like t.
	result func(context.Context, *task, exit, error) error
}

// exit is how a process ended.
type exit struct {
	code     int
	signaled bool // the process itself was, which not every runtime knows
	killed   bool // by us
	usage    Usage
	oomLimit int64              // of memory, if processes were killed for it; 0 is none
	refused  int64              // processes and threads that it was not allowed
	times    []launch.StageTime // of the start, if somebody observes
}

func (e *exit) status(s launch.Status) {
	e.code, e.signaled = s.Code(), s.Signaled()
	e.usage.CPU = s.CPU
}

// account adds what the cgroup counted. Version 1 groups don't count CPU time;
// what the kernel says of the process and its reaped descendants, which is all
// in its PID namespace, stands.
func (e *exit) account(u cgroup.Usage) {
	if u.CPU != 0 {
		e.usage.CPU = u.CPU
	}
	e.usage.MemoryPeak, e.usage.PidsPeak, e.usage.OOMKills, e.oomLimit = u.MemoryPeak, u.PidsPeak, u.OOMKills, u.OOMLimit
	e.refused = u.PidsRefused
}

type executor struct {
	cfg     Config
	rt      containerRuntime
	cgroups *cgroup.Manager
	nets    *network.Networks
	files   *fileStore
	dns     resolvConfs
	parents *parentList
	confinement
	running sync.WaitGroup
	mu      sync.Mutex // guards closed, and that running isn't added to once it is
	closed  bool
	observe func(exit) // called after each run, for benchmarks; may be nil
}

// Exit codes for programs that can't be executed, as shells have them.
const (
	codeNotExecutable = 126
	codeNotFound      = 127
)

func (e *executor) Run(ctx context.Context, p Process) (_ Usage, err error) {
	if err := validate(p); err != nil {
		return Usage{}, err
	}
	if err := ctx.Err(); err != nil {
		return Usage{}, context.Cause(ctx)
	}
	if err := e.enter(); err != nil {
		return Usage{}, err
	}
	defer e.running.Done()
	if err := e.parents.add(p.CgroupParent); err != nil {
		return Usage{}, err
	}
	var undo cleanup.Stack
	defer func() {
		// The process has run: what it made stands, whatever can't be tidied up.
		if cerr := undo.Run(); cerr != nil {
			e.cfg.Log.Warn("clean up after process", "id", p.ID, "error", cerr)
		}
	}()
	ctx, p, watch := watched(ctx, p)
	defer watch.stop()
	t, err := e.prepare(ctx, p, &undo)
	if err != nil {
		return Usage{}, err
	}
	t.watch, t.result, t.observed = watch, e.result, e.observe != nil
	exit, err := e.rt.run(ctx, t)
	if e.observe != nil {
		e.observe(exit)
	}
	return exit.usage, e.result(ctx, t, exit, err)
}

func validate(p Process) error {
	valid := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
	}
	if p.ID == "" || strings.ContainsFunc(p.ID, func(c rune) bool { return !valid(c) }) {
		return fmt.Errorf("invalid process id %q", p.ID)
	}
	if len(p.Args) == 0 || p.Args[0] == "" {
		return errors.New("no command to run")
	}
	texts := slices.Concat(p.Args, []string{p.Cwd, p.Hostname, p.User})
	for _, m := range p.Mounts {
		texts = append(texts, m.Dest, m.Selector)
	}
	for _, s := range texts {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf("%q contains a zero byte", s)
		}
	}
	return nil
}

// prepare makes root and mounts visible and does everything that can be done
// from outside.
func (e *executor) prepare(ctx context.Context, p Process, undo *cleanup.Stack) (*task, error) {
	t := &task{p: p, makePoints: map[string]string{}}
	var err error
	if t.netns, err = e.takeNetwork(ctx, p, undo); err != nil {
		return nil, err
	}
	open, err := e.rt.opener(p, undo)
	if err != nil {
		return nil, err
	}
	if t.root, err = open(p.Root); err != nil {
		return nil, fmt.Errorf("root: %w", err)
	}
	undo.Add(t.root.Close)
	root := rootfs.New(t.root.FD())
	user, err := root.User(p.User)
	if err != nil {
		return nil, err
	}
	p.Resources = e.cfg.Most.bound(p.Resources)
	if p, err = e.permit(p, user); err != nil {
		return nil, err
	}
	t.p = p
	if t.sources, err = e.openFiles(p, undo); err != nil {
		return nil, err
	}
	mounts, err := openSources(open, p.Mounts, undo)
	if err != nil {
		return nil, err
	}
	t.sources = append(t.sources, mounts...)
	stubs, err := e.mountPoints(t, root)
	if err != nil {
		return nil, err
	}
	undo.Add(stubs.Remove)
	if err := root.MakeCwd(path.Join("/", p.Cwd), user.UID, user.GID); err != nil {
		return nil, err
	}
	var binds []specs.Mount
	for _, s := range t.sources {
		binds = append(binds, specs.Mount{Destination: s.dest, Type: "bind", Options: s.options()})
	}
	if t.spec, err = makeSpec(p, user, binds, e.confinement); err != nil {
		return nil, err
	}
	if t.netns != nil {
		t.spec.Linux.Namespaces = append(t.spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: t.netns.Path()})
	}
	return t, nil
}

// takeNetwork returns the namespace that p runs in; nil is the machine's.
func (e *executor) takeNetwork(ctx context.Context, p Process, undo *cleanup.Stack) (*network.Namespace, error) {
	provider := e.nets.Default
	switch p.Network {
	case NetHost:
		return nil, nil
	case NetNone:
		provider = e.nets.None
	}
	if provider == nil {
		return nil, nil
	}
	// Whoever talks to a process, as with frontends, may have others run meanwhile.
	n, err := provider.Take(ctx, network.User{Hostname: p.Hostname, Asks: p.Stdin != nil || p.Started != nil})
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	if p.Security == SecurityInsecure { // it may change anything there
		undo.AddFunc(n.Discard)
	} else {
		undo.AddFunc(n.Release)
	}
	return n, nil
}

// openFiles generates resolv.conf and hosts.
func (e *executor) openFiles(p Process, undo *cleanup.Stack) ([]source, error) {
	resolv, err := e.dns.get(p.Network == NetHost)
	if err != nil {
		return nil, err
	}
	hosts, err := generateHosts(p.Hostname, p.ExtraHosts)
	if err != nil {
		return nil, err
	}
	var sources []source
	for dest, content := range map[string][]byte{"/etc/resolv.conf": resolv, "/etc/hosts": hosts} {
		name, release, err := e.files.get(content)
		if err != nil {
			return nil, err
		}
		undo.Add(release)
		fd, err := unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open generated file %s: %w", name, err)
		}
		undo.Add(func() error { return unix.Close(fd) })
		attrs := uint64(unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
		sources = append(sources, source{dest: dest, fd: fd, file: true, attrs: attrs})
	}
	slices.SortFunc(sources, func(a, b source) int { return strings.Compare(a.dest, b.dest) })
	return sources, nil
}

// mountPoints makes missing mount points in the root. Those below another
// mount are left to be made when that is mounted.
func (e *executor) mountPoints(t *task, root rootfs.Root) (*rootfs.Stubs, error) {
	points := []rootfs.MountPoint{{Path: "/proc", Keep: true, Plain: true}, {Path: "/sys", Keep: true, Plain: true}, {Path: "/dev", Keep: true}}
	covered := []string{"/proc", "/sys", "/dev"}
	for _, s := range t.sources {
		resolved, _, err := root.Resolve(s.dest)
		if err != nil {
			return nil, fmt.Errorf("mount point %s: %w", s.dest, err)
		}
		if resolved == "/proc" || rootfs.InProc(resolved) {
			return nil, fmt.Errorf("mount point %s: nothing can be mounted at or below /proc", s.dest)
		}
		if rootfs.Below(resolved, covered) {
			t.makePoints[s.dest] = resolved
		}
		covered = append(covered, resolved)
		points = append(points, rootfs.MountPoint{Path: s.dest, File: s.file})
	}
	return root.Prepare(points, t.p.RemoveMountStubsRecursive)
}

func cgroupSpec(p Process) cgroup.Spec {
	s := cgroup.Spec{ID: p.ID, Parent: p.CgroupParent, AllDevices: p.Security == SecurityInsecure}
	if r := p.Resources; r != nil {
		s.Limits = cgroup.Limits{
			Memory: r.Memory, MemorySwap: r.MemorySwap, CPUShares: r.CPUShares, CPUPeriod: r.CPUPeriod, CPUQuota: r.CPUQuota,
			CpusetCpus: r.CpusetCpus, CpusetMems: r.CpusetMems, Pids: r.Pids,
		}
	}
	return s
}

// enter counts a Run that Close has to wait for.
func (e *executor) enter() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errors.New("executor is closed")
	}
	e.running.Add(1)
	return nil
}

func (e *executor) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.running.Wait()
	return errors.Join(e.rt.close(), e.nets.Close(), e.cgroups.Close())
}

// options are the mount options of s in a spec.
func (s source) options() []string {
	list := []string{"rbind"}
	for _, a := range []struct {
		bit  uint64
		name string
	}{{unix.MOUNT_ATTR_NOSUID, "nosuid"}, {unix.MOUNT_ATTR_NOEXEC, "noexec"}, {unix.MOUNT_ATTR_NODEV, "nodev"}, {unix.MOUNT_ATTR_RDONLY, "ro"}} {
		if s.attrs&a.bit != 0 {
			list = append(list, a.name)
		}
	}
	return list
}
