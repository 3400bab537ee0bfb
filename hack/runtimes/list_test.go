//go:build e2e

package runtimes

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What is the same in several cases.
var (
	usersRunc = []difference{
		{`^keyring: `, "runc lets others search it instead of its owner"},
		{`^dev: /dev/mqueue = `, "it belongs to the container's root, with runc to a group that it doesn't have"},
	}
	usersCrun = []difference{
		{`^keyring: `, "crun's belongs to nobody in the container"},
		{`^mount: /\S+ on /dev/`, "crun adds nosuid and noexec to devices"},
	}
	execCrun = []difference{
		{`^status: NS(pg|s)id = `, "crun leaves processes in the session of the caller"},
		{`^keyring: `, "crun leaves them in the caller's keyring"},
	}
)

var cases = []spec{
	{name: "example"},

	// Who the process is.
	{name: "user", change: func(s *specs.Spec, _ *bundle) {
		s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 6}, Umask: ptr(uint32(0o27))}
	}, facts: []string{"write:/x", "write:/tmp/x", "open:/dev/stdout"}},
	{name: "missing directory in a read-only root", change: func(s *specs.Spec, _ *bundle) {
		s.Root.Readonly, s.Process.Cwd = true, "/some/where"
	}, facts: []string{"stat:/some/where", "write:/some/where/x"}},
	{name: "device outside of /dev", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Devices = []specs.LinuxDevice{device("/opt/nil", "c", 1, 3)}
	}, facts: []string{"stat:/opt/nil", "open:/opt/nil"}},
	{name: "user without a name", change: func(s *specs.Spec, _ *bundle) { s.Process.User = specs.User{UID: 4711, GID: 4711} }},
	{name: "five capability sets", change: func(s *specs.Spec, _ *bundle) {
		all := []string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_NET_RAW"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all[:2], Permitted: all, Inheritable: all, Ambient: all[:1]}
	}},
	{name: "user with capabilities", change: func(s *specs.Spec, _ *bundle) {
		s.Process.User.UID = 1000
		all := []string{"CAP_CHOWN", "CAP_KILL"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all, Ambient: all}
	}},
	{name: "user without ambient capabilities", change: func(s *specs.Spec, _ *bundle) { s.Process.User.UID = 1000 }},
	{name: "empty capabilities", change: func(s *specs.Spec, _ *bundle) { s.Process.Capabilities = &specs.LinuxCapabilities{} }},
	{name: "no capabilities", change: func(s *specs.Spec, _ *bundle) { s.Process.Capabilities = nil }},
	{name: "unknown capability", change: func(s *specs.Spec, _ *bundle) {
		all := []string{"CAP_CHOWN", "CAP_FLY"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all, Ambient: all}
	}, tells: `ignoring unknown or unavailable capabilities: ["CAP_FLY"]`},
	{name: "new privileges", change: func(s *specs.Spec, _ *bundle) { s.Process.NoNewPrivileges = false }},
	{name: "user namespace", change: mapped, facts: []string{"stat:/etc/passwd", "stat:/dev/null", "write:/x"}, differs: map[string][]difference{"runc": usersRunc, "crun": usersCrun}},
	{name: "user in a user namespace", change: func(s *specs.Spec, b *bundle) {
		mapped(s, b)
		s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{7}}
	}, facts: []string{"write:/x", "open:/dev/null"}, differs: map[string][]difference{"runc": usersRunc, "crun": usersCrun}},
	{name: "user namespace with mounts and devices", change: func(s *specs.Spec, b *bundle) {
		mapped(s, b)
		mount(s, specs.Mount{Destination: "/data", Type: "bind", Source: b.shared, Options: []string{"rbind", "ro"}},
			specs.Mount{Destination: "/t", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=8k", "mode=1777"}})
		s.Linux.Devices = []specs.LinuxDevice{device("/dev/tty0", "c", 4, 0)}
	}, facts: []string{"stat:/data/sub/deep", "write:/t/x", "write:/data/x", "stat:/dev/tty0"}, differs: map[string][]difference{"runc": usersRunc, "crun": append(usersCrun, difference{`/dev/tty0`, "crun binds a device of its own making"})}},

	// What it has.
	{name: "rlimits", change: func(s *specs.Spec, _ *bundle) {
		s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NPROC", Soft: 300, Hard: 400}}
	}},
	{name: "no rlimits", change: func(s *specs.Spec, _ *bundle) { s.Process.Rlimits = nil }},
	{name: "oom score", change: func(s *specs.Spec, _ *bundle) { s.Process.OOMScoreAdj = ptr(321) }},
	{name: "environment", change: func(s *specs.Spec, _ *bundle) { s.Process.Env = append(s.Process.Env, "A=b", "HOME=/h", "E=", "A=c") }},
	{name: "home without value", change: func(s *specs.Spec, _ *bundle) { s.Process.Env = append(s.Process.Env, "HOME=") }},
	{name: "directory that is missing", change: func(s *specs.Spec, _ *bundle) { s.Process.Cwd = "/made/here" }, facts: []string{"stat:/made", "stat:/made/here"}},
	{name: "directory of a user", change: func(s *specs.Spec, b *bundle) {
		s.Process.User = specs.User{UID: 1000, GID: 1000}
		s.Process.Cwd = "/private"
		if err := os.Mkdir(b.root("private"), 0o700); err != nil {
			b.Fatal(err)
		}
		if err := os.Chown(b.root("private"), 1000, 1000); err != nil {
			b.Fatal(err)
		}
	}},
	{name: "program in PATH", change: func(s *specs.Spec, _ *bundle) {
		s.Process.Args = []string{"probe"}
		s.Process.Env = []string{"PATH=/nonexist:/bin"}
	}},
	{name: "names", change: func(s *specs.Spec, _ *bundle) { s.Hostname, s.Domainname = "some.host", "some.domain" }, lacks: map[string]string{"runc": "domainname came with 1.2"}},
	{name: "personality", change: func(s *specs.Spec, _ *bundle) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "LINUX32"} }, lacks: map[string]string{"runc": "it came with 1.2"}},
	{name: "preserved files", flags: []string{"--preserve-fds", "1"}, files: true},
	{name: "caller's keyring", flags: []string{"--no-new-keyring"}},

	// Where it is.
	{name: "network of the machine", change: func(s *specs.Spec, _ *bundle) { without(s, specs.NetworkNamespace) }},
	{name: "cgroup namespace of the machine", change: func(s *specs.Spec, _ *bundle) { without(s, specs.CgroupNamespace) }, differs: map[string][]difference{"crun": {{`memory`, "crun takes a relative path as one from the top"}}}},
	{name: "pids of the machine", change: func(s *specs.Spec, _ *bundle) { without(s, specs.PIDNamespace) }},
	{name: "names and ipc of the machine", change: func(s *specs.Spec, _ *bundle) {
		s.Hostname = ""
		without(s, specs.UTSNamespace)
		without(s, specs.IPCNamespace)
	}},
	{name: "network that is joined", change: func(s *specs.Spec, b *bundle) {
		join(s, specs.NetworkNamespace, sleeper(b, syscall.CLONE_NEWNET)+"net")
	}},
	{name: "names and ipc that are joined", change: func(s *specs.Spec, b *bundle) {
		ns := sleeper(b, syscall.CLONE_NEWUTS|syscall.CLONE_NEWIPC)
		join(s, specs.UTSNamespace, ns+"uts")
		join(s, specs.IPCNamespace, ns+"ipc")
	}},
	{name: "pids that are joined", change: func(s *specs.Spec, b *bundle) { join(s, specs.PIDNamespace, sleeper(b, syscall.CLONE_NEWPID)+"pid") }},
	{name: "sysctls", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "123456"}
	}, facts: []string{"read:/proc/sys/net/ipv4/ip_forward", "read:/proc/sys/kernel/shmmax"}},
	{name: "hooks", change: func(s *specs.Spec, b *bundle) {
		s.Hooks = &specs.Hooks{CreateRuntime: hook(b, "createRuntime"), CreateContainer: hook(b, "createContainer"), Poststop: hook(b, "poststop")}
		s.Hooks.Prestart = hook(b, "prestart") //lint:ignore SA1019 deprecated, and used
	}, facts: []string{"read:/log"}, differs: map[string][]difference{
		"runc": {{`^read: /log`, "the spec doesn't say where createContainer hooks are executed; here it is /"}},
		"crun": {{`^read: /log`, "the spec doesn't say where createContainer hooks are executed; here it is /"}},
	}},

	// Its file system.
	{name: "read-only root", change: func(s *specs.Spec, _ *bundle) { s.Root.Readonly = true }, facts: []string{"write:/x", "write:/dev/shm/x", "write:/dev/x"}},
	{name: "root without pivot", flags: []string{"--no-pivot"}, facts: []string{"list:/", "list:/..", "write:/x"}},
	{name: "binds", change: func(s *specs.Spec, b *bundle) {
		mount(s,
			specs.Mount{Destination: "/data", Type: "bind", Source: b.shared, Options: []string{"rbind", "rw"}},
			specs.Mount{Destination: "/deep/ro", Type: "bind", Source: b.shared, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
			specs.Mount{Destination: "/etc/file", Type: "bind", Source: filepath.Join(b.shared, "file"), Options: []string{"rbind", "rprivate", "ro"}})
	}, facts: []string{"list:/data", "list:/deep/ro", "read:/etc/file", "write:/deep/ro/x", "stat:/deep", "stat:/etc/file"}, differs: map[string][]difference{"crun": {{`^stat: /deep = `, "crun's directories above mount points are sticky"}}}},
	{name: "bind of a relative source", change: func(s *specs.Spec, _ *bundle) {
		mount(s, specs.Mount{Destination: "/m", Type: "none", Source: "rootfs/full", Options: []string{"bind"}})
	}, facts: []string{"list:/m"}},
	{name: "recursive read-only bind", change: func(s *specs.Spec, _ *bundle) {
		mount(s, specs.Mount{Destination: "/machine", Type: "bind", Source: "/dev", Options: []string{"rbind", "rro"}})
	}, facts: []string{"write:/machine/shm/kilntest", "write:/machine/kilntest"}},
	{name: "recursive bind that is read-only at the top", change: func(s *specs.Spec, _ *bundle) {
		mount(s, specs.Mount{Destination: "/machine", Type: "bind", Source: "/dev", Options: []string{"rbind", "ro"}})
	}, facts: []string{"write:/machine/kilntest"}},
	{name: "access times", change: func(s *specs.Spec, b *bundle) {
		mount(s, specs.Mount{Destination: "/a", Type: "bind", Source: b.shared, Options: []string{"bind", "noatime"}},
			specs.Mount{Destination: "/b", Type: "bind", Source: b.shared, Options: []string{"bind", "strictatime", "nodiratime"}},
			specs.Mount{Destination: "/c", Type: "tmpfs", Source: "tmpfs", Options: []string{"noatime", "size=4k"}})
	}},
	{name: "propagation of mounts", change: func(s *specs.Spec, b *bundle) {
		mount(s, specs.Mount{Destination: "/a", Type: "bind", Source: b.shared, Options: []string{"bind", "shared"}},
			specs.Mount{Destination: "/b", Type: "bind", Source: b.shared, Options: []string{"bind", "rslave"}},
			specs.Mount{Destination: "/c", Type: "bind", Source: b.shared, Options: []string{"bind", "unbindable"}})
	}, differs: map[string][]difference{"crun": {{`^mount: SHARED on /[ac]`, "crun leaves them private"}}}},
	{name: "private root", change: func(s *specs.Spec, _ *bundle) { s.Linux.RootfsPropagation = "rprivate" }},
	{name: "slave root", change: func(s *specs.Spec, _ *bundle) { s.Linux.RootfsPropagation = "rslave" }},
	{name: "shared root", change: func(s *specs.Spec, _ *bundle) { s.Linux.RootfsPropagation = "shared" }, differs: map[string][]difference{"runc": {{`^mount: BUNDLE/rootfs on / `, "runc leaves it private"}}}},
	{name: "tmpfs", change: func(s *specs.Spec, _ *bundle) {
		mount(s, specs.Mount{Destination: "/a", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=8k", "mode=1770", "uid=3", "gid=4"}},
			specs.Mount{Destination: "/full", Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: "/ro", Type: "tmpfs", Source: "tmpfs", Options: []string{"ro"}})
	}, facts: []string{"stat:/a", "stat:/full", "list:/full", "write:/ro/x"}, differs: map[string][]difference{
		"runc": {{`^mount: / on /full .* rw`, "runc sets the mode afterwards, so that it doesn't show in the options"}},
		"crun": {{`/full `, "crun's tmpfs has any mode, not that of the directory that it covers"}},
	}},
	{name: "mount at a link", change: func(s *specs.Spec, b *bundle) {
		if err := os.Symlink("/full", b.root("link")); err != nil {
			b.Fatal(err)
		}
		mount(s, specs.Mount{Destination: "/link/in", Type: "tmpfs", Source: "tmpfs"},
			specs.Mount{Destination: "/link", Type: "bind", Source: b.shared, Options: []string{"bind"}})
	}, facts: []string{"list:/full", "stat:/link"}},
	{name: "few mounts", change: func(s *specs.Spec, _ *bundle) {
		s.Mounts, s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}}, nil, nil
	}, lacks: map[string]string{"crun": "it doesn't make /dev"}},
	{name: "devices of the machine", change: func(s *specs.Spec, _ *bundle) {
		s.Mounts = []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev", Type: "bind", Source: "/dev", Options: []string{"rbind"}}}
	}},
	{name: "proc and sys", change: func(s *specs.Spec, _ *bundle) {
		setMount(s, "/proc", func(m *specs.Mount) { m.Options = []string{"nosuid", "noexec", "nodev", "hidepid=2"} })
		setMount(s, "/sys", func(m *specs.Mount) { m.Options = []string{"nosuid"} })
	}, differs: map[string][]difference{"crun": {{`^mount: /\S+ on /proc/\S+ ro`, "crun's read-only paths lose the other flags of /proc"}}}},
	{name: "masked and read-only paths", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.MaskedPaths = []string{"/proc/kcore", "/etc/passwd", "/full", "/nonexist", "/sys/firmware"}
		s.Linux.ReadonlyPaths = []string{"/proc/sys", "/etc", "/nonexist"}
	}, facts: []string{"read:/etc/passwd", "list:/full", "write:/full/x", "write:/etc/x", "write:/proc/sys/kernel/domainname"}, differs: map[string][]difference{"runc": {
		{`^env: HOME=`, "runc looks after masking /etc/passwd"},
		{`^mount: /null on /etc/passwd`, "runc masks after it has made paths read-only, which covers fewer mounts"},
	}}},
	{name: "no masks", change: func(s *specs.Spec, _ *bundle) { s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil }},

	// What it may do.
	{name: "devices", change: func(s *specs.Spec, _ *bundle) {
		fuse := device("/dev/fuse", "c", 10, 229)
		fuse.FileMode, fuse.UID, fuse.GID = ptr(os.FileMode(0o640)), ptr(uint32(7)), ptr(uint32(8))
		s.Linux.Devices = []specs.LinuxDevice{fuse, device("/dev/sub/loop", "b", 7, 0), device("/dev/pipe", "p", 0, 0)}
	}},
	{name: "default device with another mode", change: func(s *specs.Spec, _ *bundle) {
		null := device("/dev/null", "c", 1, 3)
		null.FileMode = ptr(os.FileMode(0o600))
		s.Linux.Devices = []specs.LinuxDevice{null}
	}, lacks: map[string]string{"runc": "it doesn't start"}},
	{name: "device rules", change: func(s *specs.Spec, _ *bundle) {
		s.Process.Capabilities = caps("CAP_MKNOD")
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
			specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(229)), Access: "rw"},
			specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: ptr(int64(7)), Access: "m"})
	}, facts: []string{"mknod:/fuse:c:10:229", "open:/fuse", "mknod:/sda:b:8:0", "open:/sda", "open:/dev/zero", "mknod:/full2:c:1:7", "open:/full2"}},
	{name: "all devices", change: func(s *specs.Spec, _ *bundle) {
		s.Process.Capabilities = caps("CAP_MKNOD")
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}, facts: []string{"mknod:/vda:b:254:0", "mknod:/mem:c:1:1"}},
	{name: "seccomp", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchAARCH64}, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"getpriority"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(38))},
			{Names: []string{"personality"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 0, Value: 8, Op: specs.OpEqualTo}}},
			{Names: []string{"umask"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(5)), Args: []specs.LinuxSeccompArg{{Index: 0, Value: 0o70, ValueTwo: 0o20, Op: specs.OpMaskedEqual}}},
		}}
	}, facts: []string{calls.getpriority, calls.personality + ":0xffffffff", calls.personality + ":8", calls.umask + ":0o22", calls.umask + ":0o27", calls.umask + ":0o33"}},
	{name: "seccomp with new privileges", change: func(s *specs.Spec, _ *bundle) {
		s.Process.NoNewPrivileges = false
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"getpriority"}, Action: specs.ActErrno}}}
	}, facts: []string{calls.getpriority}},
	{name: "seccomp that kills", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"getpriority"}, Action: specs.ActKillProcess}}}
	}, facts: []string{calls.getpriority}, code: 128 + int(syscall.SIGSYS)},
	{name: "memory, processors and processes", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(96 << 20)), Reservation: ptr(int64(32 << 20))}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0"}
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(33))}
	}},
	{name: "only some limits", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20))}
		s.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(-1))}
		s.Linux.Resources.CPU = &specs.LinuxCPU{Quota: ptr(int64(20000))}
	}, lacks: map[string]string{"crun": "no limit of processes is an error"}},
	{name: "absolute cgroup path", change: func(s *specs.Spec, b *bundle) {
		below(s, b, "/kilntest-parent")
		without(s, specs.CgroupNamespace)
	}},
	{name: "relative cgroup path", change: func(s *specs.Spec, b *bundle) {
		below(s, b, "kilntest-parent")
		without(s, specs.CgroupNamespace)
	}, differs: map[string][]difference{"crun": {{`memory`, "crun takes a relative path as one from the top"}}}},

	// What others may not have.
	{name: "scheduler", change: func(s *specs.Spec, _ *bundle) {
		s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_BATCH", Nice: 5}
	}, lacks: map[string]string{"runc": "it came with 1.2", "crun": "it came with 1.9"}, wants: []string{"schedule: policy 3 flags 0x0 nice 5 priority 0"}},
	{name: "io priority", change: func(s *specs.Spec, _ *bundle) {
		s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_BE", Priority: 6}
	}, lacks: map[string]string{"runc": "it came with 1.2", "crun": "it came with 1.9"}, wants: []string{"schedule: io class 2 level 6 errno 0"}},
	{name: "users that are joined", change: func(s *specs.Spec, b *bundle) {
		mapped(s, b)
		join(s, specs.UserNamespace, sleeperMapped(b, s.Linux.UIDMappings)+"user")
	}, facts: []string{"stat:/etc/passwd", "write:/x"}, differs: map[string][]difference{"runc": usersRunc, "crun": usersCrun}},
	{name: "mounts that are joined", change: func(s *specs.Spec, b *bundle) {
		join(s, specs.MountNamespace, sleeper(b, syscall.CLONE_NEWNS)+"mnt")
	}, lacks: map[string]string{"crun": "it starts nothing, and tells nothing"}},
	{name: "time namespace", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
		s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 172800, Nanosecs: 5}, "boottime": {Secs: 604800}}
	}, lacks: map[string]string{"runc": "it came with 1.2", "crun": "1.8 ends with an error on Linux 6"},
		wants: []string{"namespace: time = another", "process: timens_offsets = monotonic 172800 5 boottime 604800 0"}},
	{name: "tmpfs with copy-up", change: func(s *specs.Spec, b *bundle) {
		if err := os.Symlink("a", b.root("full/link")); err != nil {
			b.Fatal(err)
		}
		if err := os.Chown(b.root("full/sub/b"), 1000, 1001); err != nil {
			b.Fatal(err)
		}
		mount(s, specs.Mount{Destination: "/full", Type: "tmpfs", Source: "tmpfs", Options: []string{"tmpcopyup", "nosuid"}})
	}, facts: []string{"stat:/full", "list:/full", "read:/full/a", "stat:/full/link", "stat:/full/sub", "stat:/full/sub/b", "read:/full/sub/b", "write:/full/x"}, differs: map[string][]difference{
		"crun": {{`^stat: /full = `, "crun's tmpfs has any mode, not that of the directory that it covers"}},
	}},
	{name: "id-mapped mount", change: func(s *specs.Spec, b *bundle) {
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 5000, Size: 2000}}
		mount(s, specs.Mount{Destination: "/data", Type: "bind", Source: b.shared, Options: []string{"bind"}, UIDMappings: ids, GIDMappings: ids})
	}, facts: []string{"stat:/data", "stat:/data/sub/deep"}, lacks: map[string]string{"runc": "it came with 1.2"}},

	// How it ends.
	{name: "exit status", facts: []string{"exit:42"}, code: 42},
	{name: "killed", change: func(s *specs.Spec, _ *bundle) { without(s, specs.PIDNamespace) }, facts: []string{"kill:9"}, code: 137},
	{name: "no such program", change: func(s *specs.Spec, _ *bundle) { s.Process.Args = []string{"nonexist"} }, fails: true},
	{name: "program that isn't executable", change: func(s *specs.Spec, _ *bundle) { s.Process.Args = []string{"/etc/passwd"} }, fails: true},
	{name: "program without its interpreter", change: func(s *specs.Spec, b *bundle) {
		if err := os.WriteFile(b.root("script"), []byte("#!/nonexist\n"), 0o755); err != nil {
			b.Fatal(err)
		}
		s.Process.Args = []string{"/script"}
	}, fails: true, tells: "no such file or directory"},
	{name: "directory that is a file", change: func(s *specs.Spec, _ *bundle) { s.Process.Cwd = "/etc/passwd" }, fails: true},
	{name: "no such mount source", change: func(s *specs.Spec, _ *bundle) {
		mount(s, specs.Mount{Destination: "/m", Type: "bind", Source: "/nonexist", Options: []string{"bind"}})
	}, fails: true},
	{name: "sysctl of the machine", change: func(s *specs.Spec, _ *bundle) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "60"} }, fails: true},
	{name: "label without AppArmor", change: func(s *specs.Spec, _ *bundle) { s.Process.ApparmorProfile = "kilntest" }, fails: true},
	{name: "hook that fails", change: func(s *specs.Spec, _ *bundle) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/false"}}}
	}, fails: true},

	// Further processes.
	{name: "exec", exec: func(*specs.Process) {}, differs: map[string][]difference{"crun": execCrun}},
	{name: "exec as a user", exec: func(p *specs.Process) {
		p.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{9}}
		p.Capabilities = caps("CAP_NET_ADMIN")
		p.NoNewPrivileges = false
	}, differs: map[string][]difference{"crun": execCrun}},
	{name: "exec with an unknown capability", exec: func(p *specs.Process) { p.Capabilities = caps("CAP_CHOWN", "CAP_FLY") },
		tells: `ignoring unknown or unavailable capabilities: ["CAP_FLY"]`, differs: map[string][]difference{"crun": execCrun}},
	{name: "exec with surroundings of its own", exec: func(p *specs.Process) {
		p.Cwd, p.Env = "/etc", []string{"PATH=/bin", "A=b"}
		// runc 1.1 sometimes raises the soft limit to the hard one, as Go does at its start.
		p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 60, Hard: 60}}
		p.OOMScoreAdj = ptr(100)
	}, differs: map[string][]difference{
		"runc": {{`^process: oom_score_adj = `, "runc leaves it at the container's"}},
		"crun": append(execCrun, difference{`^process: oom_score_adj = `, "crun leaves it at the container's"}),
	}},
	{name: "exec in a user namespace", change: mapped, exec: func(*specs.Process) {}, facts: []string{"write:/x", "stat:/etc/passwd"}, differs: map[string][]difference{"runc": usersRunc, "crun": slices.Concat(usersCrun, execCrun)}},
	{name: "exec with seccomp", change: func(s *specs.Spec, _ *bundle) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"getpriority"}, Action: specs.ActErrno}}}
	}, exec: func(*specs.Process) {}, facts: []string{calls.getpriority}, differs: map[string][]difference{"crun": execCrun}},
	{name: "exec with a status", exec: func(*specs.Process) {}, facts: []string{"exit:7"}, code: 7, differs: map[string][]difference{"crun": execCrun}},
	{name: "exec of no such program", exec: func(p *specs.Process) { p.Args = []string{"nonexist"} }, fails: true},
}
