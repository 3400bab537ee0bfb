//go:build linux && (amd64 || arm64)

// Package native is the built-in container runtime: it turns an OCI runtime
// spec into a program for package launch.
//
// There are two kinds of containers. Start runs a build step as fast as can be:
// what it supports is what package executor puts into a spec. Create and Enter
// are for containers with a lifecycle, made from any spec, whose process waits
// at gates; see Create for its stages. They share what they have in common.
//
// A step is set up in this order; each stage has its name in errors:
//
//	session     a session and keyring of its own, default signal handling
//	descriptors all closed but what the container is made from
//	cgroup      joined (version 1; on 2 the process is born in it)
//	network     a pre-made namespace entered
//	root        the root's detached mount attached and pivoted to
//	mount       /proc, /dev, /sys and the like
//	mask        paths hidden or made read-only
//	label       of AppArmor and SELinux, for the program
//	terminal    opened in the container's devpts, if there shall be one
//	bind        mounts of the step; their sources are detached mounts made by
//	            the parent
//	descriptors all closed but standard input, output and error
//	cwd         working directory
//	limits      hostname, resource limits
//	seccomp     before privileges are dropped, if they may be regained
//	user        capabilities, groups, user
//	exec        one execve for each directory in PATH
//
// Since paths are resolved after pivot_root, no symbolic link in an image can
// lead to the machine's files; those of /proc/self/fd can't either, since what
// is open there was closed. Masks come before the step's own mounts, so
// that the /dev/null they use is the real one.
package native

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/internal/cleanup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Container is what to start. File descriptors stay the caller's and may be
// closed when Start has returned.
type Container struct {
	Spec  *specs.Spec
	Root  int // detached mount of the root file system
	Binds []Bind
	// Machine are detached mounts of what root of a user namespace can't make, by
	// destination: device nodes and file systems. It is nil on the machine itself.
	Machine map[string]int
	Cgroup  Cgroup
	// MountsName, if not nil, receives the name of the mount namespace in /proc.
	MountsName *string
	Netns      int    // namespace to enter, or -1: the machine's or a new one, as Spec says
	Stdio      [3]int // of a process without terminal; -1: the container's /dev/null
	// Terminal is opened in the container, if it has a socket.
	Terminal Terminal
	// Alive is a pidfd of this process, by which the child sees whether it
	// was orphaned before its parent-death signal was set.
	Alive int
	// Filter is the compiled seccomp profile, nil for none.
	Filter []unix.SockFilter
}

// Bind is a mount whose source is a detached mount.
type Bind struct {
	Dest string // as written
	// Make is where the mount point is made inside the container if it is
	// missing; "" if it is known to exist. It has no symbolic links.
	Make string
	FD   int
	File bool
	// Selector: FD is a whole mount, of which this path is mounted. It is for
	// kernels that can't clone a part of a detached mount (before 6.15).
	Selector string
	Readonly bool // with Selector; otherwise FD is read-only already
}

// Cgroup says how the process gets into its control group.
type Cgroup struct {
	Join   []int // open tasks files
	Dir    int   // open directory to be born in, or -1
	Mounts []CgroupMount
}

// CgroupMount is a version 1 hierarchy shown below /sys/fs/cgroup.
type CgroupMount struct {
	Name string
	FD   int // detached mount
}

// ExecError: the container was set up, but there is nothing to execute.
type ExecError struct {
	Path string // what was to be executed
	Err  error
}

func (e *ExecError) Error() string { return fmt.Sprintf("exec: %q: %v", e.Path, e.Err) }
func (e *ExecError) Unwrap() error { return e.Err }

// ErrNotInPath: no directory in PATH has the program.
var ErrNotInPath = errors.New("executable file not found in $PATH")

// Start starts a container's process. The program is returned for its times.
func Start(ctx context.Context, l *launch.Launcher, c *Container) (_ *launch.Process, _ *launch.Program, err error) {
	b := &builder{Program: new(launch.Program), c: c, spec: c.Spec, seccomp: c.Filter}
	defer func() { err = errors.Join(err, b.fds.Run()) }()
	if err := b.reserveTerminal(c.Terminal, c.Root); err != nil {
		return nil, nil, err
	}
	if err := b.build(); err != nil {
		return nil, nil, err
	}
	proc, err := l.Launch(ctx, b.Program, launch.Options{Namespaces: b.namespaces(), CgroupFD: c.Cgroup.Dir})
	if err == nil {
		if c.MountsName != nil {
			*c.MountsName = string(bytes.TrimRight(b.mountsName, "\x00"))
		}
		return proc, b.Program, nil
	}
	return nil, nil, setUpError(err, c.Spec.Process, b.Results)
}

// setUpError tells a program that can't be executed from a container that
// can't be set up.
func setUpError(err error, p *specs.Process, results func(stage string) []unix.Errno) error {
	var step *launch.StepError
	switch {
	case errors.As(err, &step) && step.Stage == stageExec:
		return execError(p, step.Errno)
	case errors.Is(err, launch.ErrNotExecuted):
		errs := results(stageExec)
		if strings.Contains(p.Args[0], "/") && len(errs) > 0 {
			return execError(p, errs[len(errs)-1])
		}
		return execError(p, notFound(errs))
	}
	return fmt.Errorf("set up container: %w", explain(err, p))
}

const stageExec = "exec"

// builder adds the steps of a container to a program.
type builder struct {
	*launch.Program
	c          *Container // nil if it is not of a step
	spec       *specs.Spec
	seccomp    []unix.SockFilter
	inherit    int           // how many files from 3 on the program inherits
	path       string        // of the program if it isn't the first argument
	fds        cleanup.Stack // closes what only the child needs
	master     int           // reserved for the ends of a terminal
	peer       int
	mountsName []byte
	// tolerate are errors of execve after which the steps go on.
	tolerate []unix.Errno
}

func (b *builder) build() error {
	return b.add([]stage{
		{"session", b.session},
		{"descriptors", b.closeForeign},
		{"cgroup", b.joinCgroup},
		{"network", b.enterNetwork},
		{"root", b.enterRoot},
		{"mount", b.mounts},
		{"mount", b.nameMounts},
		{"mask", b.masks},
		{"label", b.label},
		{"terminal", func() error { return b.terminal(b.c.Terminal, true) }},
		{"bind", b.binds},
		{"descriptors", b.closeAll},
		{"cwd", b.makeCwd},
		{"cwd", b.enterCwd},
		{"limits", b.hostname},
		{"limits", b.limits},
		{"seccomp", b.filterUnlessNoNewPrivileges},
		{"user", b.user},
		{"user", b.orphan},
		{"seccomp", b.filterIfNoNewPrivileges},
		{stageExec, b.exec},
	})
}

// stage is a part of a program; errors carry its name.
type stage struct {
	name string
	add  func() error
}

func (b *builder) add(stages []stage) error {
	for _, s := range stages {
		b.Stage(s.name)
		if err := s.add(); err != nil {
			return fmt.Errorf("set up container: %s: %w", s.name, err)
		}
	}
	return nil
}

var cloneFlags = map[specs.LinuxNamespaceType]uint64{
	specs.PIDNamespace:     unix.CLONE_NEWPID,
	specs.IPCNamespace:     unix.CLONE_NEWIPC,
	specs.UTSNamespace:     unix.CLONE_NEWUTS,
	specs.MountNamespace:   unix.CLONE_NEWNS,
	specs.NetworkNamespace: unix.CLONE_NEWNET,
	specs.CgroupNamespace:  unix.CLONE_NEWCGROUP,
	specs.UserNamespace:    unix.CLONE_NEWUSER,
	specs.TimeNamespace:    unix.CLONE_NEWTIME,
}

func (b *builder) namespaces() (flags uint64) {
	for _, ns := range b.spec.Linux.Namespaces {
		flags |= cloneFlags[ns.Type]
	}
	if b.c.Netns >= 0 {
		flags &^= unix.CLONE_NEWNET
	}
	return flags
}

// atCWD is AT_FDCWD as a system call argument.
const atCWD = ^uintptr(-unix.AT_FDCWD - 1)

func (b *builder) session() error {
	b.freshSession()
	b.joinKeyring(0)
	if b.c.Terminal.Socket == nil {
		b.stdio(b.c.Stdio)
	}
	return nil
}

// joinKeyring gives the child a session keyring of its own. name points to its
// name, 0 is an anonymous one.
func (b *builder) joinKeyring(name uintptr) launch.Step {
	return b.Call("keyring", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, name).Tolerate(unix.ENOSYS, unix.EPERM)
}

// freshSession makes nothing of how this process runs show in the child.
func (b *builder) freshSession() {
	// Program memory and this process's file descriptors are shared with or
	// copied from the parent; its cwd is the empty root of the launcher.
	b.Call("setsid", unix.SYS_SETSID).Tolerate(unix.EPERM) // it leads one already
	b.Call("umask", unix.SYS_UMASK, 0)
	b.Call("signal mask", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, b.Words(0), 0, 8)
	// Clone resets handlers, but leaves ignored what this process ignores, for
	// example because of nohup.
	byDefault := b.Words(0, 0, 0, 0)
	for sig := 1; sig <= lastSignal; sig++ {
		b.Call("signals", unix.SYS_RT_SIGACTION, uintptr(sig), byDefault, 0, 8).Tolerate(unix.EINVAL) // KILL and STOP
	}
}

// lastSignal is the highest one that can be ignored; those for real time come
// after it and nothing ignores them for its children.
const lastSignal = 31

func (b *builder) joinCgroup() error {
	zero := b.Bytes([]byte("0"))
	for _, fd := range b.c.Cgroup.Join {
		b.Call("join", unix.SYS_WRITE, uintptr(fd), zero, 1)
	}
	return nil
}

func (b *builder) enterNetwork() error {
	if b.c.Netns >= 0 {
		b.Call("enter namespace", unix.SYS_SETNS, uintptr(b.c.Netns), unix.CLONE_NEWNET)
	}
	return nil
}

func (b *builder) enterRoot() error {
	dot, staging := b.String("."), b.String(launch.Staging)
	b.Call("attach", unix.SYS_MOVE_MOUNT, uintptr(b.c.Root), b.String(""), atCWD, staging, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if b.spec.Root.Readonly {
		// A clone becomes read-only: on kernels before 6.15 the mount may be the
		// one through which the caller cleans up.
		b.Call("clone", unix.SYS_MOUNT, staging, staging, 0, unix.MS_BIND|unix.MS_REC)
	}
	b.Call("enter", unix.SYS_CHDIR, staging)
	b.mountWhileVisible()
	b.Call("pivot", unix.SYS_PIVOT_ROOT, dot, dot)
	b.Call("detach old", unix.SYS_UMOUNT2, dot, unix.MNT_DETACH)
	b.Call("enter", unix.SYS_CHDIR, b.String("/"))
	return nil
}

// mountWhileVisible mounts proc and sysfs in a user namespace, which can do so
// only where the machine's are seen. The mount points are directories of the root
// itself.
func (b *builder) mountWhileVisible() {
	if b.c.Machine == nil {
		return
	}
	b.Stage("mount")
	for _, m := range b.spec.Mounts {
		if _, ok := b.c.Machine[m.Destination]; !ok && visibleOnly(m) {
			b.mountAt(m, "."+m.Destination)
		}
	}
	b.Stage("root")
}

func visibleOnly(m specs.Mount) bool { return m.Type == "proc" || m.Type == "sysfs" }

// makeCwd makes the working directory, which can still be missing.
func (b *builder) makeCwd() error {
	dir := path.Clean(b.spec.Process.Cwd)
	for _, d := range append(parents("/", dir), dir) {
		b.mkdir(d)
	}
	return nil
}

func (b *builder) enterCwd() error {
	dir := path.Clean(b.spec.Process.Cwd)
	b.Call(dir, unix.SYS_CHDIR, b.String(dir))
	b.Call("umask", unix.SYS_UMASK, 0o022)
	return nil
}

// exec adds an execve for each place where the program may be.
func (b *builder) exec() error {
	p := b.spec.Process
	argv, envp := b.Strings(p.Args), b.Strings(p.Env)
	// Ours are closed by exec; what this process itself inherited may not be.
	b.Stage("descriptors")
	b.Call("close", unix.SYS_CLOSE_RANGE, uintptr(3+b.inherit), ^uintptr(0)>>32, unix.CLOSE_RANGE_CLOEXEC).Tolerate(unix.ENOSYS, unix.EPERM)
	b.Stage(stageExec)
	program := b.program()
	if strings.Contains(program, "/") {
		b.Call(program, unix.SYS_EXECVE, b.String(program), argv, envp).Tolerate(b.tolerate...)
		return nil
	}
	for _, dir := range strings.Split(getenv(p.Env, "PATH"), ":") {
		candidate := path.Join(dir, program)
		b.Call(candidate, unix.SYS_EXECVE, b.String(candidate), argv, envp).Tolerate(unix.ENOENT, unix.EACCES, unix.ENOTDIR).Tolerate(b.tolerate...)
	}
	return nil
}

func (b *builder) program() string { return cmp.Or(b.path, b.spec.Process.Args[0]) }

// notFound is the error when nothing in PATH could be executed.
func notFound(results []unix.Errno) error {
	for _, errno := range []unix.Errno{unix.EACCES, unix.ENOEXEC} {
		if slices.Contains(results, errno) {
			return errno
		}
	}
	return ErrNotInPath
}

func getenv(env []string, name string) string {
	for _, kv := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}
