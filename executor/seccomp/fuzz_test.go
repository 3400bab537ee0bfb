package seccomp

import (
	"encoding/binary"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// input hands out the fuzzer's bytes; zeros when they are used up.
type input struct{ rest []byte }

func (in *input) next() byte {
	if len(in.rest) == 0 {
		return 0
	}
	b := in.rest[0]
	in.rest = in.rest[1:]
	return b
}

func (in *input) below(n int) int { return int(in.next()) % n }

// value is one that is likely to be near another, or any.
func (in *input) value() uint64 {
	edges := []uint64{0, 1, 2, 0x7e020000, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 1 << 40, 1<<63 - 1, 1 << 63, ^uint64(0) - 1, ^uint64(0)}
	if i := in.below(len(edges) + 2); i < len(edges) {
		return edges[i]
	}
	var b [8]byte
	for i := range b {
		b[i] = in.next()
	}
	return binary.LittleEndian.Uint64(b[:])
}

var (
	fuzzActions = []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActKill, specs.ActTrap, specs.ActLog, specs.ActKillProcess, specs.ActTrace}
	fuzzOps     = []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual}
	fuzzNames   = []string{"read", "write", "openat", "clone", "clone3", "getpid", "socket", "execve", "ioctl", "openat2", "mseal", "waitpid", "set_tls", "rt_sigaction", "nonsense"}
	fuzzArches  = []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32, specs.ArchAARCH64, specs.ArchARM, specs.ArchMIPS}
)

func (in *input) profile() *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{DefaultAction: fuzzActions[in.below(len(fuzzActions))]}
	if in.below(3) == 0 {
		n := uint(in.next())
		p.DefaultErrnoRet = &n
	}
	for range in.below(len(fuzzArches)) {
		p.Architectures = append(p.Architectures, fuzzArches[in.below(len(fuzzArches))])
	}
	for range in.below(16) {
		rule := specs.LinuxSyscall{Action: fuzzActions[in.below(len(fuzzActions))]}
		for range 1 + in.below(3) {
			rule.Names = append(rule.Names, fuzzNames[in.below(len(fuzzNames))])
		}
		if in.below(3) == 0 {
			n := uint(in.next())
			rule.ErrnoRet = &n
		}
		for range in.below(4) {
			rule.Args = append(rule.Args, specs.LinuxSeccompArg{Index: uint(in.below(6)), Value: in.value(), ValueTwo: in.value(), Op: fuzzOps[in.below(len(fuzzOps))]})
		}
		p.Syscalls = append(p.Syscalls, rule)
	}
	return p
}

func (in *input) call() call {
	audits := []uint32{0xc000003e, 0x40000003, 0xc00000b7, 0x40000028, 0}
	c := call{audit: audits[in.below(len(audits))]}
	if in.below(8) == 0 {
		c.nr = uint32(in.value())
	} else {
		c.nr = uint32(in.next()) | uint32(in.below(3))<<8
	}
	if in.below(4) == 0 {
		c.nr |= x32Bit
	}
	for i := range c.args {
		c.args[i] = in.value()
	}
	return c
}

// What Compile makes of a profile answers as the profile, read literally, does.
func FuzzCompile(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x01\x01\x00\x05\x00\x01\x02\x03\x04\x08some rules and calls, whatever they may come to be: 0123456789"))
	f.Add([]byte("\x00\x00\x26\x03\x00\x02\x01\x0f\x01\x03\x04\x02\x03\x07\x08\x01\x09\x03\x01\x02\x05\x06\xff\xfe\xfd\xfc\xfb"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := &input{data}
		profile := in.profile()
		filter := newFilter(t, profile)
		for range 16 {
			c := in.call()
			// The numbers that the profile is about, too.
			for _, nr := range append(abis[nativeArch].table()[fuzzNames[in.below(len(fuzzNames))]], c.nr) {
				c.nr = nr
				if got, want := filter.run(c), evaluate(profile, c); got != want {
					t.Fatalf("%+v under %+v: %#x, want %#x", c, profile, got, want)
				}
			}
		}
	})
}
