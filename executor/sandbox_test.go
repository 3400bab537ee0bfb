//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sandboxCase is an attack by a step. It prints "got" for each thing it gets at.
// Without the sandbox, in an insecure step or with what it wants mounted, it
// must succeed: otherwise it shows nothing.
type sandboxCase struct {
	item   string // what it is about
	attack string
	// escapes is how often it says "got" at least in an insecure step; 0 if that
	// can't do it either, or not on every machine.
	escapes int
	change  func(p *Process)
}

// tries opens files for writing, without writing to them.
func tries(files ...string) string {
	return "for f in " + strings.Join(files, " ") + "; do (: >> $f) 2>/dev/null && echo got; done"
}

var sandboxCases = []sandboxCase{
	// Capabilities: each of those that Docker withholds, by what it allows.
	{item: "CAP_SYS_ADMIN: name the machine", attack: "hostname attacked && echo got", escapes: 1},
	{item: "CAP_SYS_RESOURCE: spare from the out-of-memory killer", attack: "echo -1000 > /proc/self/oom_score_adj && echo got"},
	{item: "CAP_SYS_RESOURCE: raise limits", attack: "ulimit -Hn 1000 && ulimit -Hn 2000 && echo got"},
	{item: "CAP_SYS_NICE: more than a fair share", attack: "busybox renice -n -5 $$ && echo got", escapes: 1},
	{item: "CAP_SYSLOG: the kernel's log", attack: "busybox dmesg | grep -q . && echo got; head -c 1 /dev/kmsg >/dev/null && echo got", escapes: 2},
	{item: "CAP_NET_ADMIN: the network", attack: "ip link set lo down && echo got", escapes: 1, change: func(p *Process) { p.Network = NetNone }},

	// Mounting from inside, in all ways, new namespaces among them.
	{item: "mount a file system", attack: "mount -t tmpfs none /tmp && echo got; mount -t proc proc /tmp && echo got", escapes: 2},
	{item: "bind a directory", attack: "mount -o bind /proc /tmp && echo got", escapes: 1},
	{item: "make what is read-only writable", attack: "for d in /proc/sys /proc/sysrq-trigger /sys /sys/fs/cgroup; do mount -o remount,rw,bind $d && echo got; done", escapes: 2},
	// Lazily, as a mount that the daemon has just made is busy for a moment.
	{item: "unmount what hides", attack: "for f in /proc/keys /proc/kcore /proc/timer_list /sys/firmware /etc/hosts; do busybox umount -l $f && echo got; done", escapes: 1},
	{item: "a user namespace", attack: "busybox unshare -U true && echo got; busybox unshare -Ur true && echo got", escapes: 2},
	{item: "a mount namespace", attack: "busybox unshare -m true && echo got", escapes: 1},
	{item: "enter a namespace", attack: "busybox nsenter -t 1 -m true && echo got", escapes: 1},
	{item: "another root", attack: "mkdir /n && busybox pivot_root /n /n 2>&1 | grep -q 'not permitted' || echo got", escapes: 1},

	// Masked and read-only paths.
	{item: "masked files", attack: "for f in keys timer_list kcore interrupts; do [ -n \"$(head -c 1 /proc/$f | od)\" ] && [ \"$(head -c 1 /proc/$f | wc -c)\" = 1 ] && echo got; done", escapes: 2},
	{item: "masked directories", attack: "for d in /proc/acpi /proc/asound /proc/scsi /sys/firmware /sys/devices/virtual/powercap; do ls $d | grep -q . && echo got && break; done", escapes: 1},
	{item: "masked files by other names", attack: "for f in /proc/1/../keys /proc/self/root/proc/timer_list /proc/1/task/1/../../../timer_list /dev/core; do [ \"$(head -c 1 $f | wc -c)\" = 1 ] && echo got; done", escapes: 2},
	{item: "masked paths can't be replaced", attack: "rm -f /proc/keys /dev/null; ln -s /proc/timer_list /dev/null; mv /proc/keys /proc/x; [ \"$(head -c 1 /proc/timer_list | wc -c)\" = 1 ] && echo got", escapes: 1},
	{item: "settings of the kernel", attack: tries("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max"), escapes: 3},
	{item: "settings by other names", attack: tries("/proc/1/root/proc/sys/kernel/core_pattern", "/proc/self/cwd/proc/sys/kernel/modprobe", "/proc/thread-self/root/proc/sys/vm/overcommit_memory"), escapes: 2},
	{item: "requests to the kernel", attack: tries("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"), escapes: 1},
	{item: "/sys", attack: tries("/sys/kernel/mm/ksm/run", "/sys/module/kernel/parameters/panic", "/sys/kernel/profiling")},
	{item: "helpers that the kernel executes", attack: tries("/sys/kernel/uevent_helper", "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/*/release_agent", "/sys/fs/cgroup/*/../release_agent")},

	// Cgroups.
	{item: "cgroup: more memory", attack: "f=$(ls /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null); (: >> $f) && echo got", escapes: 1},
	{item: "cgroup: move", attack: "f=$(ls /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs 2>/dev/null); echo 1 > $f && echo got", escapes: 1},
	{item: "cgroup: a new one", attack: "d=$(ls -d /sys/fs/cgroup/pids 2>/dev/null || echo /sys/fs/cgroup); mkdir $d/x && echo got; busybox rmdir $d/x", escapes: 1},
	{item: "cgroup: a mount of one's own, with a release_agent or of version 2", attack: "for o in memory rdma pids none,name=attack; do mount -t cgroup -o $o cgroup /tmp && echo got && busybox umount /tmp && break; done; " +
		"mount -t cgroup2 cgroup2 /tmp && echo got && busybox umount /tmp", escapes: 1},

	// Devices: the nodes can be made, and not opened.
	{item: "devices", attack: "cd /dev; for n in 'c 1 1' 'c 1 2' 'c 1 4' 'c 1 11' 'c 10 229' 'c 10 232' 'c 10 237' 'b 7 0' 'b 8 0' 'b 253 0' 'b 254 0' 'b 259 0'; do " +
		"mknod node $n 2>/dev/null && { busybox timeout 5 head -c 0 node 2>&1 | grep -q 'not permitted' || echo got; }; rm -f node; done", escapes: 8},
	{item: "a disk in another place", attack: "mknod /tmp/disk b 7 0; mknod /dev/shm/disk b 7 0; for d in /tmp/disk /dev/shm/disk; do head -c 0 $d 2>&1 | grep -q 'ermi[ts]' || echo got; done", escapes: 1},
	{item: "terminals of the machine", attack: "mknod /tmp/t c 136 0; mknod /tmp/c c 5 1; mknod /tmp/v c 4 1; for d in /tmp/t /tmp/c /tmp/v; do busybox timeout 5 head -c 0 $d 2>/dev/null && echo got; done; ls /dev/pts | grep -v ptmx | grep -q . && echo got"},

	// What is the machine's or another step's.
	{item: "processes of the machine", attack: "for p in /proc/[0-9]*; do [ ${p#/proc/} -gt 9 ] && [ -e $p/exe ] && grep -q executor.test $p/cmdline && echo got; done"},
	{item: "files of the machine", attack: "for d in '' /proc/1/root /proc/self/root /proc/1/cwd /proc/self/cwd/../../../.. /.. /../../../..; do cat $d$SECRET && echo got; done"},
	{item: "the daemon's environment", attack: "cat /proc/[0-9]*/environ | grep -q KILN_DAEMON && echo got; env | grep -q KILN_DAEMON && echo got"},
	{item: "keys", attack: "grep -q . /proc/keys && echo got", escapes: 1},
	{item: "descriptors", attack: "for f in /proc/1/fd/*; do case $(readlink $f) in /dev/null|pipe:*) ;; *) echo got $(readlink $f);; esac; done"},
	{item: "shared memory and messages", attack: "cat /proc/sysvipc/shm /proc/sysvipc/msg /proc/sysvipc/sem | grep -q '[0-9]' && echo got; ls /dev/shm /dev/mqueue | grep -v : | grep -q . && echo got"},
	{item: "what the step got read-only", attack: "for f in /etc/hosts /etc/resolv.conf; do (: >> $f) && echo got; busybox chmod 777 $f && echo got; busybox touch $f && echo got; rm -f $f && echo got; done"},
}

// The whole sandbox, item by item, by trying to get out.
func TestSandbox(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KILN_DAEMON_TOKEN", "x")
	e := newTest(t, Config{})
	lower := busyboxRoot(t)
	step := func(t *testing.T, c sandboxCase, mode SecurityMode) int {
		t.Helper()
		p := Process{ID: newID(), Args: []string{"sh", "-c", c.attack + "; true"}, Env: []string{"PATH=/bin", "SECRET=" + secret}, Security: mode}
		p.Root, _ = overlay(t, lower)
		if c.change != nil {
			c.change(&p)
		}
		r := attack(t, e, p)
		if r.err != nil {
			t.Errorf("%v: %s%s", r.err, r.stdout, r.stderr)
		}
		if testing.Verbose() {
			t.Logf("security mode %d: %s%s", mode, r.stdout, r.stderr)
		}
		return strings.Count(r.stdout, "got")
	}
	for _, c := range sandboxCases {
		t.Run(c.item, func(t *testing.T) {
			if n := step(t, c, SecuritySandbox); n != 0 {
				t.Errorf("the step got at %d things", n)
			}
			if c.escapes == 0 {
				return
			}
			if n := step(t, c, SecurityInsecure); n < c.escapes {
				t.Errorf("the attack shows little: without the sandbox it gets at %d things, not %d", n, c.escapes)
			}
		})
	}
}

// The attacks of TestSandbox that have no insecure step to show them able
// to succeed find what is there to be found.
func TestSandboxAttacksSee(t *testing.T) {
	e := newTest(t, Config{})
	dir := t.TempDir()
	for name, script := range map[string]string{
		"environment": "cat /proc/[0-9]*/environ | grep -q KILN_DAEMON && env | grep -q KILN_DAEMON && echo got",
		"files":       "cat /m/secret && echo got",
		"descriptors": "exec 5</etc/passwd; for f in /proc/1/fd/*; do case $(readlink $f) in /dev/null|pipe:*) ;; *) echo got;; esac; done",
		"processes":   "sleep 100 & for p in /proc/[0-9]*; do grep -q sleep $p/cmdline && echo got; done",
	} {
		p := process(t, script)
		p.Env = append(p.Env, "KILN_DAEMON_TOKEN=x")
		p.Mounts = []Mount{{Dest: "/m", Source: bindMount(dir)}}
		if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if r := attack(t, e, p); r.err != nil || !strings.Contains(r.stdout, "got") {
			t.Errorf("%s: %v, %q", name, r.err, r.stdout)
		}
	}
}

// What somebody put where a file is to be mounted isn't opened: it could
// block.
func TestMountPointIsNotOpened(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	eachRuntime(t, func(t *testing.T, e *executor) {
		cache := t.TempDir()
		if err := errors.Join(unix.Mkfifo(filepath.Join(cache, "fifo"), 0o644), unix.Mknod(filepath.Join(cache, "disk"), unix.S_IFBLK|0o644, int(unix.Mkdev(7, 0)))); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"fifo", "disk"} {
			p := process(t, "cat /c/"+name)
			p.Mounts = []Mount{{Dest: "/c", Source: bindMount(cache)}, {Dest: "/c/" + name, Source: bindMount(src), Selector: "f"}}
			if r := attack(t, e, p); r.err != nil || r.stdout != "x" {
				t.Errorf("%s: %v, %q %s", name, r.err, r.stdout, r.stderr)
			}
		}
	})
}

// What would be a mount point below /proc is refused, but for the files that
// show a container its own limits.
func TestMountsInProc(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), []byte("faked\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	e := newTest(t, Config{})
	for dest, allowed := range map[string]bool{
		"/proc": false, "/proc/": false, "/proc/self/attr": false, "/proc/sys/kernel": false, "/proc/1/fd": false, "/x/../proc/sys": false, "/proc/keys": false,
		"/proc/cpuinfo": true, "/proc/meminfo": true,
	} {
		p := process(t, fmt.Sprintf("cat %s", dest))
		p.Mounts = []Mount{{Dest: dest, Source: bindMount(src)}}
		if allowed {
			p.Mounts[0].Selector = "f"
		}
		r := attack(t, e, p)
		if allowed != (r.err == nil) || !allowed && !strings.Contains(r.err.Error(), "below /proc") || allowed && r.stdout != "faked\n" {
			t.Errorf("%s: %v, %q", dest, r.err, r.stdout)
		}
	}
}
