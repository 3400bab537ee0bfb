package build

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// bridge is the frontend.Bridge of one build. It owns the results of the refs
// that were solved, until release.
type bridge struct {
	b          *Build
	limits     ops.Limits // of requests that set no others
	containers *containers

	mu       sync.Mutex // guards the fields below; never held across I/O
	held     []solver.Result
	nested   []*pb.Definition // that steps found to be solved
	released bool
}

var _ frontend.Bridge = (*bridge)(nil)

// within is the bridge of a frontend whose request set limits and policies.
type within struct {
	*bridge
	limits   ops.Limits
	policies []*spb.Policy
}

func (w within) Solve(ctx context.Context, req frontend.SolveRequest) (*frontend.Result, error) {
	req.Policies = slices.Concat(w.policies, req.Policies)
	return w.solve(ctx, req, w.limits)
}

func (w within) ResolveSourceMeta(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	opt.Policies = slices.Concat(w.policies, opt.Policies)
	return w.bridge.ResolveSourceMeta(ctx, op, opt)
}

// Solve loads a definition as a lazy ref, or runs a frontend.
func (br *bridge) Solve(ctx context.Context, req frontend.SolveRequest) (*frontend.Result, error) {
	return br.solve(ctx, req, br.limits)
}

func (br *bridge) solve(ctx context.Context, req frontend.SolveRequest, limits ops.Limits) (*frontend.Result, error) {
	limits, err := limits.With(req.Opts)
	if err != nil {
		return nil, invalid("%v", err)
	}
	res, err := br.lazy(ctx, req, limits)
	if err != nil || !req.Evaluate {
		return res, err
	}
	eg, ctx := errgroup.WithContext(ctx)
	for _, ref := range append(slices.Collect(maps.Values(res.Refs)), res.Ref) {
		if ref != nil {
			eg.Go(func() error { return ref.Evaluate(ctx) })
		}
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	return res, nil
}

func (br *bridge) lazy(ctx context.Context, req frontend.SolveRequest, limits ops.Limits) (*frontend.Result, error) {
	hasDef := len(req.Definition.GetDef()) > 0
	switch {
	case hasDef && req.Frontend != "":
		return nil, invalid("Definition and Frontend (%q) exclude each other", req.Frontend)
	case req.Frontend != "":
		return br.runFrontend(ctx, req, limits)
	case !hasDef:
		return &frontend.Result{}, nil
	}
	r, err := br.load(ctx, req.Definition, req.Policies, limits)
	if err != nil {
		return nil, err
	}
	for _, im := range req.CacheImports {
		br.b.imports.add(im.GetType(), im.GetAttrs())
	}
	return &frontend.Result{Ref: r}, nil
}

// load makes def, with what policies leave of its sources, a lazy ref.
func (br *bridge) load(ctx context.Context, def *pb.Definition, policies []*spb.Policy, limits ops.Limits) (*ref, error) {
	sources, err := br.sources(policies)
	if err != nil {
		return nil, err
	}
	allowed, err := sources.rewrite(ctx, def)
	if err != nil {
		return nil, located(err, def)
	}
	edge, err := br.b.engine.cfg.Worker.Loader().Load(allowed, ops.LoadOptions{
		Entitlements: br.b.granted, Limits: limits, Nested: nested{br, policies, limits},
	})
	if err != nil {
		return nil, located(err, allowed)
	}
	if br.b.explain != nil {
		br.b.explain.Located(allowed.GetSource())
	}
	return &ref{br: br, def: allowed, edge: edge}, nil
}

// runFrontend runs a built-in frontend. gateway.v0 with a Dockerfile frontend
// as its source is the built-in one (CTL-013).
func (br *bridge) runFrontend(ctx context.Context, req frontend.SolveRequest, limits ops.Limits) (*frontend.Result, error) {
	br.b.explainTo(req.Opts)
	br.b.endAfter(limits.Build)
	name := req.Frontend
	if name == "gateway.v0" {
		source := req.Opts["source"]
		if source != "dockerfile.v0" && !isDockerfileImage(source) {
			return nil, unsupported("frontend image %s can't be run: this daemon has no frontend containers; "+
				"remove the syntax line or pass --opt build-arg:BUILDKIT_SYNTAX=dockerfile.v0 to use the built-in Dockerfile frontend", source)
		}
		name = "dockerfile.v0"
	}
	f, ok := br.b.engine.cfg.Frontends[name]
	if !ok {
		return nil, invalid("Frontend: no frontend %q; there are %s", name,
			strings.Join(slices.Sorted(maps.Keys(br.b.engine.cfg.Frontends)), ", "))
	}
	res, err := f.Solve(ctx, within{br, limits, req.Policies}, frontend.Request{Opts: req.Opts, Inputs: req.Inputs, SessionID: br.b.req.Session})
	if err != nil {
		return nil, (&errdefs.Frontend{Name: req.Frontend, Source: req.Opts["source"]}).WrapError(err)
	}
	return res, nil
}

// isDockerfileImage reports whether source is upstream's Dockerfile frontend
// image, whose job the built-in frontend does.
func isDockerfileImage(source string) bool {
	name, _, _ := strings.Cut(source, "@")
	name = strings.TrimPrefix(name, "docker.io/")
	return name == "docker/dockerfile" || strings.HasPrefix(name, "docker/dockerfile:")
}

// ResolveSourceMeta tells of what policies leave of op.
func (br *bridge) ResolveSourceMeta(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	sources, err := br.sources(opt.Policies)
	if err != nil {
		return nil, err
	}
	other, err := sources.decide(ctx, op, platformOf(opt.Platform))
	if err != nil {
		return nil, err
	}
	if other != nil {
		op = other
	}
	return br.sourceMeta(ctx, op, opt)
}

func platformOf(p *ocispec.Platform) *pb.Platform {
	if p == nil {
		return nil
	}
	return &pb.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures}
}

// sourceMeta shows as a vertex named as the caller says.
func (br *bridge) sourceMeta(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	name := opt.LogName
	if name == "" {
		name = "resolve " + op.Identifier
	}
	var meta worker.Meta
	dgst := digest.FromString(fmt.Sprintf("%s-meta-%s-%s", br.b.req.Ref, name, op.Identifier))
	err := br.b.vertex(ctx, dgst, name, func(ctx context.Context) (err error) {
		meta, err = br.b.engine.cfg.Worker.SourceMeta(ctx, worker.MetaRequest{
			Op: op, Platform: opt.Platform, ResolveMode: opt.ResolveMode, NoConfig: opt.NoConfig,
			GitObjects: opt.Objects, Checksum: opt.Checksum, Group: br.b.asker.Group(),
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &frontend.SourceMeta{Op: meta.Op, Digest: meta.Digest, Config: meta.Config, Git: meta.Git, HTTP: meta.HTTP}, nil
}

// Warn shows w. A warning without a vertex hangs on one of its own, so that
// clients have somewhere to print it.
func (br *bridge) Warn(ctx context.Context, w progress.Warning) {
	if w.Vertex != "" {
		br.b.write(progress.Event{Warning: &w})
		return
	}
	w.Vertex = digest.FromString(br.b.req.Ref + "-warnings")
	// A vertex that only carries a warning can't fail.
	_ = br.b.vertex(ctx, w.Vertex, "[internal] checking the request", func(context.Context) error {
		br.b.write(progress.Event{Warning: &w})
		return nil
	})
}

// Platforms are the worker's.
func (br *bridge) Platforms() []ocispec.Platform { return br.b.engine.cfg.Worker.Platforms() }

var errReleased = errors.New("the build that this reference belongs to has ended")

// hold keeps res until release.
func (br *bridge) hold(res solver.Result) error {
	br.mu.Lock()
	defer br.mu.Unlock()
	if br.released {
		res.Release()
		return errReleased
	}
	br.held = append(br.held, res)
	return nil
}

// newBridge returns a bridge that holds nothing.
func newBridge(b *Build, limits ops.Limits) *bridge {
	br := &bridge{b: b, limits: limits}
	br.containers = newContainers(br)
	return br
}

// release ends the build's containers, and gives back every result that refs of
// the build hold.
func (br *bridge) release() {
	if err := br.containers.release(); err != nil {
		br.b.engine.cfg.Log.Warn("release containers", "build", br.b.req.Ref, "error", err)
	}
	br.mu.Lock()
	held := br.held
	br.held, br.released = nil, true
	br.mu.Unlock()
	for _, r := range held {
		r.Release()
	}
}

// solved solves r, which may be nil for scratch, and returns a handle of the
// caller's own on what it stands for.
func (br *bridge) solved(ctx context.Context, r frontend.Ref) (*cache.Ref, error) {
	if r == nil {
		return nil, nil
	}
	own, ok := r.(*ref)
	if !ok {
		return nil, fmt.Errorf("internal error: a reference of type %T is not this build's", r)
	}
	res, err := own.solve(ctx)
	if err != nil {
		return nil, err
	}
	return res.Ref.Clone(), nil
}
