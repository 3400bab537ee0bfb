// Package frontend is the contract between frontends, which turn a request
// into definitions, and the daemon, which they may ask back through a Bridge.
package frontend

import (
	"context"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/source/git"
	"github.com/kilnbuild/kiln/ops/source/http"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// Frontend makes a Result from a request.
type Frontend interface {
	Solve(ctx context.Context, b Bridge, req Request) (*Result, error)
}

// Request is what a client asked a frontend for.
type Request struct {
	Opts      map[string]string         // frontend attributes, without prefix
	Inputs    map[string]*pb.Definition // frontend inputs
	SessionID string
}

// Bridge is what a frontend may ask of the daemon, within one build.
type Bridge interface {
	// Solve turns a definition, or another frontend's request, into a Result
	// of lazy refs: nothing runs until a ref is needed, unless Evaluate is set.
	Solve(ctx context.Context, req SolveRequest) (*Result, error)

	// ResolveSourceMeta asks a source what it stands for (GW-023, -024).
	// It shows as a vertex named LogName.
	ResolveSourceMeta(ctx context.Context, op *pb.SourceOp, opt MetaOptions) (*SourceMeta, error)

	// NewContainer makes a container for processes of the frontend's own, which
	// lasts until it is released or the build ends.
	NewContainer(ctx context.Context, req ContainerRequest) (Container, error)

	// Warn shows a warning at a vertex.
	Warn(ctx context.Context, w progress.Warning)

	// Platforms are those of the default worker, native first.
	Platforms() []ocispec.Platform
}

// SolveRequest is one request to Bridge.Solve.
type SolveRequest struct {
	Definition   *pb.Definition
	Frontend     string
	Opts         map[string]string
	Inputs       map[string]*pb.Definition
	CacheImports []*gwpb.CacheOptionsEntry
	Policies     []*spb.Policy
	Evaluate     bool
}

// MetaOptions qualify ResolveSourceMeta.
type MetaOptions struct {
	Platform    *ocispec.Platform
	LogName     string
	ResolveMode string // default, pull or local
	NoConfig    bool
	Objects     bool                  // of git: fetch the commit, too
	Checksum    *http.ChecksumRequest // of a download; nil for none
	Policies    []*spb.Policy
}

// SourceMeta is what a source says of itself. For an image, Digest and Config
// are those of the manifest chosen by platform.
type SourceMeta struct {
	Op     *pb.SourceOp // after policy
	Digest digest.Digest
	Config []byte

	Git  *git.Meta  // of a git source
	HTTP *http.Meta // of a download
}

// Result is what a frontend makes: one ref or, for several platforms, a map of
// refs by platform id, with metadata such as the image config (GW-040, -041).
type Result struct {
	Ref      Ref // nil is scratch
	Refs     map[string]Ref
	Metadata map[string][]byte
}

// Ref is a lazy reference to a solved definition. It is valid until the build
// ends.
type Ref interface {
	// Definition is what the ref stands for.
	Definition() *pb.Definition
	// Evaluate solves it.
	Evaluate(ctx context.Context) error
	// ReadFile, ReadDir and StatFile evaluate and look inside; symlinks are
	// resolved inside the root.
	ReadFile(ctx context.Context, path string, r *gwpb.FileRange) ([]byte, error)
	ReadDir(ctx context.Context, path, includePattern string) ([]*fstypes.Stat, error)
	StatFile(ctx context.Context, path string) (*fstypes.Stat, error)
}
