package seccomp

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

//go:generate go run gen/main.go

// x32Bit marks calls of the x32 ABI, which otherwise look like those of amd64.
const x32Bit = 0x40000000

// firstX32Only is the first of the numbers that x32 has to itself. Those that
// both have go on below it.
const firstX32Only = 512

// An abi is a set of system call numbers that a process of this machine can
// use.
type abi struct {
	audit   uint32 // AUDIT_ARCH_*, as seccomp_data has it
	numbers string
	x32     bool // numbers with x32Bit are calls of the x32 ABI
}

var abis = map[specs.Arch]abi{
	specs.ArchX86_64:  {audit: 0xc000003e, numbers: numbersAMD64},
	specs.ArchX86:     {audit: 0x40000003, numbers: numbers386},
	specs.ArchAARCH64: {audit: 0xc00000b7, numbers: numbersARM64},
	specs.ArchARM:     {audit: 0x40000028, numbers: numbersARM},
}

// allArchitectures are those that the specification has.
var allArchitectures = []specs.Arch{
	specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64, specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32,
	specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32, specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X,
	specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64, specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

var nativeArch = map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}[runtime.GOARCH]

// table returns the numbers of a's calls by name.
func (a abi) table() map[string][]uint32 {
	t := map[string][]uint32{}
	add := func(numbers string) {
		for line := range strings.SplitSeq(numbers, "\n") {
			name, nr, _ := strings.Cut(line, " ")
			n, err := strconv.ParseUint(nr, 10, 32)
			if err != nil {
				panic(fmt.Sprintf("internal error: system call table: %v", err))
			}
			t[name] = append(t[name], uint32(n))
		}
	}
	add(a.numbers)
	if a.x32 {
		add(numbersX32Only)
	}
	return t
}

// architectures returns the profile's architectures that this machine can
// have, always with the native one.
func architectures(profile *specs.LinuxSeccomp) []abi {
	list := []specs.Arch{nativeArch}
	for _, a := range profile.Architectures {
		// Another one is of another machine: no process here can use it.
		if _, ok := abis[a]; ok && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	var found []abi
	for _, name := range list {
		a := abis[name]
		a.x32 = name == specs.ArchX86_64 && slices.Contains(profile.Architectures, specs.ArchX32)
		found = append(found, a)
	}
	return found
}
