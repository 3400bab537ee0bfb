package frontend

import (
	"context"
	"io"
	"syscall"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// ContainerRequest describes a container.
type ContainerRequest struct {
	ID         string // the frontend's name for it
	Mounts     []ContainerMount
	Network    pb.NetMode
	Platform   *pb.Platform // nil: the native one
	Hostname   string
	ExtraHosts []*pb.HostIP
}

// ContainerMount is a mount as in an exec op. What it mounts is Ref or, if that
// is nil, what Mount.ResultID names of the results that came with an error of
// this build; "" is nothing. Input and Output are without meaning.
type ContainerMount struct {
	Mount *pb.Mount
	Ref   Ref
}

// Container is a place where processes run. Its methods are safe for concurrent
// use.
type Container interface {
	// Run runs a process to its end. The first one is the container's first
	// process; the others join it, and end when it does. A process that fails is
	// a *gwpb.ExitError.
	Run(ctx context.Context, req ProcessRequest) error

	// ReadFile, ReadDir and StatFile look inside what the mount with the given
	// index in the request shows, as it is now. Symlinks stay inside of it.
	ReadFile(ctx context.Context, mount int, path string, r *gwpb.FileRange) ([]byte, error)
	ReadDir(ctx context.Context, mount int, path, includePattern string) ([]*fstypes.Stat, error)
	StatFile(ctx context.Context, mount int, path string) (*fstypes.Stat, error)

	// Release ends all processes, and gives back what the container holds.
	Release() error
}

// ProcessRequest describes a process.
type ProcessRequest struct {
	Meta      *pb.Meta
	SecretEnv []*pb.SecretEnv
	Security  pb.SecurityMode
	Terminal  bool // stdin and stdout are one; stderr is unused
	// Stdin is empty if nil; an io.Closer is closed when the process ends.
	Stdin          io.Reader
	Stdout, Stderr io.Writer // nil: discarded
	// Started is called when the process runs, unless it can't be started. It
	// must not block.
	Started func(Process)
}

// Process is a process that was started. It may have ended.
type Process interface {
	Signal(sig syscall.Signal) error
	Resize(rows, cols uint16) error
}
