package seccomp

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// call is what a filter sees of a system call.
type call struct {
	audit, nr uint32
	args      [6]uint64
}

// filter runs a program as the kernel does.
type filter struct {
	t  *testing.T
	vm *bpf.VM
}

func newFilter(t *testing.T, profile *specs.LinuxSeccomp) filter {
	t.Helper()
	prog, err := Compile(profile)
	if err != nil {
		t.Fatal(err)
	}
	var raw []bpf.RawInstruction
	for _, i := range prog {
		raw = append(raw, bpf.RawInstruction{Op: i.Code, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	ins, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("program has instructions that can't be disassembled")
	}
	vm, err := bpf.NewVM(ins)
	if err != nil {
		t.Fatal(err)
	}
	return filter{t, vm}
}

func (f filter) run(c call) uint32 {
	// The machine reads words in network order, the kernel in its own.
	words := []uint32{c.nr, c.audit, 0, 0}
	for _, a := range c.args {
		words = append(words, lo(a), hi(a))
	}
	var data []byte
	for _, w := range words {
		data = binary.BigEndian.AppendUint32(data, w)
	}
	r, err := f.vm.Run(data)
	if err != nil {
		f.t.Fatal(err)
	}
	return uint32(r)
}

// tables are the names by number of all architectures.
var tables = func() map[uint32]map[uint32]string {
	all := map[uint32]map[uint32]string{}
	for _, a := range abis {
		a.x32 = a.audit == abis[specs.ArchX86_64].audit
		all[a.audit] = map[uint32]string{}
		for name, numbers := range a.table() {
			for _, nr := range numbers {
				all[a.audit][nr] = name
			}
		}
	}
	return all
}()

// evaluate says what profile means for c, without any cleverness.
func evaluate(profile *specs.LinuxSeccomp, c call) uint32 {
	def, _ := actionValue(profile.DefaultAction, profile.DefaultErrnoRet)
	for _, a := range architectures(profile) {
		if a.audit != c.audit {
			continue
		}
		nr := c.nr
		if a.x32 {
			nr &^= x32Bit
		} else if nr >= x32Bit {
			return retKillProcess
		}
		names := tables[a.audit]
		last := uint32(0)
		for n, name := range names {
			if a.x32 && nr < 512 && n >= 512 {
				continue // the two ABIs' own numbers come after those they share
			}
			if (n < 512 || a.x32 || a.audit != abis[specs.ArchX86_64].audit) && slices.ContainsFunc(profile.Syscalls, func(s specs.LinuxSyscall) bool { return slices.Contains(s.Names, name) }) {
				last = max(last, n)
			}
		}
		if nr > last && isRefusal(def) {
			return retErrno | uint32(unix.ENOSYS)
		}
		result := def
		for _, rule := range profile.Syscalls {
			if nr >= 512 && !a.x32 && a.audit == abis[specs.ArchX86_64].audit || !slices.Contains(rule.Names, names[nr]) {
				continue
			}
			value, _ := actionValue(rule.Action, rule.ErrnoRet)
			if len(rule.Args) == 0 {
				result = value
			} else if holds(rule.Args, c) {
				return value
			}
		}
		return result
	}
	return retKillProcess
}

func holds(args []specs.LinuxSeccompArg, c call) bool {
	one := func(a specs.LinuxSeccompArg) bool {
		v := c.args[a.Index]
		switch a.Op {
		case specs.OpEqualTo:
			return v == a.Value
		case specs.OpNotEqual:
			return v != a.Value
		case specs.OpLessThan:
			return v < a.Value
		case specs.OpLessEqual:
			return v <= a.Value
		case specs.OpGreaterThan:
			return v > a.Value
		case specs.OpGreaterEqual:
			return v >= a.Value
		}
		return v&a.Value == a.ValueTwo&a.Value
	}
	if repeatsArg(args) {
		return slices.ContainsFunc(args, one)
	}
	return !slices.ContainsFunc(args, func(a specs.LinuxSeccompArg) bool { return !one(a) })
}

func defaultProfile(t *testing.T, caps ...string) *specs.LinuxSeccomp {
	t.Helper()
	p, err := moby.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Every number of every architecture under Docker's profile, with arguments
// that conditions are about.
func TestDefaultProfile(t *testing.T) {
	for _, caps := range [][]string{nil, {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}} {
		profile := defaultProfile(t, caps...)
		f := newFilter(t, profile)
		var values []uint64
		for _, s := range profile.Syscalls {
			for _, a := range s.Args {
				values = append(values, a.Value, a.Value-1, a.Value+1, a.Value|1<<40)
			}
		}
		for _, audit := range []uint32{0xc000003e, 0x40000003, 0xc00000b7, 0x40000028, 0} {
			var numbers []uint32
			for nr := range uint32(600) {
				numbers = append(numbers, nr, x32Bit+nr)
			}
			for _, nr := range append(numbers, 0xf0002, ^uint32(0)) {
				c := call{audit: audit, nr: nr}
				want := evaluate(profile, c)
				if got := f.run(c); got != want {
					t.Fatalf("%+v: %#x, want %#x", c, got, want)
				}
			}
		}
		for _, name := range []string{"clone", "personality", "socket"} {
			nr := abis[nativeArch].table()[name][0]
			for _, v := range values {
				c := call{audit: abis[nativeArch].audit, nr: nr, args: [6]uint64{v, 0, 0}}
				if got, want := f.run(c), evaluate(profile, c); got != want {
					t.Fatalf("%s(%#x): %#x, want %#x", name, v, got, want)
				}
			}
		}
	}
}

func TestRandomProfiles(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	actions := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActKill, specs.ActTrap, specs.ActLog, specs.ActKillProcess, specs.ActTrace}
	ops := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual}
	names := []string{"read", "write", "openat", "mmap", "clone", "getpid", "socket"}
	values := []uint64{0, 1, 2, 1<<32 - 1, 1 << 32, 1<<32 + 1, 1 << 40, ^uint64(0)}
	pick := func() uint64 { return values[rnd.IntN(len(values))] }
	for range 200 {
		profile := &specs.LinuxSeccomp{DefaultAction: actions[rnd.IntN(len(actions))], Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86}}
		for range rnd.IntN(12) {
			rule := specs.LinuxSyscall{Names: []string{names[rnd.IntN(len(names))]}, Action: actions[rnd.IntN(len(actions))]}
			for range rnd.IntN(4) {
				rule.Args = append(rule.Args, specs.LinuxSeccompArg{Index: uint(rnd.IntN(3)), Value: pick(), ValueTwo: pick(), Op: ops[rnd.IntN(len(ops))]})
			}
			profile.Syscalls = append(profile.Syscalls, rule)
		}
		f := newFilter(t, profile)
		table := abis[nativeArch].table()
		for range 300 {
			c := call{audit: abis[nativeArch].audit, nr: table[names[rnd.IntN(len(names))]][0], args: [6]uint64{pick(), pick(), pick()}}
			if got, want := f.run(c), evaluate(profile, c); got != want {
				t.Fatalf("%+v under %+v: %#x, want %#x", c, profile, got, want)
			}
		}
	}
}

func TestBadProfiles(t *testing.T) {
	for want, p := range map[string]specs.LinuxSeccomp{
		"SCMP_ACT_NOTIFY: there are no seccomp agents": {DefaultAction: specs.ActNotify},
		"rule for [write]": {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"write"}, Action: "nonsense"}}},
		"argument 6":       {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"write"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Index: 6, Op: specs.OpEqualTo}}}}},
		"SCMP_CMP_BOGUS":   {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"write"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{{Op: "SCMP_CMP_BOGUS"}}}}},
	} {
		if _, err := Compile(&p); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one about %s", err, want)
		}
	}
}

func TestTables(t *testing.T) {
	for arch, want := range map[specs.Arch]map[string]uint32{
		specs.ArchX86_64:  {"read": 0, "execve": 59, "clone3": 435},
		specs.ArchX86:     {"read": 3, "execve": 11, "clone3": 435},
		specs.ArchAARCH64: {"read": 63, "execve": 221, "newfstatat": 79},
		specs.ArchARM:     {"read": 3, "execve": 11, "cacheflush": 0xf0002},
	} {
		table := abis[arch].table()
		for name, nr := range want {
			if got := table[name]; len(got) != 1 || got[0] != nr {
				t.Errorf("%s %s is %#x, want %#x", arch, name, got, nr)
			}
		}
	}
	amd64 := abis[specs.ArchX86_64]
	amd64.x32 = true
	if got := amd64.table()["execve"]; !slices.Equal(got, []uint32{59, 520}) {
		t.Errorf("with x32, execve is %v", got)
	}
}

func BenchmarkCompile(b *testing.B) {
	profile, err := moby.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}})
	if err != nil {
		b.Fatal(err)
	}
	var n int
	for b.Loop() {
		prog, err := Compile(profile)
		if err != nil {
			b.Fatal(err)
		}
		n = len(prog)
	}
	b.ReportMetric(float64(n), "instructions")
}
