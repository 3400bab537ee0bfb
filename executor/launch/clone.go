//go:build linux && (amd64 || arm64)

package launch

// clone starts a child that runs steps and returns when the child has executed
// another program or exited: its pid, or a negative errno.
//
//go:noescape
func clone(args *cloneArgs, steps *step, out *outcome) int64
