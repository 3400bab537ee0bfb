package executor

import (
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// otherABIs are calls that are denied, by their numbers in the ABIs of x32 and
// of 32-bit programs.
var otherABIs = []struct {
	name     string
	x32, x86 uintptr
}{
	{"mount", 165, 21}, {"umount2", 166, 52}, {"unshare", 272, 310}, {"setns", 308, 346}, {"bpf", 321, 357}, {"keyctl", 250, 288}, {"add_key", 248, 286},
	{"init_module", 175, 128}, {"perf_event_open", 298, 336}, {"open_by_handle_at", 304, 342}, {"reboot", 169, 88}, {"pivot_root", 155, 217},
}

const x32Bit = 0x40000000

// probeABIs tries otherABIs and prints how they were refused.
func probeABIs(out io.Writer) error {
	// int 0x80; ret: arguments and result are where Go has them in registers.
	code, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	copy(code, "\xcd\x80\xc3")
	if err := unix.Mprotect(code, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return err
	}
	entry := unsafe.Pointer(&code[0])
	function := unsafe.Pointer(&entry)
	int80 := *(*func(nr, b, c, d, e uintptr) int32)(unsafe.Pointer(&function))
	bad := ^uintptr(0)
	for _, c := range otherABIs {
		_, _, errno := unix.RawSyscall6(c.x32|x32Bit, bad, bad, bad, bad, bad, bad)
		fmt.Fprintf(out, "x32:%s %d\n", c.name, errno)
		fmt.Fprintf(out, "x86:%s %d\n", c.name, -int80(c.x86, bad, bad, bad, bad))
	}
	return nil
}
