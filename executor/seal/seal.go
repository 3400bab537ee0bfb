//go:build linux && (amd64 || arm64)

// Package seal keeps containers from the program that makes them.
//
// A container whose program is /proc/self/exe, or has it as its interpreter,
// executes the file of whoever made it: that is what a process on its way into
// a container is, before its own execve. From there it could open the file for
// writing and change what the machine's root runs next, as runc's was in 2019.
// So the file is executed from a mount of it alone, which is read-only and
// attached nowhere. That costs no copy of it.
package seal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/kilnbuild/kiln/executor/kernel"
	"github.com/kilnbuild/kiln/executor/seal/again"
	"golang.org/x/sys/unix"
)

// Self returns in a process that executes its program from a read-only mount.
// In another one it executes the program once more, with the same arguments and
// environment, so it has to come before everything that can't be done twice.
func Self() error {
	switch err := again.Exec(os.Args, os.Environ()); {
	case err == nil:
		// Kernels before 6.14 call a program after the number of its file.
		return os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
	case errors.Is(err, unix.EPERM):
		return errors.New("protect own program from containers: that needs root")
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("protect own program from containers: %w", kernel.TooOld())
	default:
		return fmt.Errorf("protect own program from containers: %w", err)
	}
}
