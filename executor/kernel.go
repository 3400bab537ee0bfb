package executor

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// mountSetattr is unix.MountSetattr; a test makes it that of an older kernel.
var mountSetattr = unix.MountSetattr

// checkKernel fails on kernels without the newest system call that has no
// stand-in here. It asks for the call, not for a version: some distributions'
// older kernels have it.
func checkKernel() error {
	err := mountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE})
	if !errors.Is(err, unix.ENOSYS) {
		return nil // it complains of the descriptor
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("ask for the kernel's version: %w", err)
	}
	return fmt.Errorf("this kernel, Linux %s, is too old, or something forbids mount_setattr: kiln needs Linux 5.15 or newer", unix.ByteSliceToString(u.Release[:]))
}
