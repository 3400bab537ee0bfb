//go:build linux && (amd64 || arm64)

package executor

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a container is like, from inside, must not depend on the runtime.
func TestSameAsRunc(t *testing.T) {
	const script = `
echo == status; while read k v; do case $k in Cap*|NoNew*|Seccomp:|Groups:|Uid:|Gid:|SigIgn:|SigBlk:|SigCgt:|SigPnd:) echo "$k $v";; esac; done < /proc/1/status
echo == limits; cat /proc/self/limits
echo == id; id; umask; hostname; pwd
echo == environ; cat /proc/1/environ
echo == dev; ls -l /dev | while read mode links owner group a b rest; do echo "$mode $owner $group${rest#*:??}"; done
echo == files; cat /etc/hosts /etc/resolv.conf; stat -c '%n %a %U %s' /etc/hosts /proc /sys /dev /dev/pts /dev/shm /dev/mqueue
echo == masked; for f in /proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats /proc/sched_debug /sys/firmware /sys/devices/virtual/powercap /proc/scsi; do [ -e $f ] && echo $f $(ls $f | wc -l) $(cat $f 2>/dev/null | head -c 1 | wc -c); done
echo == mounts; cat /proc/mounts`
	eachSecurity := map[string]SecurityMode{"sandbox": SecuritySandbox, "insecure": SecurityInsecure}
	for security, mode := range eachSecurity {
		for _, user := range []string{"", "builder"} {
			t.Run(security+user, func(t *testing.T) {
				got := map[string]string{}
				for name, binary := range runtimes {
					e := newTest(t, Config{Binary: binary})
					p := process(t, script)
					p.Security, p.User, p.Cwd = mode, user, "/work"
					p.Env = append(p.Env, "A=b", "A=c")
					// Unless told, older runc hands on the limit that Go has raised.
					p.Ulimits = []Ulimit{{Name: "nofile", Soft: 1000, Hard: 2000}}
					got[name] = normalize(output(t, e, p))
				}
				if got["builtin"] != got["runc"] {
					t.Errorf("built-in:\n%s\nrunc:\n%s", onlyIn(got["builtin"], got["runc"]), onlyIn(got["runc"], got["builtin"]))
				}
			})
		}
	}
}

// normalize drops what may differ: the cgroup hierarchies shown (the built-in
// runtime shows those it uses), the file systems of the root and of bind mounts,
// and the machine's loop devices.
func normalize(out string) string {
	var lines, mounts []string
	inMounts := false
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		inMounts = inMounts || line == "== mounts"
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "b") && strings.Contains(line, " loop"): // the machine makes some whenever it needs more
		case strings.HasPrefix(line, "/dev 755 root "):
			lines = append(lines, "/dev 755 root") // its size is how many nodes it has
		case !inMounts || len(f) < 4:
			lines = append(lines, line)
		case strings.HasPrefix(f[1], "/sys/fs/cgroup"), f[1] == "/":
		default:
			options := strings.Split(f[3], ",")
			slices.Sort(options)
			mounts = append(mounts, f[1]+" "+f[2]+" "+strings.Join(slices.DeleteFunc(options, func(o string) bool { return strings.HasPrefix(o, "inode") }), ","))
		}
	}
	slices.Sort(mounts)
	return strings.Join(append(lines, mounts...), "\n")
}

func onlyIn(a, b string) string {
	have := strings.Split(b, "\n")
	var list []string
	for line := range strings.SplitSeq(a, "\n") {
		if !slices.Contains(have, line) {
			list = append(list, line)
		}
	}
	return strings.Join(list, "\n")
}

// lastCommonSyscall is the newest call that libseccomp of this test's runc is
// sure to know.
const lastCommonSyscall = 440

// risky calls end, stop or multiply the probe, or wait.
var risky = []uintptr{
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RT_SIGRETURN, unix.SYS_CLONE, unix.SYS_RESTART_SYSCALL, unix.SYS_RT_SIGSUSPEND, unix.SYS_PSELECT6,
	unix.SYS_SETSID, unix.SYS_CLOSE_RANGE, unix.SYS_RT_SIGPROCMASK, unix.SYS_SET_TID_ADDRESS, unix.SYS_MUNMAP,
}

// probeSyscalls does every system call with arguments that can't work and
// prints how it was refused.
func probeSyscalls() {
	runtime.LockOSThread()
	names := riskyNames()
	out := bufio.NewWriter(os.Stdout)
	for nr := range uintptr(lastCommonSyscall + 1) {
		if slices.Contains(risky, nr) || slices.Contains(names, nr) {
			continue
		}
		bad := ^uintptr(0)
		_, _, errno := unix.RawSyscall6(nr, bad, bad, bad, bad, bad, bad)
		fmt.Fprintf(out, "%d %d\n", nr, errno)
	}
	// Conditions on arguments.
	for _, c := range []struct{ nr, arg uintptr }{
		{unix.SYS_PERSONALITY, 0}, {unix.SYS_PERSONALITY, 8}, {unix.SYS_PERSONALITY, 0x20000}, {unix.SYS_PERSONALITY, 0x20008}, {unix.SYS_PERSONALITY, 1}, {unix.SYS_PERSONALITY, 0xffffffff},
		{unix.SYS_SOCKET, unix.AF_VSOCK}, {unix.SYS_SOCKET, unix.AF_ALG}, {unix.SYS_SOCKET, unix.AF_INET}, {unix.SYS_SOCKET, 39}, {unix.SYS_SOCKET, 41},
		{unix.SYS_CLONE, unix.CLONE_NEWUSER}, {unix.SYS_CLONE, unix.CLONE_NEWNS}, {unix.SYS_CLONE, unix.CLONE_SIGHAND}, {unix.SYS_UNSHARE, unix.CLONE_NEWUSER}, {unix.SYS_CLONE3, 0},
	} {
		_, _, errno := unix.RawSyscall6(c.nr, c.arg, ^uintptr(0), ^uintptr(0), 0, 0, 0)
		fmt.Fprintf(out, "%d(%#x) %d\n", c.nr, c.arg, errno)
	}
	out.Flush()
	os.Exit(0)
}

// compat: DMN-078
func TestSeccompSameAsRunc(t *testing.T) {
	for name, mode := range map[string]SecurityMode{"sandbox": SecuritySandbox, "insecure": SecurityInsecure} {
		t.Run(name, func(t *testing.T) {
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for name, binary := range runtimes {
				e := newTest(t, Config{Binary: binary})
				p := process(t, "")
				p.Args, p.Security = []string{"/probe"}, mode
				p.Env = append(p.Env, "KILN_EXECUTOR_TEST=probe")
				p.Mounts = []Mount{{Dest: "/probe", Source: bindMount(filepath.Dir(exe)), Selector: filepath.Base(exe), Readonly: true}}
				for _, lib := range []string{"/lib", "/lib64", "/usr/lib"} { // if the test binary is linked dynamically
					if _, err := os.Stat(lib); err == nil {
						p.Mounts = append(p.Mounts, Mount{Dest: lib, Source: bindMount(lib), Readonly: true})
					}
				}
				got[name] = output(t, e, p)
			}
			if n := strings.Count(got["builtin"], "\n"); n < 300 {
				t.Fatalf("only %d calls were tried", n)
			}
			if got["builtin"] != got["runc"] {
				t.Errorf("call and errno, built-in:\n%s\nrunc:\n%s", onlyIn(got["builtin"], got["runc"]), onlyIn(got["runc"], got["builtin"]))
			}
		})
	}
}
