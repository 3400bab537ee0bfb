package cgroup

import (
	"fmt"
	"path/filepath"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DeviceRule allows access to devices; a number of -1 stands for all.
type DeviceRule struct {
	Block        bool
	Major, Minor int64
	Access       string // of r, w and m
}

// DefaultDevices are the rules for confined processes: make any node, use
// those that every container has.
var DefaultDevices = []DeviceRule{
	{false, -1, -1, "m"},
	{true, -1, -1, "m"},
	{false, 1, 3, "rwm"},    // null
	{false, 1, 5, "rwm"},    // zero
	{false, 1, 7, "rwm"},    // full
	{false, 1, 8, "rwm"},    // random
	{false, 1, 9, "rwm"},    // urandom
	{false, 5, 0, "rwm"},    // tty
	{false, 5, 2, "rwm"},    // ptmx
	{false, 136, -1, "rwm"}, // pts
	{false, 10, 200, "rwm"}, // net/tun
}

// setDevicesV1 makes dir allow the rules and nothing else.
func setDevicesV1(dir string, rules []DeviceRule) error {
	if err := write(filepath.Join(dir, "devices.deny"), "a"); err != nil {
		return fmt.Errorf("deny devices: %w", err)
	}
	for _, r := range rules {
		if err := write(filepath.Join(dir, "devices.allow"), r.String()); err != nil {
			return fmt.Errorf("allow devices %s: %w", r, err)
		}
	}
	return nil
}

func (r DeviceRule) String() string {
	number := func(n int64) string {
		if n < 0 {
			return "*"
		}
		return fmt.Sprint(n)
	}
	kind := "c"
	if r.Block {
		kind = "b"
	}
	return fmt.Sprintf("%s %s:%s %s", kind, number(r.Major), number(r.Minor), r.Access)
}

// insn is one eBPF instruction.
type insn struct {
	op  uint8
	reg uint8 // destination, source << 4
	off int16
	imm int32
}

// deviceProgram answers 1 for what a rule allows. The context it gets in r1
// is struct bpf_cgroup_dev_ctx: access<<16|type, major, minor.
func deviceProgram(rules []DeviceRule) []insn {
	const (
		ldxW, mov32, and32, rsh32, jne, movImm, exit = 0x61, 0xbc, 0x54, 0x74, 0x55, 0xb7, 0x95
	)
	prog := []insn{
		{ldxW, 2 | 1<<4, 0, 0},  // r2 = access<<16|type
		{mov32, 3 | 2<<4, 0, 0}, // r3 = r2
		{and32, 2, 0, 0xffff},   // r2 = type
		{rsh32, 3, 0, 16},       // r3 = access
		{ldxW, 4 | 1<<4, 4, 0},  // r4 = major
		{ldxW, 5 | 1<<4, 8, 0},  // r5 = minor
	}
	for _, r := range rules {
		kind := int32(2)
		if r.Block {
			kind = 1
		}
		denied := int32(7)
		for _, c := range r.Access {
			denied &^= map[rune]int32{'m': 1, 'r': 2, 'w': 4}[c]
		}
		body := []insn{{jne, 2, 0, kind}}
		if denied != 0 {
			body = append(body, insn{mov32, 0 | 3<<4, 0, 0}, insn{and32, 0, 0, denied}, insn{jne, 0, 0, 0})
		}
		if r.Major >= 0 {
			body = append(body, insn{jne, 4, 0, int32(r.Major)})
		}
		if r.Minor >= 0 {
			body = append(body, insn{jne, 5, 0, int32(r.Minor)})
		}
		body = append(body, insn{movImm, 0, 0, 1}, insn{exit, 0, 0, 0})
		for i := range body {
			if body[i].op == jne {
				body[i].off = int16(len(body) - 1 - i) // to the next rule
			}
		}
		prog = append(prog, body...)
	}
	return append(prog, insn{movImm, 0, 0, 0}, insn{exit, 0, 0, 0})
}

// Numbers of linux/bpf.h.
const (
	bpfProgLoad     = 5
	bpfProgAttach   = 8
	progTypeDevice  = 15
	attachDevice    = 6
	attachAllowMore = 2
)

// loadDeviceProgram gives the rules to the kernel and returns the program's
// file descriptor.
func loadDeviceProgram(rules []DeviceRule) (int, error) {
	prog := deviceProgram(rules)
	license := []byte("MIT\x00")
	attr := struct {
		kind, count    uint32
		insns, license uint64
		rest           [12]uint64
	}{
		kind: progTypeDevice, count: uint32(len(prog)),
		insns:   uint64(uintptr(unsafe.Pointer(&prog[0]))),
		license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, bpfProgLoad, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	for errno == unix.EAGAIN { // a signal, such as Go's own between goroutines, stopped the kernel's check
		fd, _, errno = unix.Syscall(unix.SYS_BPF, bpfProgLoad, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}
	runtime.KeepAlive(prog)
	runtime.KeepAlive(license)
	if errno != 0 {
		return -1, fmt.Errorf("load device filter: %w", errno)
	}
	return int(fd), nil
}

// attachDevices makes an open cgroup directory obey a loaded program.
func attachDevices(cgroup, prog int) error {
	attr := struct{ target, prog, kind, flags uint32 }{uint32(cgroup), uint32(prog), attachDevice, attachAllowMore}
	_, _, errno := unix.Syscall(unix.SYS_BPF, bpfProgAttach, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return fmt.Errorf("attach device filter: %w", errno)
	}
	return nil
}
