//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/native"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// newBundle makes a bundle with busybox that runs a script. Its FIFO /wait
// keeps a script waiting, and is opened by release.
func newBundle(t *testing.T, script string) (dir string, spec *specs.Spec) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces")
	}
	dir = t.TempDir()
	bin := filepath.Join(dir, "rootfs/bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v", err)
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields("sh cat id echo hostname sleep stat tty kill ls") {
		if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(dir, "rootfs/wait"), 0o666); err != nil {
		t.Fatal(err)
	}
	spec = Example()
	spec.Process.Terminal, spec.Root.Readonly = false, false
	spec.Process.Args = []string{"sh", "-c", script}
	spec.Process.Env = []string{"PATH=/bin"}
	return dir, spec
}

// release lets a script that reads from /wait go on.
func release(t *testing.T, bundle string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(bundle, "rootfs/wait"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
}

// box is a container under test.
type box struct {
	*testing.T
	*Container
	p      *Process
	r      *Runtime
	out    *os.File // all it writes
	bundle string
}

// createBox creates a container, which is deleted with the test, and checks
// that nothing of it is left then.
func createBox(t *testing.T, bundle string, spec *specs.Spec) *box {
	t.Helper()
	b, err := tryCreate(t, bundle, spec)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tryCreate(t *testing.T, bundle string, spec *specs.Spec) (*box, error) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close(); null.Close() })
	r := New(t.TempDir())
	id := fmt.Sprintf("kilntest-%d-%s", os.Getpid(), filepath.Base(bundle))
	c, p, err := r.Create(context.Background(), id, spec, Options{IO: IO{Stdio: [3]*os.File{null, out, out}}, Bundle: bundle})
	t.Cleanup(func() {
		tree, err := cgroup.Detect()
		if err != nil {
			t.Fatal(err)
		}
		groups, err := newGroups(tree, spec.Linux.CgroupsPath, id)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range groups.dirs() {
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("cgroup %s is left", dir)
			}
		}
		if left, err := r.List(); err != nil || len(left) > 0 {
			t.Errorf("containers %v are left, error %v", left, err)
		}
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		if err := c.Delete(context.Background(), true); err != nil {
			t.Error(err)
		}
		p.Wait(context.Background(), endTimeout) //nolint:errcheck // most tests have waited for it
	})
	return &box{t, c, p, r, out, bundle}, nil
}

func (b *box) status(want Status) {
	b.Helper()
	again, err := b.r.Load(b.ID) // as another process would see it
	if err != nil {
		b.Fatal(err)
	}
	if s, err := again.Status(); err != nil || s != want {
		b.Errorf("status %v (%v), want %v", s, err, want)
	}
}

func (b *box) start() {
	b.Helper()
	if err := b.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
}

// end waits for the end and returns the exit code and what was written.
func (b *box) end() (int, string) {
	b.Helper()
	s, err := b.p.Wait(context.Background(), 0)
	if err != nil {
		b.Fatal(err)
	}
	text, err := os.ReadFile(b.out.Name())
	if err != nil {
		b.Fatal(err)
	}
	return s.Code(), string(text)
}

func TestLifecycle(t *testing.T) {
	ctx := context.Background()
	bundle, spec := newBundle(t, "echo $HOME $$; read x </wait; exit 7")
	b := createBox(t, bundle, spec)
	b.status(Created)
	if err := b.Pause(ctx); err != nil {
		t.Error(err)
	}
	if err := b.Container.Groups.freeze(ctx, false); err != nil {
		t.Error(err)
	}
	var status *StatusError
	if err := b.Resume(ctx); !errors.As(err, &status) || status.Status != Created {
		t.Errorf("resume a created one: %v", err)
	}
	b.start()
	b.status(Running)
	if err := b.Start(ctx); !errors.As(err, &status) || status.Status != Running {
		t.Errorf("start twice: %v", err)
	}
	if err := b.Delete(ctx, false); err == nil || !strings.Contains(err.Error(), "that is not stopped: running") {
		t.Errorf("delete a running one: %v", err)
	}
	if err := b.Pause(ctx); err != nil {
		t.Error(err)
	}
	b.status(Paused)
	if _, err := b.Exec(ctx, spec.Process, ExecOptions{}); err == nil || !strings.Contains(err.Error(), "paused") {
		t.Errorf("exec in a paused one: %v", err)
	}
	if err := b.Resume(ctx); err != nil {
		t.Error(err)
	}
	b.status(Running)
	if pids, err := b.Processes(); err != nil || len(pids) != 1 || pids[0] != b.p.Pid {
		t.Errorf("processes %v, %v; want %d", pids, err, b.p.Pid)
	}
	if s, err := b.Stats(); err != nil || s.Pids.Current == 0 {
		t.Errorf("stats %+v, %v", s, err)
	}
	release(t, bundle)
	if code, out := b.end(); code != 7 || out != "/ 1\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
	b.status(Stopped)
	if err := b.Signal(ctx, unix.SIGTERM, false); !errors.Is(err, ErrNotRunning) {
		t.Errorf("signal an ended one: %v", err)
	}
}

func TestSameIDTwice(t *testing.T) {
	bundle, spec := newBundle(t, "exit 0")
	b := createBox(t, bundle, spec)
	if _, _, err := b.r.Create(context.Background(), b.ID, spec, Options{Bundle: bundle}); !errors.Is(err, ErrExist) {
		t.Errorf("error %v", err)
	}
	b.status(Created)
	if _, err := b.r.Load("nobody"); !errors.Is(err, ErrNotExist) {
		t.Errorf("load: %v", err)
	}
	if _, err := b.r.Load("../x"); err == nil || !strings.Contains(err.Error(), "invalid container ID") {
		t.Errorf("load: %v", err)
	}
}

// A created container that is paused is neither started nor deleted before it is
// resumed, and created again then.
func TestPauseCreated(t *testing.T) {
	ctx := context.Background()
	bundle, spec := newBundle(t, "exit 3")
	b := createBox(t, bundle, spec)
	if err := b.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	for op, do := range map[string]func() error{
		"start": func() error { return b.Start(ctx) }, "delete": func() error { return b.Delete(ctx, false) }, "pause": func() error { return b.Pause(ctx) },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "paused") {
			t.Errorf("%s: %v", op, err)
		}
	}
	if err := b.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if s, err := b.Status(); err != nil || s != Created {
		t.Errorf("status %v, %v", s, err)
	}
	b.start()
	if code, _ := b.end(); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

func TestKillPaused(t *testing.T) {
	ctx := context.Background()
	bundle, spec := newBundle(t, "read x </wait")
	b := createBox(t, bundle, spec)
	b.start()
	if err := b.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := b.Signal(ctx, unix.SIGKILL, false); err != nil {
		t.Fatal(err)
	}
	if code, _ := b.end(); code != 137 {
		t.Errorf("exit code %d", code)
	}
}

func TestSignalAll(t *testing.T) {
	bundle, spec := newBundle(t, "trap 'exit 5' TERM; sleep 1000 & read x </wait & wait")
	spec.Process.Args = []string{"sh", "-c", "trap 'exit 5' TERM; sleep 1000 & echo ready >/wait; wait"}
	b := createBox(t, bundle, spec)
	f, err := os.OpenFile(filepath.Join(bundle, "rootfs/wait"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b.start()
	if _, err := f.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if err := b.Signal(context.Background(), unix.SIGTERM, true); err != nil {
		t.Fatal(err)
	}
	if code, out := b.end(); code != 5 && code != 143 {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// exec runs a script in a running container and returns what it prints.
func (b *box) exec(change func(*specs.Process), script string) (int, string) {
	b.Helper()
	p := *b.Spec.Process
	p.Args = []string{"sh", "-c", script}
	if change != nil {
		change(&p)
	}
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	proc, err := b.Exec(context.Background(), &p, ExecOptions{IO: IO{Stdio: [3]*os.File{null, w, w}}})
	w.Close()
	if err != nil {
		b.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		b.Fatal(err)
	}
	s, err := proc.Wait(context.Background(), 0)
	if err != nil {
		b.Fatal(err)
	}
	return s.Code(), string(out)
}

func TestExec(t *testing.T) {
	bundle, spec := newBundle(t, "hostname; read x </wait")
	spec.Hostname = "inside"
	b := createBox(t, bundle, spec)
	b.start()
	for name, tc := range map[string]struct {
		change func(*specs.Process)
		script string
		code   int
		want   string
	}{
		"same namespaces": {script: "hostname; kill -0 1 && echo same pids", want: "inside\nsame pids\n"},
		"exit code":       {script: "exit 9", code: 9},
		"user":            {change: func(p *specs.Process) { p.User.UID, p.User.GID = 1000, 1001 }, script: "id -u; id -g", want: "1000\n1001\n"},
		"environment":     {change: func(p *specs.Process) { p.Env = append(p.Env, "A=b") }, script: "echo $A", want: "b\n"},
		"directory":       {change: func(p *specs.Process) { p.Cwd = "/bin" }, script: "pwd", want: "/bin\n"},
		"processors": {
			change: func(p *specs.Process) { p.ExecCPUAffinity = &specs.CPUAffinity{Initial: "0", Final: "0"} },
			script: "while read k v; do case $k in Cpus_allowed_list:) echo $v;; esac; done </proc/self/status", want: "0\n",
		},
		"own files only": {script: "cd /proc/self/fd; echo *", want: "0 1 2 3\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if code, out := b.exec(tc.change, tc.script); code != tc.code || out != tc.want {
				t.Errorf("exit code %d, output %q; want %d, %q", code, out, tc.code, tc.want)
			}
		})
	}
	for program, want := range map[string]error{"nonexist": native.ErrNotInPath, "/nonexist": unix.ENOENT, "/bin": unix.EACCES} {
		p := *spec.Process
		p.Args = []string{program}
		_, err := b.Exec(context.Background(), &p, ExecOptions{IO: IO{Stdio: [3]*os.File{os.Stdin, os.Stdout, os.Stderr}}})
		var exec *native.ExecError
		if !errors.As(err, &exec) || !errors.Is(err, want) {
			t.Errorf("exec %s: %v, want %v", program, err, want)
		}
	}
}

// joins has a container join another's namespace.
func joins(kind specs.LinuxNamespaceType, path string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == kind {
				s.Linux.Namespaces[i].Path = path
			}
		}
	}
}

func TestCreateFails(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"program":   {func(s *specs.Spec) { s.Process.Args = []string{"nonexist"} }, `exec: "nonexist": executable file not found in $PATH`},
		"directory": {func(s *specs.Spec) { s.Process.Args = []string{"/bin"} }, `exec: "/bin": permission denied`},
		"mount source": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: "/nonexist", Options: []string{"bind"}})
		}, "/nonexist: no such file"},
		"mount type": {func(s *specs.Spec) { s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "nofs"}) }, "set up container: mount /m (nofs): no such device"},
		"mount option": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "tmpfs", Options: []string{"nosuid", "size=lots"}})
		}, "mount /m (tmpfs size=lots"},
		"sysctl":         {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"vm.swappiness": "1"} }, "not in a separate kernel namespace"},
		"unknown sysctl": {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.none": "1"} }, "namespace sysctl net.none=1: no such file or directory: this kernel has no such setting"},
		"sysctl value":   {func(s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "x"} }, "namespace sysctl net.ipv4.ip_forward=x: invalid argument: it refuses the value"},
		"host name":      {func(s *specs.Spec) { s.Hostname = strings.Repeat("x", 65) }, "invalid argument: a name has 64 bytes at most"},
		"open files":     {func(s *specs.Spec) { s.Process.Rlimits[0].Hard = 1 << 40 }, "it can't be higher than /proc/sys/fs/nr_open"},
		"directory on a file": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/bin/busybox", Type: "bind", Source: "/tmp", Options: []string{"bind"}})
		}, "mount of /tmp: it is a directory, and /bin/busybox in the container is a file"},
		"file on a directory": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/bin", Type: "bind", Source: "/etc/passwd", Options: []string{"bind"}})
		}, "mount of /etc/passwd: it is a file, and /bin in the container is a directory"},
		"user without mapping": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 10}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
			s.Process.User.UID = 500
		}, "user user 500: invalid argument: the container's user namespace doesn't have the id"},
		"overlapping mappings": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
			s.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 10}, {ContainerID: 5, HostID: 200000, Size: 10}}
			s.Linux.GIDMappings = s.Linux.UIDMappings
		}, "ranges may not be empty, overlap"},
		"network that is none":     {joins(specs.NetworkNamespace, "/etc/passwd"), "join network namespace /etc/passwd: it is no namespace"},
		"network that isn't there": {joins(specs.NetworkNamespace, "/nonexist"), "join network namespace /nonexist: no such file"},
		"network of another kind":  {joins(specs.NetworkNamespace, "/proc/self/ns/ipc"), "join network namespace /proc/self/ns/ipc: it is a namespace of another kind"},
		"mounts of another kind":   {joins(specs.MountNamespace, "/proc/self/ns/ipc"), "join mount namespace /proc/self/ns/ipc: it is a namespace of another kind"},
		"device rule":              {func(s *specs.Spec) { s.Linux.Resources.Devices[0].Type = "x" }, `linux.resources.devices: type "x"`},
		"device that is something else": {func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/bin/busybox", Type: "c", Major: 1, Minor: 3}}
		}, "device /bin/busybox: the root file system has something else there"},
		"relative device": {func(s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "dev/x", Type: "c"}} }, "device dev/x: its path must be absolute"},
		"architecture": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_Z80"}}
		}, `linux.seccomp: architecture "SCMP_ARCH_Z80"`},
		"flag of a filter": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"X"}}
		}, `linux.seccomp.flags: "X"`},
		"filter that refuses users": {func(s *specs.Spec) {
			s.Process.NoNewPrivileges = false
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
		}, "set up container: user bounding set: function not implemented: its seccomp profile refuses"},
		"filter that kills": {func(s *specs.Spec) {
			s.Process.NoNewPrivileges = false
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"setresuid"}, Action: specs.ActKillProcess}}}
		}, "or its seccomp profile kills"},
		"scheduler": {func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_X"} }, `process.scheduler.policy "SCHED_X"`},
		"io priority": {func(s *specs.Spec) {
			s.Process.IOPriority = &specs.LinuxIOPriority{Class: "IOPRIO_CLASS_BE", Priority: 8}
		}, "priority 8 is not one of 0 to 7"},
		"users to join": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: "/nonexist"})
		}, "join user namespace /nonexist: no such file"},
		"mount with ids that isn't a bind": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "tmpfs", UIDMappings: []specs.LinuxIDMapping{{Size: 1}}})
		}, "they are for binds"},
		"mount with users and no groups": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: "/", Options: []string{"bind"}, UIDMappings: []specs.LinuxIDMapping{{Size: 1}}})
		}, "needs uidMappings and gidMappings"},
		"copy-up in another mount": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/dev/shm/x", Type: "tmpfs", Options: []string{"tmpcopyup"}})
		}, "it is for directories of the root file system"},
		"root": {func(s *specs.Spec) { s.Root.Path = "none" }, "root.path"},
		"clocks": {func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1 << 62}}
		}, `set linux.timeOffsets "monotonic 4611686018427387904 0"`},
		"domain name":             {func(s *specs.Spec) { s.Domainname = strings.Repeat("y", 65) }, "set up container: namespace domain name yyy"},
		"propagation":             {func(s *specs.Spec) { s.Linux.RootfsPropagation = "odd" }, `set up container: pivot: rootfsPropagation "odd"`},
		"working directory":       {func(s *specs.Spec) { s.Process.Cwd = "/bin/busybox/x" }, "set up container: cwd /bin/busybox/x: not a directory"},
		"masked path of no end":   {func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"/" + strings.Repeat("x", 256)} }, ": file name too long"},
		"read-only path":          {func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"/" + strings.Repeat("x", 256)} }, "set up container: mask /xxx"},
		"scheduler's priority":    {func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{Policy: "SCHED_FIFO"} }, "set up container: scheduler process.scheduler SCHED_FIFO: invalid argument"},
		"limit of the processors": {func(s *specs.Spec) { s.Linux.Resources.CPU = &specs.LinuxCPU{Cpus: "9999"} }, "set limit cpuset.cpus to 9999"},
		"effective capabilities":  {func(s *specs.Spec) { s.Process.Capabilities.Permitted = nil }, "set up container: user capabilities: operation not permitted: those of process.capabilities.effective"},
		"filter that is too large": {func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
			for i := range uint64(3000) {
				arg := specs.LinuxSeccompArg{Value: i, Op: specs.OpEqualTo}
				s.Linux.Seccomp.Syscalls = append(s.Linux.Seccomp.Syscalls, specs.LinuxSyscall{Names: []string{"getpriority"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{arg}})
			}
		}, "the kernel takes at most 4096"},
		"filter that asks somebody":         {func(s *specs.Spec) { s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActNotify} }, "action SCMP_ACT_NOTIFY: there are no seccomp agents"},
		"capability that nobody is told of": {func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_FLY"} }, `unknown capability "CAP_FLY"`},
		"rlimit":                            {func(s *specs.Spec) { s.Process.Rlimits[0].Type = "RLIMIT_X" }, "RLIMIT_X"},
		"terminal":                          {func(s *specs.Spec) { s.Process.Terminal = true }, "console socket"},
		"cgroup":                            {func(s *specs.Spec) { s.Linux.CgroupsPath = "a.slice:b:c" }, "systemd"},
		"hook": {func(s *specs.Spec) {
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo bad; exit 3"}}}}
		}, "run createRuntime hook /bin/sh: exit status 3: bad"},
		"hook of the machine takes too long": {func(s *specs.Spec) {
			limit := 1
			s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/busybox", Args: []string{"sleep", "1000"}, Timeout: &limit}}}
		}, "run createRuntime hook /bin/busybox: it took longer than its timeout of 1s"},
		"hook takes too long": {func(s *specs.Spec) {
			limit := 1
			s.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/busybox", Args: []string{"sleep", "1000"}, Timeout: &limit}}}
		}, "longer than its timeout of 1s"},
	} {
		t.Run(name, func(t *testing.T) {
			bundle, spec := newBundle(t, "exit 0")
			tc.change(spec)
			_, err := tryCreate(t, bundle, spec)
			if name == "cgroup" {
				spec.Linux.CgroupsPath = ""
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
}

// A program that is there and can't be executed is told when it is started.
func TestStartFails(t *testing.T) {
	bundle, spec := newBundle(t, "")
	if err := os.WriteFile(filepath.Join(bundle, "rootfs/script"), []byte("#!/nonexist\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec.Process.Args = []string{"/script"}
	b := createBox(t, bundle, spec)
	if err := b.p.Failure(); err != nil {
		t.Errorf("before the start: %v", err)
	}
	b.start()
	var exec *native.ExecError
	if err := b.p.Failure(); !errors.As(err, &exec) || !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v", err)
	}
	// Who starts it with another command sees this.
	if code, out := b.end(); code != 1 || !strings.HasPrefix(out, `exec: "/script": it is there and can't be executed`) {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

func TestHooks(t *testing.T) {
	ctx := context.Background()
	bundle, spec := newBundle(t, "echo program >>/log")
	spec.Annotations = map[string]string{"org.example.a": "b"}
	log := filepath.Join(bundle, "rootfs/log")
	outside := func(name string) []specs.Hook {
		return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "read x; echo " + name + " $x >>" + log}, Env: []string{"PATH=/bin"}}}
	}
	inside := []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "read x; echo startContainer $x >>/log"}, Env: []string{"PATH=/bin"}}}
	spec.Hooks = &specs.Hooks{
		CreateRuntime: outside("createRuntime"), CreateContainer: outside("createContainer"), StartContainer: inside,
		Poststart: outside("poststart"), Poststop: outside("poststop"),
	}
	//lint:ignore SA1019 deprecated, and used
	spec.Hooks.Prestart = outside("prestart")
	spec.Process.Args[2] += "; read x </wait"
	b := createBox(t, bundle, spec)
	b.start()
	release(t, bundle)
	b.end()
	if err := b.Delete(ctx, false); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		name, state, _ := strings.Cut(strings.TrimSpace(line), " ")
		if state != "" {
			var s specs.State
			if err := json.Unmarshal([]byte(state), &s); err != nil {
				t.Fatalf("%s read %q: %v", name, state, err)
			}
			name += " " + string(s.Status)
			if s.Version != spec.Version || s.ID != b.ID || s.Bundle != bundle || !maps.Equal(s.Annotations, spec.Annotations) || (s.Pid == 0) != (s.Status == specs.StateStopped) {
				t.Errorf("%s read %+v", name, s)
			}
		}
		if name != "program" { // it and poststart run at the same time
			got = append(got, name)
		}
	}
	want := "prestart creating,createRuntime creating,createContainer creating,startContainer created,poststart running,poststop stopped"
	if strings.Join(got, ",") != want {
		t.Errorf("hooks ran: %v, want %s", got, want)
	}
	if !strings.Contains(string(text), "program\n") {
		t.Error("the program didn't run")
	}
}

func TestTerminal(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "console")
	defer theirs.Close()
	defer unix.Close(pair[0])
	bundle, spec := newBundle(t, "tty; stat -c %t:%T /dev/console; read x; echo got $x")
	spec.Process.Terminal = true
	spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	r := New(t.TempDir())
	c, p, err := r.Create(context.Background(), fmt.Sprintf("kilntest-%d-tty", os.Getpid()), spec, Options{IO: IO{Console: theirs}, Bundle: bundle})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Delete(context.Background(), true)
	name, oob := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d messages, %v", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		t.Fatal(err)
	}
	master := os.NewFile(uintptr(fds[0]), "master")
	defer master.Close()
	if size, err := unix.IoctlGetWinsize(fds[0], unix.TIOCGWINSZ); err != nil || size.Row != 33 || size.Col != 77 {
		t.Errorf("size %+v, %v", size, err)
	}
	if err := c.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := master.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(master)
	if err != nil && !errors.Is(err, unix.EIO) { // when its other end is closed
		t.Fatal(err)
	}
	for _, want := range []string{"/dev/pts/0\r\n", "88:0\r\n", "got hello\r\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output %q, want %q in it", out, want)
		}
	}
	if s, err := p.Wait(context.Background(), 0); err != nil || s.Code() != 0 {
		t.Errorf("%v, %v", s, err)
	}
}

func TestUserNamespace(t *testing.T) {
	bundle, spec := newBundle(t, "id -u; cat /proc/self/uid_map; echo x >/dev/null && stat -c %u /bin/busybox; stat -c %t:%T /etc/devices/null")
	// The machine's devices are bound, which aren't where a link of the root leads.
	if err := errors.Join(os.MkdirAll(filepath.Join(bundle, "rootfs/etc"), 0o755), os.Chown(filepath.Join(bundle, "rootfs/etc"), 100000, 100000), os.Symlink("etc/devices", filepath.Join(bundle, "rootfs/dev")),
		os.Chmod(filepath.Dir(bundle), 0o755), os.Chmod(bundle, 0o755), os.Chown(filepath.Join(bundle, "rootfs"), 100000, 100000)); err != nil {
		t.Fatal(err)
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	spec.Linux.GIDMappings = spec.Linux.UIDMappings
	b := createBox(t, bundle, spec)
	b.start()
	code, out := b.end()
	if fields := strings.Fields(out); code != 0 || strings.Join(fields, " ") != "0 0 100000 65536 65534 1:3" {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// What a creator that was killed leaves can be deleted.
func TestDeleteHalfCreated(t *testing.T) {
	r := New(t.TempDir())
	if _, err := r.reserve("half"); err != nil {
		t.Fatal(err)
	}
	c, err := r.Load("half")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := c.Status(); err != nil || s != Creating {
		t.Errorf("status %v, %v", s, err)
	}
	if err := c.Delete(context.Background(), false); err == nil {
		t.Error("deleted without force")
	}
	if err := c.Delete(context.Background(), true); err != nil {
		t.Error(err)
	}
	if _, err := r.Load("half"); !errors.Is(err, ErrNotExist) {
		t.Errorf("after delete: %v", err)
	}
}

// A process that has the number of the first one isn't it.
func TestReusedPid(t *testing.T) {
	c := &Container{dir: t.TempDir(), record: record{ID: "x", Pid: os.Getpid(), StartTime: 1}}
	if s, err := c.Status(); err != nil || s != Stopped {
		t.Errorf("status %v, %v", s, err)
	}
}

// Devices may be anywhere in a container, and its working directory is made even
// in a root that will be read-only. Links of the root mean nothing in what covers
// them.
func TestPlaces(t *testing.T) {
	bundle, spec := newBundle(t, "pwd; echo lost >/opt/a/nil && stat -c %F /opt/a/nil; ls -d /dev/shm /run/shm 2>&1; grep -c ' /dev/shm ' /proc/mounts")
	root := filepath.Join(bundle, "rootfs")
	if err := errors.Join(os.MkdirAll(filepath.Join(root, "dev"), 0o755), os.Symlink("/run/shm", filepath.Join(root, "dev/shm"))); err != nil {
		t.Fatal(err)
	}
	spec.Root.Readonly = true
	spec.Process.Cwd = "/some/where"
	spec.Linux.Devices = []specs.LinuxDevice{{Path: "/opt/a/nil", Type: "c", Major: 1, Minor: 3}}
	b := createBox(t, bundle, spec)
	b.start()
	code, out := b.end()
	if want := "/some/where\ncharacter special file\nls: /run/shm: No such file or directory\n/dev/shm\n1\n"; code != 0 || out != want {
		t.Errorf("exit code %d, output %q, want %q", code, out, want)
	}
}

// A profile that refuses everything refuses the program's start, and the process
// ends.
func TestFilterOfEverything(t *testing.T) {
	bundle, spec := newBundle(t, "")
	spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
	spec.Process.NoNewPrivileges = true
	b := createBox(t, bundle, spec)
	b.start()
	if code, _ := b.end(); code <= 128 {
		t.Errorf("exit code %d", code)
	}
}
