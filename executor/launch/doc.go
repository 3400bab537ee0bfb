// Package launch starts a process in new namespaces without an init binary.
//
// A container runtime has to do a few hundred system calls between clone and
// exec: mounts, pivot_root, credentials, seccomp. They must be done by the new
// process itself, since they change what it alone sees. The usual way is to
// start a helper binary that does them and then executes the user's program.
// That helper costs more than all the work it does: an exec, a runtime start,
// the loading of a few megabytes.
//
// Here the parent writes the set-up down as a Program: a list of raw system
// calls with all their arguments, strings and structs already in memory, so
// that no decision is left for the child. Launch then clones a child that shares this memory
// (CLONE_VM) and whose only code is a loop of some thirty machine
// instructions: load a step, do the system call, note the result, go on or
// give up. The last step is execve. The child never runs Go code, needs no
// stack, allocates nothing and takes no lock.
//
//	parent (launcher thread)              child
//	clone3(VM|VFORK|NEWPID|NEWNS|..) ---> step 0: setsid
//	  | suspended by the kernel           step 1: join cgroup
//	  | until the child has left          ...
//	  v this memory                       step n: execve
//	read results of all steps  <--------- (new memory, or exit on an error)
//
// Because memory is shared, every step's result is in the program when clone3
// returns: there is no pipe and no protocol, and an error names its stage.
//
// Why CLONE_VFORK: the out-of-memory killer kills all processes that share
// their memory with its victim, and spares only a child between vfork and
// exec. Without the flag a step with a tiny memory limit could take the daemon
// with it. It also means that program memory is free again when clone3
// returns. The price is a suspended thread, so a Launcher has several. They
// are told to the Go scheduler as being in a system call.
//
// Launcher threads never end before Close, because PR_SET_PDEATHSIG fires when
// the parent's thread ends, not its process. Each lives in a mount namespace of
// its own whose only mount is an empty tmpfs. So a clone copies one mount,
// however many the machine has, and nothing of the machine's file system is
// there to be seen, even by a container that isn't completely set up.
//
// # A child that waits
//
// A container that is created now and started later has a child that waits
// before its execve, for as long as nobody starts it, whether its parent lives
// on or not. CLONE_VFORK can't do that, since the parent's thread would be
// suspended, and CLONE_VM without it would leave the child without a program
// when the parent ends. So Fork clones without both: the child has its own
// copy-on-write memory, in which the program lies where it was, and runs the
// same loop of assembly over it. Only the steps with their results are in
// memory that is mapped shared, so that the parent reads how far the child got
// just as it does after Launch. A step that reads from a socket or FIFO is a
// gate: the child goes on when somebody writes. Copying the page tables of a
// process costs more the more memory it uses, which is of no weight in a
// command that starts one container, and is why a daemon uses Launch.
//
// Such a child starts on a thread that has entered the namespaces it is to
// share with others, in a copy of the machine's mounts instead of an empty
// file system: hooks of a container find files there.
//
// # What was not chosen
//
// A tiny static init, embedded and executed from memory,
// costs another exec and a protocol, and is one more binary for each
// architecture. Forking the daemon's Go runtime and going on in Go in the child
// is not safe: other threads' locks stay locked. Set-up by the parent on a
// thread that has entered the new namespaces can't mount /proc of the new PID
// namespace or drop the child's privileges. CLONE_VM without CLONE_VFORK spares
// the suspended threads, at the price described above. A seccomp filter
// installed on launcher threads would be inherited for free, but it would have
// to let set-up calls pass.
package launch
