//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// A case is a process and what it shall print.
type observation struct {
	name   string
	script string
	change func(t *testing.T, p *Process)
	want   string // trimmed output
}

func observe(t *testing.T, cases []observation) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		for _, tc := range cases {
			t.Run(tc.name, func(t *testing.T) {
				p := process(t, tc.script)
				if tc.change != nil {
					tc.change(t, &p)
				}
				if out := strings.TrimSpace(output(t, e, p)); out != tc.want {
					t.Errorf("got  %q\nwant %q", out, tc.want)
				}
			})
		}
	})
}

func insecure(_ *testing.T, p *Process)    { p.Security = SecurityInsecure }
func noNetwork(_ *testing.T, p *Process)   { p.Network = NetNone }
func hostNetwork(_ *testing.T, p *Process) { p.Network = NetHost }

// compat: LLB-023
func TestIdentity(t *testing.T) {
	observe(t, []observation{
		{name: "pid 1 and nobody else", script: "echo $$; set -- /proc/[0-9]*; echo $#", want: "1\n1"},
		{name: "default hostname", script: "hostname", want: "buildkitsandbox"},
		{name: "hostname", script: "hostname", change: func(_ *testing.T, p *Process) { p.Hostname = "box" }, want: "box"},
		{name: "hosts", script: "cat /etc/hosts", want: "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback"},
		// compat: LLB-022
		{name: "extra hosts", script: "cat /etc/hosts", change: func(_ *testing.T, p *Process) {
			p.Hostname = "box"
			p.ExtraHosts = []HostIP{{"some.host", net.ParseIP("1.2.3.4")}, {"six", net.ParseIP("fe80::1")}}
		}, want: "127.0.0.1\tlocalhost box\n::1\tlocalhost ip6-localhost ip6-loopback\n1.2.3.4\tsome.host\nfe80::1\tsix"},
		{name: "hosts is read-only", script: "echo x > /etc/hosts || echo refused", want: "refused"},
		{name: "process group and session", script: "set -- $(cat /proc/1/stat); echo $5 $6", want: "1 1"},
		{name: "umask", script: "umask", want: "0022"},
		{name: "environment", change: func(_ *testing.T, p *Process) {
			p.Args = []string{"env"}
			p.Env = []string{"PATH=/bin", "A=1", "B=2", "A=3", "HOME="}
		}, want: "PATH=/bin\nA=3\nB=2\nHOME=/root"},
		{name: "HOME that is set", script: "echo $HOME", change: func(_ *testing.T, p *Process) {
			p.Env, p.User = append(p.Env, "HOME=/elsewhere"), "builder"
		}, want: "/elsewhere"},
	})
}

// compat: DMN-078
func TestNamespaces(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		for _, tc := range []struct {
			net  NetMode
			own  []string
			host []string
		}{
			{NetSandbox, []string{"pid", "ipc", "uts", "mnt"}, []string{"net", "user"}}, // compat: LLB-028
			{NetHost, []string{"pid", "ipc", "uts", "mnt"}, []string{"net", "user"}},
			{NetNone, []string{"pid", "ipc", "uts", "mnt", "net"}, []string{"user"}},
		} {
			p := process(t, "for n in pid ipc uts mnt net user; do readlink /proc/self/ns/$n; done")
			p.Network = tc.net
			out := output(t, e, p)
			for _, ns := range append(tc.own, tc.host...) {
				host, err := os.Readlink("/proc/self/ns/" + ns)
				if err != nil {
					t.Fatal(err)
				}
				if shared := strings.Contains(out, host); shared != slices.Contains(tc.host, ns) {
					t.Errorf("network mode %d: %s namespace shared with the machine: %v", tc.net, ns, shared)
				}
			}
		}
	})
}

// compat: DMN-076
func TestNoNetwork(t *testing.T) {
	observe(t, []observation{
		{name: "loopback alone, and up", script: "ls /sys/class/net; ip addr show lo | grep -c 'UP.*LOOPBACK\\|LOOPBACK.*UP'; ip addr show lo | grep -c 127.0.0.1/8", change: noNetwork, want: "lo\n1\n1"},
		{name: "the machine's network", script: "ls /sys/class/net | wc -l", change: hostNetwork, want: fmt.Sprint(countEntries(t, "/sys/class/net"))},
	})
}

func countEntries(t *testing.T, dir string) int {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// compat: LLB-029, LLB-C46
// compat: DMN-081
func TestConfinement(t *testing.T) {
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(own), "CapPrm:\t")
	all, _, _ := strings.Cut(rest, "\n")
	const status = "while read k v; do case $k in Cap*|NoNew*|Seccomp:) echo $k$v;; esac; done < /proc/self/status"
	device := "mknod /tmp/log c 1 11 && dd if=/tmp/log bs=8192 count=1 >/dev/null 2>&1 && echo readable || echo denied"
	observe(t, []observation{
		{name: "capabilities", script: status, want: "CapInh:0000000000000000\nCapPrm:00000000a80425fb\nCapEff:00000000a80425fb\nCapBnd:00000000a80425fb\nCapAmb:0000000000000000\nNoNewPrivs:0\nSeccomp:2"},
		{name: "capabilities of a user", script: status, change: func(_ *testing.T, p *Process) { p.User = "builder" },
			want: "CapInh:0000000000000000\nCapPrm:0000000000000000\nCapEff:0000000000000000\nCapBnd:00000000a80425fb\nCapAmb:0000000000000000\nNoNewPrivs:0\nSeccomp:2"},
		{name: "insecure capabilities", script: status, change: insecure,
			want: strings.ReplaceAll("CapInh:ALL\nCapPrm:ALL\nCapEff:ALL\nCapBnd:ALL\nCapAmb:ALL\nNoNewPrivs:0\nSeccomp:0", "ALL", all)},
		{name: "no mounting", script: "mount -t tmpfs x /tmp 2>/dev/null && echo mounted || echo refused", want: "refused"},
		{name: "insecure mounting", script: "mount -t tmpfs x /tmp && echo mounted", change: insecure, want: "mounted"},
		{name: "masked files and directories", script: "cat /proc/timer_list /proc/keys | wc -c; ls /sys/firmware | wc -l", want: "0\n0"},
		{name: "insecure sees them", script: "[ $(cat /proc/timer_list | wc -c) -gt 0 ] && [ $(ls /sys/firmware | wc -l) -gt 0 ] && echo seen", change: insecure, want: "seen"},
		{name: "read-only parts of /proc", script: "for f in /proc/sys/kernel/hostname /proc/sysrq-trigger; do echo x 2>/dev/null > $f || echo refused; done", want: "refused\nrefused"},
		{name: "read-only /sys", script: "echo 0 2>/dev/null > /sys/kernel/profiling || echo refused; set -- $(grep ' /sys sysfs' /proc/mounts); echo ${4%%,*}", want: "refused\nro"},
		{name: "insecure /sys", script: "set -- $(grep ' /sys sysfs' /proc/mounts); echo ${4%%,*}", change: insecure, want: "rw"},
		{name: "no device that others share", script: device, want: "denied"},
		{name: "insecure device", script: device, change: insecure, want: "readable"},
		{name: "usual devices", script: "echo x > /dev/null && head -c 4 /dev/zero | wc -c && head -c 4 /dev/urandom | wc -c && echo x > /dev/full 2>/dev/null || echo full; [ -c /dev/tty ] && for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done", want: "4\n4\nfull\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx"},
		{name: "insecure devices", script: "for d in fuse kmsg net/tun loop-control; do [ -c /dev/$d ] && echo $d; done; [ -b /dev/loop7 ] && echo loop", change: insecure, want: "fuse\nkmsg\nnet/tun\nloop-control\nloop"},
		{name: "shared memory", script: "echo x > /dev/shm/y && cat /dev/shm/y && stat -c %a /dev/shm", want: "x\n1777"},
		{name: "own cgroup", script: "[ -d /sys/fs/cgroup/memory ] || [ -f /sys/fs/cgroup/cgroup.procs ] && echo mounted; cat /sys/fs/cgroup/memory/tasks /sys/fs/cgroup/cgroup.procs 2>/dev/null | head -1", want: "mounted\n1"},
	})
}

// compat: LLB-020
func TestUsers(t *testing.T) {
	as := func(user string) func(*testing.T, *Process) {
		return func(_ *testing.T, p *Process) { p.User = user }
	}
	const id = "echo $(id -u):$(id -g) $(id -G) $HOME"
	observe(t, []observation{
		{name: "root", script: id, want: "0:0 0 6 2001 /root"},
		{name: "name", script: id, change: as("builder"), want: "1000:1001 1001 2000 2001 /home/builder"},
		{name: "name and group", script: id, change: as("builder:extra"), want: "1000:2000 2000 /home/builder"},
		{name: "uid", script: id, change: as("1000"), want: "1000:1001 1001 2000 2001 /home/builder"},
		{name: "uid of nobody", script: id, change: as("4711"), want: "4711:0 0 /"},
		{name: "uid and gid", script: id, change: as("4711:4712"), want: "4711:4712 4712 /"},
		{name: "uid and group", script: id, change: as("4711:staff"), want: "4711:1001 1001 /"},
		{name: "no passwd file", script: id, change: func(t *testing.T, p *Process) {
			root := busyboxRoot(t)
			os.Remove(filepath.Join(root, "etc/passwd"))
			os.Remove(filepath.Join(root, "etc/group"))
			p.Root, _ = overlay(t, root)
		}, want: "0:0 0 /"},
		{name: "passwd is a link inside the root", script: id, change: func(t *testing.T, p *Process) {
			root := busyboxRoot(t)
			if err := errors.Join(os.Rename(root+"/etc/passwd", root+"/etc/real"), os.Symlink("/etc/real", root+"/etc/passwd")); err != nil {
				t.Fatal(err)
			}
			p.Root, _ = overlay(t, root)
			p.User = "builder"
		}, want: "1000:1001 1001 2000 2001 /home/builder"},
	})
}

// compat: LLB-020
func TestCwd(t *testing.T) {
	in := func(dir, user string) func(*testing.T, *Process) {
		return func(_ *testing.T, p *Process) { p.Cwd, p.User = dir, user }
	}
	observe(t, []observation{
		{name: "exists", script: "pwd", change: in("/bin", ""), want: "/bin"},
		{name: "is made", script: "pwd; stat -c '%u:%g %a' . ..", change: in("/new/dir", "builder"), want: "/new/dir\n1000:1001 755\n1000:1001 755"},
		{name: "is made below a mount", script: "pwd; touch x", change: func(t *testing.T, p *Process) {
			p.Cwd, p.Mounts = "/m/a/b", []Mount{{Dest: "/m", Source: bindMount(t.TempDir())}}
		}, want: "/m/a/b"},
		{name: "through a link", script: "pwd -P", change: func(t *testing.T, p *Process) {
			root := busyboxRoot(t)
			if err := os.Symlink("/made/here", filepath.Join(root, "link")); err != nil {
				t.Fatal(err)
			}
			p.Root, _ = overlay(t, root)
			p.Cwd = "/link/x"
		}, want: "/made/here/x"},
		{name: "out of reach of the user", script: "pwd", change: func(t *testing.T, p *Process) {
			root := busyboxRoot(t)
			mkdir(t, filepath.Join(root, "secret/dir"))
			if err := os.Chmod(filepath.Join(root, "secret"), 0o700); err != nil {
				t.Fatal(err)
			}
			p.Root, _ = overlay(t, root)
			p.Cwd, p.User, p.Env = "/secret/dir", "builder", append(p.Env, "PWD=/secret/dir")
			p.Args = []string{"readlink", "/proc/self/cwd"}
		}, want: "/secret/dir"},
	})
}

// compat: LLB-024
func TestUlimits(t *testing.T) {
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &own); err != nil {
		t.Fatal(err)
	}
	observe(t, []observation{
		{name: "limits", script: "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; ulimit -Su", change: func(_ *testing.T, p *Process) {
			p.Ulimits = []Ulimit{{"nofile", 1000, 1001}, {"core", 0, 512 * 2}, {"nproc", 77, 78}}
		}, want: "1000\n1001\n0\n2\n77"},
	})
}

// compat: LLB-033
func TestResolvConf(t *testing.T) {
	needRoot(t)
	e := newTest(t, Config{DNS: &DNS{Nameservers: []string{"9.9.9.9", "127.0.0.1"}, SearchDomains: []string{"a.example", "."}, Options: []string{"ndots:2"}}})
	if out := output(t, e, process(t, "cat /etc/resolv.conf")); out != "nameserver 9.9.9.9\nnameserver 127.0.0.1\nsearch a.example\noptions ndots:2\n" {
		t.Errorf("%q", out)
	}
}

// compat: LLB-043
func TestReadonlyRoot(t *testing.T) {
	rw := t.TempDir()
	observe(t, []observation{
		{name: "root is read-only, mounts are not", script: "touch /x 2>/dev/null || echo refused; touch /m/x /dev/shm/x && echo fine", change: func(_ *testing.T, p *Process) {
			p.ReadonlyRoot, p.Mounts = true, []Mount{{Dest: "/m", Source: bindMount(rw)}}
		}, want: "refused\nfine"},
	})
}

// compat: LLB-040
func TestMounts(t *testing.T) {
	src := t.TempDir()
	for name, content := range map[string]string{"a": "A", "d/b": "B", "d/e/c": "C"} {
		mkdir(t, filepath.Dir(filepath.Join(src, name)))
		if err := os.WriteFile(filepath.Join(src, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/etc/passwd", src+"/out"), os.Symlink("../../../../d", src+"/in")); err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	if err := os.WriteFile(other+"/o", []byte("O"), 0o644); err != nil {
		t.Fatal(err)
	}
	with := func(mounts ...Mount) func(*testing.T, *Process) {
		return func(_ *testing.T, p *Process) { p.Mounts = mounts }
	}
	observe(t, []observation{
		{name: "directory", script: "cat /m/a", change: with(Mount{Dest: "/m", Source: bindMount(src)}), want: "A"},
		{name: "relative to the root", script: "cat /m/a", change: with(Mount{Dest: "m/", Source: bindMount(src)}), want: "A"},
		{name: "read-only", script: "cat /m/a; echo x 2>/dev/null > /m/a || echo refused", change: with(Mount{Dest: "/m", Source: bindMount(src), Readonly: true}), want: "Arefused"},
		{name: "part", script: "ls /m", change: with(Mount{Dest: "/m", Source: bindMount(src), Selector: "d"}), want: "b\ne"},
		{name: "read-only part", script: "cat /m/c; echo x 2>/dev/null > /m/c || echo refused", change: with(Mount{Dest: "/m", Source: bindMount(src), Selector: "/d/e", Readonly: true}), want: "Crefused"},
		{name: "file", script: "cat /m/f", change: with(Mount{Dest: "/m/f", Source: bindMount(src), Selector: "d/b"}), want: "B"},
		{name: "file over a file", script: "cat /etc/group", change: with(Mount{Dest: "/etc/group", Source: bindMount(src), Selector: "a"}), want: "A"},
		{name: "part through a link stays inside", script: "cat /m/b", change: with(Mount{Dest: "/m", Source: bindMount(src), Selector: "in"}), want: "B"},
		{name: "children after parents", script: "cat /m/a /m/x/y/o", change: with(Mount{Dest: "/m/x/y", Source: bindMount(other)}, Mount{Dest: "/m", Source: bindMount(t.TempDir())}, Mount{Dest: "/m/a", Source: bindMount(src), Selector: "a"}), want: "AO"},
		{name: "part of an overlay", script: "ls /m", change: func(t *testing.T, p *Process) {
			root, _ := overlay(t, src)
			p.Mounts = []Mount{{Dest: "/m", Source: root, Selector: "d/e"}}
		}, want: "c"},
		// compat: LLB-046
		{name: "tmpfs", script: "grep -c ' /m tmpfs .*nosuid.*size=64k' /proc/mounts; echo x > /m/x; cat /m/x",
			change: with(Mount{Dest: "/m", Source: []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "size=65536"}}}}), want: "1\nx"},
		{name: "below /dev", script: "cat /dev/m/a", change: with(Mount{Dest: "/dev/m", Source: bindMount(src)}), want: "A"},
		{name: "instead of resolv.conf", script: "cat /etc/resolv.conf", change: with(Mount{Dest: "/etc/resolv.conf", Source: bindMount(src), Selector: "a"}), want: "A"},
		{name: "destination through a link", script: "cat /real/m/a", change: func(t *testing.T, p *Process) {
			root := busyboxRoot(t)
			mkdir(t, filepath.Join(root, "real"))
			if err := os.Symlink("/real", filepath.Join(root, "link")); err != nil {
				t.Fatal(err)
			}
			p.Root, _ = overlay(t, root)
			p.Mounts = []Mount{{Dest: "/link/m", Source: bindMount(src)}}
		}, want: "A"},
	})
	t.Run("a part that leads out doesn't", func(t *testing.T) {
		eachRuntime(t, func(t *testing.T, e *executor) {
			p := process(t, "true")
			p.Mounts = []Mount{{Dest: "/m", Source: bindMount(src), Selector: "out"}}
			if r := run(t, e, p); r.err == nil || !errors.Is(r.err, unix.ENOENT) {
				t.Errorf("error %v", r.err)
			}
		})
	})
}

// A mount has the flags of its source with every runtime.
func TestMountFlags(t *testing.T) {
	each(t, allRuntimes, func(t *testing.T, e *executor) {
		p := process(t, "grep -c ' /m tmpfs rw,nosuid,nodev,noexec,' /proc/mounts; grep -c ' /r tmpfs ro,nosuid,' /proc/mounts; echo x >/m/x")
		options := []string{"nosuid", "nodev", "noexec"}
		p.Mounts = []Mount{
			{Dest: "/m", Source: []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: options}}},
			{Dest: "/r", Source: []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "nosuid"}}}},
		}
		if out := output(t, e, p); out != "1\n1\n" {
			t.Errorf("%q", out)
		}
	})
}
