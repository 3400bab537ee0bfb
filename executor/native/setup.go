//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Setup is what a container with a lifecycle of its own is made from: any OCI
// spec, in contrast to Container. Files stay the caller's.
type Setup struct {
	Spec   *specs.Spec // Process, Root and Linux are set
	Bundle string      // absolute; relative sources are below it
	Filter []unix.SockFilter
	// Cgroups are the container's own directories by the name that a version 1
	// hierarchy has; nil on version 2.
	Cgroups map[string]string
	// Gate is a FIFO open for reading and writing: the process executes its
	// program when a byte arrives.
	Gate *os.File
	// NoPivot covers the machine's root rather than to pivot from it.
	NoPivot bool
	// CopyUp copies what is in one open directory to another, for mounts with the
	// option tmpcopyup.
	CopyUp func(from, to int) error
	// Hold makes the child wait at HeldForHooks.
	Hold bool

	Program  string // to execute, if it isn't the first argument
	Terminal Terminal
	// Stdio is that of a process without terminal. Where Enter finds nil, the
	// process gets the container's /dev/null; Create needs all three.
	Stdio    [3]*os.File
	Preserve int    // how many files from 3 on the process inherits
	Keyring  string // name of a new session keyring; "" keeps the current one
}

// Terminal is where a process with a terminal sends its other end.
type Terminal struct {
	Socket        *os.File // connected; nil: no terminal
	Height, Width uint16   // 0: left as they are
}

// Create starts the process of a new container on the calling thread, whose
// end would end it before it is Ready. It waits at its first gate: the caller
// puts it into cgroups and maps its users.
//
//	users       another's user namespace joined; namespaces that are to belong to
//	            it are made from there
//	session     session, signals
//	(gate)      cgroups joined, users mapped, clocks set
//	user        root in the new user namespace
//	label       of AppArmor and SELinux, for the program
//	keyring     a session keyring of it
//	namespace   the cgroup namespace, names, sysctls
//	root        the root's detached mount attached and entered with chroot, so
//	            that hooks still find the machine's files in the namespace
//	mount       the spec's mounts in their order, devices
//	terminal    opened in the container's devpts
//	(gate)      HeldForHooks
//	pivot       the root becomes the only one
//	cwd         made, while the root can be written to
//	mask, cwd, limits, seccomp, user
//	find        the program: it must be there
//	(gate)      Ready; the FIFO
//	exec
func Create(s *Setup) (*Child, error) {
	c := &creator{member: newMember(s), mapped: hasNamespace(s.Spec, specs.UserNamespace)}
	users, err := c.openJoined(specs.UserNamespace)
	if err != nil {
		return nil, errors.Join(err, c.fds.Run())
	}
	if c.users = users; users < 0 {
		return c.start(c.build, c.namespaces())
	}
	c.mapped = true
	return c.start(c.build, 0)
}

// creator adds the steps of a container to a program.
type creator struct {
	member
	mapped bool     // in a user namespace that isn't the machine's
	users  int      // the one to join, or -1
	root   int      // detached mount
	old    int      // file descriptor that is the machine's root in the child
	done   []string // where mounts are made that show something else than the root
}

func hasNamespace(s *specs.Spec, kind specs.LinuxNamespaceType) bool {
	for _, ns := range s.Linux.Namespaces {
		if ns.Type == kind && ns.Path == "" {
			return true
		}
	}
	return false
}

// MakesUsers says whether the container has a user namespace of its own, to be
// mapped by who creates it.
func MakesUsers(s *specs.Spec) bool { return hasNamespace(s, specs.UserNamespace) }

// namespaces are those to clone, without those that are made later.
func (c *creator) namespaces() (flags uint64) {
	for _, ns := range c.spec.Linux.Namespaces {
		if ns.Path == "" && !c.later(ns.Type) {
			flags |= cloneFlags[ns.Type]
		}
	}
	return flags
}

// later: the cgroup namespace shows the cgroup that its maker is in, and the
// message queues of an IPC namespace belong to who its maker is.
func (c *creator) later(kind specs.LinuxNamespaceType) bool {
	return kind == specs.CgroupNamespace || kind == specs.TimeNamespace || kind == specs.IPCNamespace && c.mapped
}

func (c *creator) build() error {
	steps := []stage{
		{"users", c.joinUsers},
		{"session", c.begin},
		{"time", c.newClocks},
		{"user", c.becomeRoot},
		{"time", c.enterClocks},
		{"label", c.label},
		{"keyring", c.keyring},
		{"namespace", c.namespace},
		{"root", c.attachRoot},
		{"mount", c.mounts},
		{"mount", c.devices},
		{"terminal", func() error { return c.terminal(c.s.Terminal, true) }},
		{"hooks", c.hold},
		{"pivot", c.pivot},
		{"cwd", c.makeCwd},
		{"mask", c.masks},
		{"cwd", c.enterCwd},
	}
	c.tolerate = []unix.Errno{unix.ENOENT, unix.EACCES, unix.ENOEXEC, unix.ENOTDIR, unix.EINVAL, unix.EPERM, unix.ETXTBSY, unix.ELOOP}
	return c.add(slices.Concat(steps, c.process(), []stage{{"ready", c.ready}}, c.execution(), []stage{{"complaint", c.complain}}))
}

// complain tells the container's user, as who started it may not have made it
// and then doesn't see why its process ends.
func (c *creator) complain() error {
	text := fmt.Sprintf("exec: %q: it is there and can't be executed: its interpreter or loader is missing, or it is no program of this machine\n", c.program())
	c.Call("tell", unix.SYS_WRITE, 2, c.Bytes([]byte(text)), uintptr(len(text))).Tolerate(unix.EBADF, unix.EPIPE, unix.EIO, unix.EAGAIN, unix.ENOSPC)
	return nil
}

// joinUsers enters the user namespace of others, as its root, and from there
// new namespaces.
func (c *creator) joinUsers() error {
	if c.users < 0 {
		return nil
	}
	c.Call("join", unix.SYS_SETNS, uintptr(c.users), unix.CLONE_NEWUSER)
	c.rootOfUsers()
	if hasNamespace(c.spec, specs.PIDNamespace) {
		c.Refork(c.namespaces())
	} else {
		c.Call("namespaces", unix.SYS_UNSHARE, uintptr(c.namespaces()))
	}
	return nil
}

func (m *member) rootOfUsers() {
	m.Call("groups", unix.SYS_SETGROUPS, 0, 0).Tolerate(unix.EPERM)
	m.Call("group 0", unix.SYS_SETRESGID, 0, 0, 0)
	m.Call("user 0", unix.SYS_SETRESUID, 0, 0, 0)
}

// MakesClocks says whether the container has a time namespace of its own. Its
// process has a gate more, before all others, at which it isn't in it yet.
func MakesClocks(s *specs.Spec) bool { return hasNamespace(s, specs.TimeNamespace) }

// newClocks makes a time namespace for the process to enter later.
func (c *creator) newClocks() error {
	if MakesClocks(c.spec) {
		c.Call("namespace", unix.SYS_UNSHARE, unix.CLONE_NEWTIME)
		c.tell()
	}
	return nil
}

func (c *creator) enterClocks() error {
	if MakesClocks(c.spec) {
		const own = "/proc/self/ns/time_for_children"
		open := c.Call(own, unix.SYS_OPENAT, atCWD, c.String(own), unix.O_RDONLY|unix.O_CLOEXEC)
		open.Into(c.Call("enter", unix.SYS_SETNS, 0, unix.CLONE_NEWTIME), 0)
	}
	return nil
}

// becomeRoot makes the process root of its user namespace, once it is mapped.
func (c *creator) becomeRoot() error {
	c.wait()
	if c.mapped {
		c.rootOfUsers()
		c.dieWithParent()
	}
	return nil
}

func (c *creator) namespace() error {
	for _, kind := range []specs.LinuxNamespaceType{specs.CgroupNamespace, specs.IPCNamespace} {
		if hasNamespace(c.spec, kind) && c.later(kind) {
			c.Call(string(kind), unix.SYS_UNSHARE, uintptr(cloneFlags[kind]))
		}
	}
	if err := c.hostname(); err != nil {
		return err
	}
	if hasNamespace(c.spec, specs.NetworkNamespace) {
		c.loopback()
	}
	for key, value := range c.spec.Linux.Sysctl {
		if err := c.checkSysctl(key); err != nil {
			return err
		}
		file := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
		c.writeFile(sysctlStep+key+"="+value, file, value)
	}
	return nil
}

// loopback is up in a new network namespace.
func (c *creator) loopback() {
	ifreq := make([]byte, 40)
	copy(ifreq, "lo")
	const flags = unix.IFF_UP | unix.IFF_RUNNING
	ifreq[unix.IFNAMSIZ] = flags
	socket := c.Call("loopback", unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	socket.Into(c.Call("loopback", unix.SYS_IOCTL, 0, unix.SIOCSIFFLAGS, c.Bytes(ifreq)), 0)
}

// checkSysctl: one that isn't of a namespace would change the machine.
func (c *creator) checkSysctl(key string) error {
	needs := specs.LinuxNamespaceType("")
	switch {
	case strings.HasPrefix(key, "net."):
		needs = specs.NetworkNamespace
	case strings.HasPrefix(key, "fs.mqueue."), strings.HasPrefix(key, "kernel.shm"), strings.HasPrefix(key, "kernel.msg"), key == "kernel.sem":
		needs = specs.IPCNamespace
	case key == "kernel.domainname", key == "kernel.hostname":
		needs = specs.UTSNamespace
	}
	for _, ns := range c.spec.Linux.Namespaces {
		if needs == ns.Type {
			return nil
		}
	}
	return fmt.Errorf("sysctl %q is not in a separate kernel namespace", key)
}

// attachRoot enters the root. It is a clone made here, by which the child needs
// no way to it but the mount point.
func (c *creator) attachRoot() (err error) {
	dir := c.rootDir()
	if c.root, err = c.openTree(dir, true, mountOptions{}); err != nil {
		return err
	}
	joined, err := c.openJoined(specs.MountNamespace)
	if err != nil {
		return err
	}
	if joined >= 0 {
		// It becomes the container's: the root is changed for all who are in it.
		c.Call("join mount namespace", unix.SYS_SETNS, uintptr(joined), unix.CLONE_NEWNS)
	}
	private := uintptr(unix.MS_SLAVE)
	if p := c.spec.Linux.RootfsPropagation; p == "private" || p == "rprivate" {
		private = unix.MS_PRIVATE
	}
	c.Call("/", unix.SYS_MOUNT, 0, c.String("/"), 0, private|unix.MS_REC, 0)
	c.attach(c.root, dir)
	if c.old, err = c.reserve(c.theirs); err != nil {
		return err
	}
	open := c.Call("/", unix.SYS_OPENAT, atCWD, c.String("/"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	open.Into(c.Call("/", unix.SYS_DUP3, 0, uintptr(c.old), unix.O_CLOEXEC), 0)
	c.Call("enter", unix.SYS_FCHDIR, uintptr(c.root))
	c.Call("enter", unix.SYS_CHROOT, c.String("."))
	return nil
}

func (c *creator) rootDir() string {
	dir := c.spec.Root.Path
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(c.s.Bundle, dir)
	}
	return dir
}

// pivot leaves the chroot and makes the root the only one. Where the machine's
// root can't be pivoted from, as it is the kernel's first file system, it is
// covered instead.
func (c *creator) pivot() error {
	dot := c.String(".")
	c.Call("leave", unix.SYS_FCHDIR, uintptr(c.old))
	c.Call("leave", unix.SYS_CHROOT, dot)
	c.Call("enter", unix.SYS_FCHDIR, uintptr(c.root))
	if c.s.NoPivot {
		c.Call("move", unix.SYS_MOUNT, dot, c.String("/"), 0, unix.MS_MOVE, 0)
		c.Call("enter", unix.SYS_CHROOT, dot)
	} else {
		c.Call("pivot", unix.SYS_PIVOT_ROOT, dot, dot)
		c.Call("detach old", unix.SYS_UMOUNT2, dot, unix.MNT_DETACH)
	}
	c.Call("enter", unix.SYS_CHDIR, c.String("/"))
	c.closeOthers()
	if p := c.spec.Linux.RootfsPropagation; p != "" {
		flags, ok := propagations[p]
		if !ok {
			return fmt.Errorf("rootfsPropagation %q is none of private, shared, slave, unbindable and those with an r", p)
		}
		c.Call("propagation "+p, unix.SYS_MOUNT, 0, c.String("/"), 0, flags, 0)
	}
	return nil
}

func (c *creator) hold() error {
	if c.s.Hold {
		c.tell()
		c.wait()
	}
	return nil
}

// mask hides a path of any root file system: what it is shows only there. A
// directory can't be covered by a file.
func (c *creator) mask(p, null string) {
	c.Call(p, unix.SYS_OPENAT, atCWD, c.String(p), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC).Tolerate(unix.ENOENT, unix.ENOTDIR).Skip(3)
	open := c.openNull(null, unix.O_PATH)
	tree := c.Call(p, unix.SYS_OPEN_TREE, 0, c.String(""), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	open.Into(tree, 0)
	tree.Into(c.attach(-1, p).Tolerate(unix.ENOENT, unix.ENOTDIR).Skip(1), 0)
	c.Call(p, unix.SYS_MOUNT, c.String("tmpfs"), c.String(p), c.String("tmpfs"), unix.MS_RDONLY, c.String(strings.Join(c.withLabel("tmpfs", nil), ","))).Tolerate(unix.ENOENT, unix.ENOTDIR)
}

// masks also makes the root read-only, and what had to be writable until now.
func (c *creator) masks() error {
	null, err := c.nullPath()
	if err != nil {
		return err
	}
	for _, p := range c.spec.Linux.MaskedPaths {
		c.mask(p, null)
	}
	c.readonlyPaths()
	for _, m := range c.spec.Mounts {
		if o, err := parseMountOptions(m.Type, m.Options); err == nil && laterReadonly(m, o) {
			c.setReadonly(m.Destination)
		}
	}
	if c.spec.Root.Readonly {
		c.setReadonly("/")
	}
	return nil
}
