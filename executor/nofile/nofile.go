//go:build linux

// Package nofile knows the limit of open files that this process was started
// with.
//
// The os package raises the soft limit to the hard one when it is initialised;
// a child must not inherit that, since programs that use select break with
// more than 1024 files. Only what runs before os is initialised can see the
// original. So this package imports nothing but syscall: Go initialises
// packages as soon as their imports are, in the order of their paths, and os
// comes after this path and after more imports.
package nofile

import "syscall"

// Limit is the original limit.
var Limit = get()

func get() (r syscall.Rlimit) {
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return syscall.Rlimit{Cur: 1024, Max: 4096} // the kernel's own defaults
	}
	return r
}
