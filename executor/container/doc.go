// Package container is an OCI runtime: containers that are created, started,
// entered, paused, killed and deleted, by one process or by several after each
// other.
//
// A Runtime is a directory with one directory for each container in it. What
// is written there is what can't be found out otherwise: the spec, the pid of
// the first process with its start time, and the cgroups. Status is not
// written down but looked at each time, so it can't be wrong after a crash:
//
//	creating   the directory is there, state.json isn't complete
//	created    the process lives and its start gate, a FIFO, is there
//	running    the process lives, the gate is gone
//	paused     running, and its cgroup is frozen
//	stopped    the process has ended
//
//	          Create          Start           (its end)        Delete
//	  (none) -------> created -----> running ----------> stopped ----> (none)
//	                    |             |  ^                  ^
//	                    |       Pause v  | Resume           |
//	                    |             paused                |
//	                    +--------------- Kill --------------+
//
// How a process gets into its container, and how it waits before its program is
// executed, is told by packages native and launch. Create returns when the
// process waits at the FIFO, which it holds open for reading and writing; Start
// writes one byte to it. Whoever removes the FIFO's name has started the
// container, which makes Start happen once. When the program is executed the
// process's end is closed, by which Start sees that it is.
//
// It manages cgroups itself, of both versions. Where systemd owns them, and the
// caller wants that, each container is a unit of systemd; see Units.
package container
