package executor

import (
	"errors"

	"github.com/kilnbuild/kiln/executor/kernel"
	"golang.org/x/sys/unix"
)

// mountSetattr is unix.MountSetattr; a test makes it that of an older kernel.
var mountSetattr = unix.MountSetattr

// checkKernel fails on kernels that are too old.
func checkKernel() error {
	err := mountSetattr(-1, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE})
	if errors.Is(err, unix.ENOSYS) {
		return kernel.TooOld()
	}
	return nil // it complains of the descriptor
}
