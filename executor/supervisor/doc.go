// Package supervisor runs processes so that they outlive the daemon that asked
// for them.
//
// A daemon starts one supervisor: its own program again, with another main. All
// steps that may outlive the daemon run in it, each through an executor as the
// daemon has one, so that there is one way to run a step. The supervisor owns
// what belongs to a run: container, cgroup, mounts, log, exit status. The
// daemon sends it a Process over a unix socket and follows.
//
//	daemon                         supervisor
//	Run(Process, note) ----------> executor.Run
//	how long its log is <--------- as it grows; the daemon reads it where it is
//	exit status        <----------
//	done               ----------> forgotten
//
//	killed             ---X        the process goes on, its log grows
//	next daemon: Find  ----------> which steps are there, with their notes
//	Attach(id)         ----------> the log from the start, then as it comes
//
// The note is the caller's: what the next daemon must know to go on with the
// step. A step that nobody is attached to ends when Config.Unclaimed has passed,
// whether it runs or has ended and waits to be asked for its status.
//
// A supervisor ends when its daemon has and no step is left. The next daemon
// starts one of its own, maybe of another version, and leaves the old one to its
// steps. It knows it by its directory, which holds the socket and the state of
// the executor; one that doesn't answer is dead, and Find cleans up after it as
// an executor does after a crash.
//
// # What was not chosen
//
// A process for each step, as containerd's shims are, costs an exec and a
// program start for each: 2.4 ms if it is written in Go. A program small enough
// to cost nothing couldn't do what is to be done when a step ends without a
// daemon: remove mount points, find the cause of a failure, kill what is left.
// One process for all costs a step a message in each direction. Should it be
// killed, its steps end with it, as they do with a daemon that has none.
//
// Containers whose parent is the daemon can't be handed over: only a parent
// learns the exit status, and the pipes that they print to would have no reader
// for a while.
package supervisor
