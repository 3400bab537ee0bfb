//go:build linux && (amd64 || arm64)

package executor

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	mobyseccomp "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// highestTried is beyond the newest system call of this machine's kernel.
const highestTried = 512

// uprobes are called by code that the kernel puts into a process; it kills one
// that calls them itself, whatever its filter says.
var uprobes = []uintptr{335, 336}

// probeAllSyscalls does every system call with arguments that can't work, in
// every ABI that it can enter, and prints how it was refused.
func probeAllSyscalls() {
	runtime.LockOSThread()
	names := riskyNames()
	out := bufio.NewWriter(os.Stdout)
	bad := ^uintptr(0)
	for nr := range uintptr(highestTried) {
		if slices.Contains(risky, nr) || slices.Contains(names, nr) || runtime.GOARCH == "amd64" && slices.Contains(uprobes, nr) {
			continue
		}
		_, _, errno := unix.RawSyscall6(nr, bad, bad, bad, bad, bad, bad)
		fmt.Fprintf(out, "%d %d\n", nr, errno)
	}
	id, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	errno, _ := err.(unix.Errno) //nolint:errorlint // straight from the kernel
	fmt.Fprintf(out, "keyring %d\nkeyring-id %d\n", errno, id)
	out.Flush()
	os.Exit(0)
}

// probe runs this test binary in a step, or as a further process of one, and
// returns what it printed.
func probe(t *testing.T, e *executor, mode string, security SecurityMode, further bool) map[string]unix.Errno {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := withProgram(t, exe)
	p.Security = security
	p.Env = append(p.Env, "KILN_EXECUTOR_TEST="+mode)
	run := attack
	if further {
		first := process(t, "cat")
		first.Mounts, first.Security = p.Mounts, security
		run = func(t *testing.T, e *executor, p Process) result { return attackFurther(t, e, first, p) }
	}
	r := run(t, e, p)
	if r.err != nil {
		t.Fatalf("%v\n%s%s", r.err, r.stdout, r.stderr)
	}
	results := map[string]unix.Errno{}
	for line := range strings.Lines(r.stdout) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.Atoi(value)
		if err != nil {
			t.Fatal(err)
		}
		results[name] = unix.Errno(n)
	}
	return results
}

// syscallNumbers are the names of this machine's system calls, by number.
func syscallNumbers(t *testing.T) map[int]string {
	t.Helper()
	source, err := os.ReadFile("seccomp/numbers.go")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(source), "numbers"+strings.ToUpper(runtime.GOARCH)+" = `")
	table, _, _ = strings.Cut(table, "`")
	names := map[int]string{}
	for line := range strings.Lines(table) {
		name, nr, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.Atoi(nr)
		if err != nil {
			t.Fatal(err)
		}
		names[n] = name
	}
	return names
}

// verdict is what Docker's profile says of a call, as far as it doesn't depend
// on arguments.
type verdict struct {
	denied bool
	errno  unix.Errno
	args   bool // it does
}

func judge(profile *specs.LinuxSeccomp, name string) verdict {
	v := verdict{denied: true, errno: unix.EPERM}
	if profile.DefaultErrnoRet != nil {
		v.errno = unix.Errno(*profile.DefaultErrnoRet)
	}
	for _, rule := range profile.Syscalls {
		switch {
		case !slices.Contains(rule.Names, name):
		case len(rule.Args) > 0:
			return verdict{args: true}
		case rule.Action == specs.ActAllow:
			return verdict{}
		default:
			v.errno = unix.EPERM
			if rule.ErrnoRet != nil {
				v.errno = unix.Errno(*rule.ErrnoRet)
			}
		}
	}
	return v
}

// needCapabilities are calls that Docker's profile allows, and that the kernel
// refuses without more capabilities than a step has.
var needCapabilities = []string{"landlock_restrict_self"}

// Each system call of Docker's profile, tried in a step: what is denied is
// denied with the errno that the profile has for it, what is allowed gets
// through, and what is newer than the profile isn't there.
// compat: DMN-078
func TestEverySystemCall(t *testing.T) {
	each(t, ours(t), func(t *testing.T, e *executor) {
		insecure := probe(t, e, "probe-all", SecurityInsecure, false)
		for _, further := range []bool{false, true} {
			checkSystemCalls(t, probe(t, e, "probe-all", SecuritySandbox, further), insecure)
		}
	})
}

// checkSystemCalls compares how the calls were refused with and without the sandbox.
func checkSystemCalls(t *testing.T, sandboxed, insecure map[string]unix.Errno) {
	t.Helper()
	profile, err := mobyseccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: defaultCaps}}})
	if err != nil {
		t.Fatal(err)
	}
	names := syscallNumbers(t)
	last := 0
	for nr, name := range names {
		if v := judge(profile, name); !v.denied || v.errno != unix.EPERM {
			last = max(last, nr)
		}
	}
	denied, shown := 0, 0
	for nr := range highestTried {
		got, tried := sandboxed[strconv.Itoa(nr)]
		if !tried {
			continue
		}
		free, v := insecure[strconv.Itoa(nr)], judge(profile, names[nr])
		switch {
		case nr > last:
			v = verdict{denied: true, errno: unix.ENOSYS}
		case names[nr] == "":
			v = verdict{denied: true, errno: unix.EPERM} // a hole in the table, which profiles can't name
		}
		switch {
		case v.args:
		case v.denied:
			denied++
			if free != got {
				shown++
			}
			if got != v.errno {
				t.Errorf("%s (%d): %v, want %v", names[nr], nr, got, v.errno)
			}
		case got == unix.EPERM && free != unix.EPERM && !slices.Contains(needCapabilities, names[nr]):
			t.Errorf("%s (%d) is allowed by the profile: %v; without the sandbox: %v", names[nr], nr, got, free)
		}
	}
	if len(sandboxed) < 440 || denied < 60 || shown < 40 {
		t.Errorf("%d calls were tried, %d of them denied, %d of these shown to work without the sandbox", len(sandboxed), denied, shown)
	}
}

// Nor do calls get through by the numbers of another ABI.
func TestOtherABIs(t *testing.T) {
	each(t, ours(t), func(t *testing.T, e *executor) {
		abis := 0
		for name, errno := range probe(t, e, "probe-abis", SecuritySandbox, false) {
			abis++
			if errno != unix.EPERM {
				t.Errorf("%s: %v, want %v", name, errno, unix.EPERM)
			}
		}
		if runtime.GOARCH == "amd64" && abis != 24 {
			t.Errorf("%d calls were tried", abis)
		}
	})
}

// A step has a session keyring of its own, and can't get at any: keys aren't
// of a namespace.
func TestKeyrings(t *testing.T) {
	runtime.LockOSThread()
	own, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, true)
	if err != nil {
		t.Fatal(err)
	}
	each(t, ours(t), func(t *testing.T, e *executor) { keyrings(t, e, own) })
}

func keyrings(t *testing.T, e *executor, own int) {
	if got := probe(t, e, "probe-all", SecuritySandbox, false); got["keyring"] != unix.EPERM {
		t.Errorf("a step asks for its keyring: %v, want %v", got["keyring"], unix.EPERM)
	}
	first, second := probe(t, e, "probe-all", SecurityInsecure, false), probe(t, e, "probe-all", SecurityInsecure, false)
	further := probe(t, e, "probe-all", SecurityInsecure, true)
	if further["keyring"] != 0 || further["keyring-id"] == unix.Errno(own) {
		t.Errorf("a further process has the session keyring %d (%v), the daemon has %d", further["keyring-id"], further["keyring"], own)
	}
	if first["keyring"] != 0 || first["keyring-id"] == second["keyring-id"] || first["keyring-id"] == unix.Errno(own) {
		t.Errorf("insecure steps have the session keyrings %d and %d (%v), the daemon has %d", first["keyring-id"], second["keyring-id"], first["keyring"], own)
	}
}
