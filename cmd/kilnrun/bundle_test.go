//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// kilnrun builds the command once for all tests.
var kilnrun = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kilnrun")
	if err != nil {
		return "", err
	}
	built = dir
	out, err := exec.Command("go", "build", "-o", dir+"/kilnrun", ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir + "/kilnrun", nil
})

var built string // directory of what kilnrun built

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		if err := os.RemoveAll(built); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// runtimes are the binaries to compare.
func runtimes(t *testing.T) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it runs containers")
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("this test needs runc: %v", err)
	}
	ours, err := kilnrun()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"kilnrun": ours, "runc": runc}
}

// newBundle makes a bundle with busybox in a directory, and its spec.
func newBundle(t *testing.T, script string) (dir string, spec *specs.Spec) {
	t.Helper()
	dir = t.TempDir()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v", err)
	}
	bin := filepath.Join(dir, "rootfs/bin")
	if err := errors.Join(os.MkdirAll(bin, 0o755), os.WriteFile(filepath.Join(bin, "busybox"), busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields("sh cat id env hostname sort ls stat sed kill grep umask ip pwd echo sleep touch mknod") {
		if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
			t.Fatal(err)
		}
	}
	spec = container.Example()
	spec.Version = "1.0.2"
	spec.Process.Terminal, spec.Root.Readonly = false, false
	spec.Process.Args = []string{"sh", "-c", script}
	spec.Process.Env = []string{"PATH=/bin"}
	return dir, spec
}

func writeBundle(t *testing.T, dir string, spec *specs.Spec) {
	t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// result is what a user sees of a command.
type result struct {
	code           int
	stdout, stderr string
}

func invoke(t *testing.T, binary, root string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary, append([]string{"--root", root}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// look prints what a process sees of its surroundings.
const look = `
exec 2>&1
echo "== ids"; id -u; id -g; id -G
echo "== status"; grep -E '^(Cap|NoNewPrivs|Seccomp:|Umask|Groups|SigIgn|SigBlk)' /proc/self/status
echo "== limits"; cat /proc/self/limits
echo "== env"; env | sort
echo "== cwd"; pwd
echo "== names"; hostname; cat /proc/self/oom_score_adj
echo "== cgroup"; cat /proc/self/cgroup
echo "== mounts"; sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //; s/(master|shared|propagate_from):[0-9]+/\1/g' /proc/self/mountinfo | sort
echo "== dev"; ls -l /dev | sed -E 's/ +/ /g; s/ [A-Z][a-z]{2} [0-9 ]+:?[0-9]* / /' | sort
echo "== links"; ip link 2>&1 | sed -E 's/ qlen.*//' 
echo "== files"; ls /proc/self/fd
`

// known differences, which are on purpose: in both outputs they become the
// same.
var known = []struct {
	re *regexp.Regexp
	to string
}{
	// What is mounted read-only shows so: as the spec says of cgroups.
	{regexp.MustCompile(`(?m)^/ /sys/fs/cgroup r[ow],`), "/ /sys/fs/cgroup ro,"},
	// The source of a mount without a device is a name that means nothing.
	{regexp.MustCompile(` - cgroup systemd rw`), " - cgroup cgroup rw"},
}

func normal(s, id string) string {
	s = strings.ReplaceAll(s, id, "ID")
	for _, k := range known {
		s = k.re.ReplaceAllString(s, k.to)
	}
	return s
}

func ptr[T any](v T) *T { return &v }

// What a process sees is the same as with runc.
func TestSameAsRunc(t *testing.T) {
	cases := map[string]func(s *specs.Spec, source string){
		"example":        func(*specs.Spec, string) {},
		"read-only root": func(s *specs.Spec, _ string) { s.Root.Readonly = true },
		"user": func(s *specs.Spec, _ string) {
			s.Process.User = specs.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{5, 6}, Umask: ptr(uint32(0o27))}
		},
		"capabilities": func(s *specs.Spec, _ string) {
			caps := []string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_NET_RAW"}
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps[:2], Permitted: caps, Inheritable: caps, Ambient: caps[:1]}
			s.Process.NoNewPrivileges = false
		},
		"user with capabilities": func(s *specs.Spec, _ string) {
			s.Process.User.UID = 1000
			caps := []string{"CAP_CHOWN", "CAP_KILL"}
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps, Inheritable: caps, Ambient: caps}
		},
		"no capabilities": func(s *specs.Spec, _ string) { s.Process.Capabilities = &specs.LinuxCapabilities{} },
		"limits": func(s *specs.Spec, _ string) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}, {Type: "RLIMIT_NPROC", Soft: 300, Hard: 400}}
			s.Process.OOMScoreAdj = ptr(321)
		},
		"environment and directory": func(s *specs.Spec, _ string) {
			s.Process.Env, s.Process.Cwd = append(s.Process.Env, "A=b", "HOME=/h", "E="), "/made/here"
		},
		"cgroup path": func(s *specs.Spec, _ string) { s.Linux.CgroupsPath = "/kilntest-differ" },
		"binds": func(s *specs.Spec, source string) {
			s.Mounts = append(s.Mounts,
				specs.Mount{Destination: "/data", Type: "bind", Source: source, Options: []string{"rbind", "rw"}},
				specs.Mount{Destination: "/deep/ro", Type: "bind", Source: source, Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}},
				specs.Mount{Destination: "/etc/file", Type: "bind", Source: filepath.Join(source, "file"), Options: []string{"rbind", "rprivate", "ro"}},
				specs.Mount{Destination: "/dev/shm/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"noatime", "size=4k", "mode=1777"}})
		},
		"relative source": func(s *specs.Spec, _ string) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "none", Source: "rootfs/bin", Options: []string{"bind"}})
		},
		"private propagation": func(s *specs.Spec, _ string) { s.Linux.RootfsPropagation = "rprivate" },
		"devices": func(s *specs.Spec, _ string) {
			s.Linux.Devices = []specs.LinuxDevice{
				{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: ptr(os.FileMode(0o640)), UID: ptr(uint32(7)), GID: ptr(uint32(8))},
				{Path: "/dev/sub/loop", Type: "b", Major: 7, Minor: 0},
			}
		},
		"host network": func(s *specs.Spec, _ string) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		},
		"without cgroup namespace": func(s *specs.Spec, _ string) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
		},
		"sysctl": func(s *specs.Spec, _ string) {
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "123456"}
			s.Process.Args[2] += "\ncat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax"
		},
		"seccomp": func(s *specs.Spec, _ string) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mknodat", "mknod"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(38))}}}
			s.Process.Args[2] += "\nmknod /x p; echo $?"
		},
		"device rules": func(s *specs.Spec, _ string) {
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_MKNOD"}, Effective: []string{"CAP_MKNOD"}, Permitted: []string{"CAP_MKNOD"}}
			s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(10)), Minor: ptr(int64(229)), Access: "m"})
			s.Process.Args[2] += "\nmknod /fuse c 10 229; echo $?; cat /fuse; echo $?; mknod /sda b 8 0; echo $?; cat /dev/zero | dd count=1 >/dev/null; echo $?"
		},
		"resources": func(s *specs.Spec, _ string) {
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: ptr(int64(64 << 20)), Swap: ptr(int64(96 << 20)), Reservation: ptr(int64(32 << 20))}
			s.Linux.Resources.CPU = &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Cpus: "0"}
			s.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(33))}
			s.Process.Args[2] += "\ncd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes memory/memory.soft_limit_in_bytes cpu/cpu.shares cpu/cpu.cfs_quota_us cpuset/cpuset.cpus pids/pids.max"
		},
		"exit status": func(s *specs.Spec, _ string) { s.Process.Args[2] = "exit 42" },
		"killed":      func(s *specs.Spec, _ string) { s.Process.Args[2] = "sh -c 'kill -9 $$'; exit $?" },
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			id := fmt.Sprintf("kilntest-%d", os.Getpid())
			got := map[string]result{}
			source := t.TempDir()
			if err := os.WriteFile(filepath.Join(source, "file"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			for name, binary := range runtimes(t) {
				bundle, spec := newBundle(t, look)
				change(spec, source)
				writeBundle(t, bundle, spec)
				r := invoke(t, binary, t.TempDir(), "run", "--bundle", bundle, id)
				got[name] = result{r.code, strings.ReplaceAll(normal(r.stdout, id), bundle, "BUNDLE"), r.stderr}
			}
			ours, theirs := got["kilnrun"], got["runc"]
			if ours.code != theirs.code || ours.code != 0 && !slices.Contains([]string{"exit status", "killed"}, name) {
				t.Errorf("exit code %d, runc's is %d\n%s%s", ours.code, theirs.code, ours.stderr, theirs.stderr)
			}
			compare(t, ours.stdout, theirs.stdout)
		})
	}
}

// compare reports the lines that only one of two texts has.
func compare(t *testing.T, ours, theirs string) {
	t.Helper()
	a, b := strings.Split(ours, "\n"), strings.Split(theirs, "\n")
	for _, line := range a {
		if !slices.Contains(b, line) {
			t.Errorf("only kilnrun: %s", line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			t.Errorf("only runc: %s", line)
		}
	}
}
