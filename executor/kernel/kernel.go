//go:build linux

// Package kernel says which kernels containers can be made on.
package kernel

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// TooOld is the error of a kernel without mount_setattr, the newest system call that has
// no stand-in. It is the call that counts, not the version: some distributions'
// older kernels have it.
func TooOld() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("ask for the kernel's version: %w", err)
	}
	return fmt.Errorf("this kernel, Linux %s, is too old, or something forbids mount_setattr: kiln needs Linux 5.15 or newer", unix.ByteSliceToString(u.Release[:]))
}
