package cgroup

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DeviceRule allows or denies access to devices; a number of -1 stands for all.
type DeviceRule struct {
	Deny         bool // applies to any of Access; otherwise to nothing beyond Access
	Any          bool // both kinds of devices, whatever Block says
	Block        bool
	Major, Minor int64
	Access       string // of r, w and m
}

// DefaultDevices are the rules for confined processes: make any node, use
// those that every container has.
var DefaultDevices = []DeviceRule{
	{Block: false, Major: -1, Minor: -1, Access: "m"},
	{Block: true, Major: -1, Minor: -1, Access: "m"},
	{Major: 1, Minor: 3, Access: "rwm"},    // null
	{Major: 1, Minor: 5, Access: "rwm"},    // zero
	{Major: 1, Minor: 7, Access: "rwm"},    // full
	{Major: 1, Minor: 8, Access: "rwm"},    // random
	{Major: 1, Minor: 9, Access: "rwm"},    // urandom
	{Major: 5, Minor: 0, Access: "rwm"},    // tty
	{Major: 5, Minor: 2, Access: "rwm"},    // ptmx
	{Major: 136, Minor: -1, Access: "rwm"}, // pts
	{Major: 10, Minor: 200, Access: "rwm"}, // net/tun
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
	if r.Any {
		kind = "a"
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

// ConfineV1 applies rules to a group of the devices controller, in their order.
func ConfineV1(dir string, rules []DeviceRule) error {
	for _, r := range rules {
		file := "devices.allow"
		if r.Deny {
			file = "devices.deny"
		}
		if err := write(filepath.Join(dir, file), r.String()); err != nil {
			return fmt.Errorf("%s %s: %w", file, r, err)
		}
	}
	return nil
}

// ConfineV2 makes a group obey rules, of which the last that matches counts,
// besides what it obeys already.
func ConfineV2(dir string, rules []DeviceRule) error {
	group, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open cgroup %s: %w", dir, err)
	}
	defer unix.Close(group)
	rules = slices.Clone(rules)
	slices.Reverse(rules)
	prog, err := loadDeviceProgram(rules)
	if err != nil {
		return err
	}
	return errors.Join(attachDevices(group, prog), unix.Close(prog))
}

// deviceProgram answers as the first rule that matches does, and 0 if none
// does. The context it gets in r1
// is struct bpf_cgroup_dev_ctx: access<<16|type, major, minor.
func deviceProgram(rules []DeviceRule) []insn {
	const (
		ldxW, mov32, and32, rsh32, jne, jeq, movImm, exit = 0x61, 0xbc, 0x54, 0x74, 0x55, 0x15, 0xb7, 0x95
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
		named := int32(0)
		for _, c := range r.Access {
			named |= map[rune]int32{'m': 1, 'r': 2, 'w': 4}[c]
		}
		var body []insn
		if !r.Any {
			body = append(body, insn{jne, 2, 0, kind})
		}
		allow := int32(1)
		if r.Deny {
			allow = 0
			if named != 7 { // what is asked for has nothing of it: to the next rule
				body = append(body, insn{mov32, 0 | 3<<4, 0, 0}, insn{and32, 0, 0, named}, insn{jeq, 0, 0, 0})
			}
		} else if denied := 7 &^ named; denied != 0 {
			body = append(body, insn{mov32, 0 | 3<<4, 0, 0}, insn{and32, 0, 0, denied}, insn{jne, 0, 0, 0})
		}
		if r.Major >= 0 {
			body = append(body, insn{jne, 4, 0, int32(r.Major)})
		}
		if r.Minor >= 0 {
			body = append(body, insn{jne, 5, 0, int32(r.Minor)})
		}
		conditions := len(body)
		body = append(body, insn{movImm, 0, 0, allow}, insn{exit, 0, 0, 0})
		if conditions == 0 { // the kernel refuses programs with instructions that can't be reached
			return append(prog, body...)
		}
		for i := range body {
			if body[i].op == jne || body[i].op == jeq {
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
