// Package executor runs one process in a root filesystem, isolated as an OCI
// runtime-spec says.
//
// An Executor turns a Process into a specs.Spec and gives it to a runtime: the
// built-in one, or runc, crun or another binary. It knows no LLB, cache or
// session.
//
// # The order of the stages
//
// What needs no process of the container's is done first, from outside, for
// every runtime. Each stage can be seen in BenchmarkPrepare:
//
//	network       a namespace that was made ahead is taken. It is the one stage
//	              that may wait for others, so nothing is held yet
//	root          what the root filesystem is made of is mounted, detached: no
//	              other process has a path to it
//	user          looked up in the root, before mounts can cover its passwd file
//	files         resolv.conf and hosts
//	mounts        sources of the process's own mounts, detached, too; a selector
//	              is followed inside its source
//	mount points  made where the root lacks them, which takes all mounts to be
//	              known: those inside others are made when these are mounted
//	cwd           made, as the user that is known by now
//	spec          of all that
//	cgroup        taken last, so that what it counts is the process's
//
// The built-in runtime's child then goes on by itself; BenchmarkRun tells how long
// each of its stages takes, and package native how they are done. What other runtimes
// do has the same result:
//
//	session       a session and keyring: nothing of the daemon's is there by accident
//	descriptors   closed before the first path is followed that somebody else chose
//	cgroup        joined before anything is used that it should count
//	network       entered before /sys is mounted, which shows the mounter's network
//	root          entered: from now on no link leads to the machine
//	mount         /proc, /dev, /sys: in the root as the image has it, in which no
//	              process can change anything meanwhile
//	mask          before the process's own mounts, so that what covers is the real
//	              /dev/null and what is covered the real /proc
//	label         written to that /proc, which a mount could have replaced later
//	terminal      in the new /dev/pts
//	bind          the process's own mounts, whose content other processes may change
//	descriptors   closed altogether: mounts were attached by them
//	cwd           can be in one of the mounts
//	limits        after all that a low limit could make fail
//	seccomp       takes privileges, unless there are none to be regained
//	user          after everything that takes privileges
//	exec
//
// When the process has ended, all is undone in reverse, mount points in the root
// among it, so that no layer has them.
package executor

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/network"
	"golang.org/x/sys/unix"
)

// NetMode is the network a process gets.
type NetMode int

// Network modes.
const (
	NetSandbox NetMode = iota // the executor's default, see Config.Network
	NetHost
	NetNone // loopback only
)

// SecurityMode is how far a process is confined.
type SecurityMode int

// Security modes.
const (
	SecuritySandbox SecurityMode = iota
	SecurityInsecure
)

// Process is what to run, where.
type Process struct {
	// ID is unique among running processes. It names the bundle, and the cgroup
	// unless that is one made ahead.
	ID string

	Root         []mount.Mount // how to make the root filesystem visible
	ReadonlyRoot bool
	Mounts       []Mount // in any order; parents are mounted before children

	Args                      []string
	Env                       []string
	Cwd                       string
	User                      string // name or uid[:group or gid], looked up in the root's passwd and group
	Hostname                  string
	Network                   NetMode
	Security                  SecurityMode
	ExtraHosts                []HostIP
	Ulimits                   []Ulimit
	CgroupParent              string
	Resources                 *Resources
	ValidExitCodes            []int // nil: only 0
	RemoveMountStubsRecursive bool

	// Timeout ends a process that runs longer, QuietTimeout one that prints
	// nothing for longer; 0 is no limit.
	Timeout, QuietTimeout time.Duration

	// Stdin is empty if nil. When the process ends, an io.Closer is closed;
	// a Read of another reader that is under way is not waited for.
	Stdin  io.Reader
	Stdout io.Writer // nil: discarded
	Stderr io.Writer

	// Terminal gives the process a terminal of its own instead of three
	// streams: what it prints goes to Stdout, and the end of Stdin is typed as
	// the end of file.
	Terminal bool
	// Started, if set, is called when the process executes its program, before
	// Run returns. It must not block. Runtime binaries tell of a program, too,
	// that they have tried to execute in vain.
	Started func(Running)
}

// Running is a process that was started. Its methods may be called from many
// goroutines, also when the process has ended.
type Running interface {
	// Signal sends sig. A process that has ended is fine.
	Signal(sig unix.Signal) error
	// Resize sets the size of the terminal; without one it does nothing.
	Resize(rows, cols uint16) error
	// Exec runs a further process in the container to its end, which is at the
	// latest that of the container's first process. What p says of the
	// container is of no effect. Cwd must exist. Another Security than the first
	// process's takes the built-in runtime. When ctx ends, the process is sent
	// TERM, then KILL.
	Exec(ctx context.Context, p Process) error
}

// ErrEnded is returned by Exec if the container's first process has ended.
var ErrEnded = errors.New("the container's first process has ended")

// Mount is one mount in the process's filesystem besides the standard ones.
type Mount struct {
	Dest     string // absolute
	Source   []mount.Mount
	Selector string // path below Source that is mounted: a directory or a file
	Readonly bool
}

// HostIP is a line of /etc/hosts.
type HostIP struct {
	Host string
	IP   net.IP
}

// Ulimit is a resource limit; Name is as in ulimit flags, such as "nofile".
type Ulimit struct {
	Name       string
	Soft, Hard int64
}

// Resources limit the process's cgroup; zero values are no limit.
type Resources struct {
	Memory, MemorySwap   int64
	CPUShares, CPUPeriod uint64
	CPUQuota             int64
	CpusetCpus           string
	CpusetMems           string
	Pids                 int64 // processes and threads at once
}

// Usage is what a process and its children used, as its cgroup counted it.
type Usage struct {
	CPU        time.Duration
	MemoryPeak int64 // bytes; 0 if the kernel doesn't count it, as version 2 before Linux 5.19
	PidsPeak   int64 // 0 if the kernel doesn't count it, as before Linux 6.1
	OOMKills   int64
}

// Executor runs processes. Run may be called from many goroutines.
type Executor interface {
	// Run runs p to its end. When ctx ends, the process is sent TERM, then its
	// whole cgroup is killed; nothing of it survives the call. The error is an
	// *ExitError if the process itself failed.
	Run(ctx context.Context, p Process) (Usage, error)

	// Close waits for processes that run, and lets go of what is pooled. It is
	// called once; Run fails afterwards.
	Close() error
}

// DNS overrides what steps find in resolv.conf.
type DNS struct {
	Nameservers, Options, SearchDomains []string
}

// Config is what an Executor is made from.
type Config struct {
	// Root is a directory for bundles and the like, this executor's alone.
	Root string
	// Binary is the OCI runtime to use; "" is the built-in one.
	Binary       string
	CgroupParent string // default cgroup parent; "" is "/kiln"
	DNS          *DNS
	Network      network.Config
	Log          *slog.Logger
	// Grace is how long a cancelled process may take to end after TERM; 0 is
	// DefaultGrace.
	Grace time.Duration
	// Cgroups says where cgroup file systems are; nil: found out.
	Cgroups *cgroup.Tree
	// AppArmor is the profile of processes, but of insecure ones; "" is none.
	AppArmor string
	// Most is what each process gets at most.
	Most Most
	// MachinePIDs has processes see and be among all those that this one sees,
	// where a rootless daemon can't mount a /proc for them. Only such a daemon may.
	MachinePIDs bool
}

// DefaultGrace is the grace of cancelled processes if none is configured.
const DefaultGrace = 100 * time.Millisecond
