//go:build linux && (amd64 || arm64)

// Package nofile knows the limit of open files that this process was started
// with.
//
// The syscall package raises the soft limit to the hard one when it is
// initialised, and tells only its own children the original. A container must
// not inherit the raised one, since programs that use select break with more
// than 1024 files. So this package imports nothing and does the system call in
// assembly: Go initialises packages as soon as their imports are, in the order
// of their paths, and this path comes before syscall.
package nofile

// Limit is the original limit.
var Limit = get()

// Rlimit is struct rlimit64 of the kernel.
type Rlimit struct{ Cur, Max uint64 }

func get() (r Rlimit) {
	if getrlimit(&r) != 0 {
		return Rlimit{Cur: 1024, Max: 4096} // the kernel's own defaults
	}
	return r
}

// getrlimit reads RLIMIT_NOFILE and returns 0 or a negative errno.
//
//go:noescape
func getrlimit(r *Rlimit) int64
