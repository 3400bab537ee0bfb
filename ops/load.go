package ops

import (
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
)

// Loader turns definitions into vertices. It holds what ops of all builds
// share. Its methods are safe for concurrent use.
type Loader struct {
	cfg     Config
	sources map[string]Source // by scheme
	slots   slots
	caches  *cacheMounts
	logs    logLimits
	secrets []byte // key of the hashes by which steps with secrets are compared

	interrupted interruptedSteps
}

// NewLoader returns a loader for ops that work with cfg.
func NewLoader(cfg Config) (*Loader, error) {
	l := &Loader{
		cfg:     cfg,
		sources: map[string]Source{},
		slots:   newSlots(cfg.Parallelism),
		caches:  newCacheMounts(cfg.Cache),
		secrets: make([]byte, 32),
	}
	if l.cfg.Log == nil {
		l.cfg.Log = slog.New(slog.DiscardHandler)
	}
	l.cfg.Platform = platforms.Normalize(cfg.Platform)
	rand.Read(l.secrets) // never fails
	for _, src := range cfg.Sources {
		for _, scheme := range src.Schemes() {
			if l.sources[scheme] != nil {
				return nil, fmt.Errorf("two sources serve the scheme %q", scheme)
			}
			l.sources[scheme] = src
		}
	}
	var err error
	if l.logs, err = logLimitsFromEnv(); err != nil {
		return nil, err
	}
	return l, nil
}

// LoadOptions qualify one Load.
type LoadOptions struct {
	// Entitlements are those that this build was granted (CTL-023); an op that
	// needs another is refused.
	Entitlements map[string]bool
	// NoCache marks every op ignore-cache.
	NoCache bool
	// Nested solves what steps find to be solved; nil refuses such steps.
	Nested Nested
	// Limits hold for every step whose description sets no others.
	Limits Limits
}

// Load checks def (LLB-001, -003, -004) and returns the edge that its last op
// points to. A nil definition, or one without ops, gives an Edge without
// Vertex: scratch. Every error names the op and the field, is never a panic,
// and carries the gRPC code InvalidArgument where the definition is at fault.
func (l *Loader) Load(def *pb.Definition, opts LoadOptions) (solver.Edge, error) {
	if def == nil || len(def.Def) == 0 {
		return solver.Edge{}, nil
	}
	target, index, err := parse(def)
	if err != nil {
		return solver.Edge{}, err
	}
	nodes, err := order(target)
	if err != nil {
		return solver.Edge{}, err
	}
	for _, n := range nodes {
		if err := l.build(n, opts); err != nil {
			return solver.Edge{}, inOp(n.digest, err)
		}
	}
	edge, err := target.output(index)
	if err != nil {
		return solver.Edge{}, inOp(target.digest, err)
	}
	return edge, nil
}

// build makes n's vertex; those of its inputs exist.
func (l *Loader) build(n *node, opts LoadOptions) (err error) {
	if n.outputs, err = check(n.op); err != nil {
		return err
	}
	if err := checkCaps(n.meta); err != nil {
		return err
	}
	v := &solver.Vertex{
		Digest:      n.digest,
		Name:        n.name(),
		IgnoreCache: opts.NoCache || n.meta.GetIgnoreCache(),
	}
	for i, in := range n.inputs {
		edge, err := in.output(n.op.Inputs[i].Index)
		if err != nil {
			return invalid(fmt.Sprintf("inputs[%d].index", i), "%w", err)
		}
		v.Inputs = append(v.Inputs, edge)
	}
	if g := n.meta.GetProgressGroup(); g != nil {
		v.Group = &progress.Group{ID: g.Id, Name: g.Name, Weak: g.Weak}
	}
	if e := n.meta.GetExportCache(); e != nil {
		v.ExportCache = &e.Value
	}
	v.Op, err = l.op(n, vertex{
		pb:          n.op,
		digest:      n.digest,
		name:        v.Name,
		description: n.meta.GetDescription(),
		platform:    l.platform(n.op.Platform),
		ignoreCache: v.IgnoreCache,
	}, opts)
	n.vertex = v
	return err
}

// op makes the behaviour behind a vertex.
func (l *Loader) op(n *node, v vertex, opts LoadOptions) (solver.Op, error) {
	switch x := n.op.Op.(type) {
	case *pb.Op_Source:
		return l.newSourceOp(v, x.Source)
	case *pb.Op_Exec:
		if err := checkEntitlements(x.Exec, opts.Entitlements); err != nil {
			return nil, err
		}
		limits, err := opts.Limits.With(v.description)
		if err != nil {
			return nil, &DefinitionError{Field: "description", Code: codes.InvalidArgument, Err: err}
		}
		return l.newExecOp(v, x.Exec, n.meta.GetLinuxResources(), limits)
	case *pb.Op_File:
		return l.newFileOp(v, x.File)
	case *pb.Op_Merge:
		return &mergeOp{vertex: v, op: x.Merge, cache: l.cfg.Cache}, nil
	case *pb.Op_Diff:
		return &diffOp{vertex: v, op: x.Diff, cache: l.cfg.Cache}, nil
	case *pb.Op_Build:
		return l.newNestedOp(v, x.Build, opts.Nested)
	case *pb.Op_Passthrough:
		return &passthroughOp{vertex: v, op: x.Passthrough}, nil
	}
	return nil, fmt.Errorf("internal error: op of kind %T was checked but can't be made", n.op.Op)
}

// platform is p normalised, or the daemon's default (LLB-005).
func (l *Loader) platform(p *pb.Platform) ocispec.Platform {
	if p == nil {
		return l.cfg.Platform
	}
	return platforms.Normalize(p.Spec())
}

// output is the edge to one of n's outputs.
func (n *node) output(index int64) (solver.Edge, error) {
	if index < 0 || index >= int64(n.outputs) {
		return solver.Edge{}, fmt.Errorf("op %s has no output %d, it has %d of them", n.digest, index, n.outputs)
	}
	return solver.Edge{Vertex: n.vertex, Index: int(index)}, nil
}

// schemes lists what the daemon can fetch from, for messages.
func (l *Loader) schemes() string {
	return strings.Join(slices.Sorted(maps.Keys(l.sources)), ", ")
}
