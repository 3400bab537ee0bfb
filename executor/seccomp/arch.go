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

// An abi is a set of system call numbers that a process of this machine can
// use.
type abi struct {
	audit   uint32 // AUDIT_ARCH_*, as seccomp_data has it
	base    uint32 // added to all numbers
	numbers string
}

var abis = map[specs.Arch]abi{
	specs.ArchX86_64:  {audit: 0xc000003e, numbers: numbersAMD64},
	specs.ArchX86:     {audit: 0x40000003, numbers: numbers386},
	specs.ArchX32:     {audit: 0xc000003e, base: x32Bit, numbers: numbersX32},
	specs.ArchAARCH64: {audit: 0xc00000b7, numbers: numbersARM64},
	specs.ArchARM:     {audit: 0x40000028, numbers: numbersARM},
}

var nativeArch = map[string]specs.Arch{"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64}[runtime.GOARCH]

// table returns the numbers of a's calls by name.
func (a abi) table() map[string]uint32 {
	t := map[string]uint32{}
	for line := range strings.SplitSeq(a.numbers, "\n") {
		name, nr, _ := strings.Cut(line, " ")
		n, err := strconv.ParseUint(nr, 10, 32)
		if err != nil {
			panic(fmt.Sprintf("internal error: system call table: %v", err))
		}
		t[name] = uint32(n) + a.base
	}
	return t
}

// architectures returns the profile's architectures that this machine can
// have, always with the native one.
func architectures(profile *specs.LinuxSeccomp) []abi {
	list := []specs.Arch{nativeArch}
	for _, a := range profile.Architectures {
		// An unknown one is of another machine: no process here can use it.
		if _, ok := abis[a]; ok && !slices.Contains(list, a) {
			list = append(list, a)
		}
	}
	var found []abi
	for _, a := range list {
		found = append(found, abis[a])
	}
	return found
}
