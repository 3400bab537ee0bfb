package build

import (
	"context"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/control/explain"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/frontend/gateway"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker/export"
	"github.com/kilnbuild/kiln/worker/remotecache"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Build is one request and all that belongs to it.
type Build struct {
	engine  *Engine
	req     Request
	ctx     context.Context
	cancel  context.CancelCauseFunc
	stream  *progress.Stream
	solver  *solver.Build
	asker   *ops.Build // what its ops know of it
	bridge  *bridge
	gateway *gateway.Server   // of builds that the client drives; nil for others
	granted map[string]bool   // entitlements
	explain *explain.Recorder // nil if nobody is to know
	unwatch []func()          // of Config.Watch
	imports *imports
	steps   *remote.Recorder // nil if no cache is exported

	started time.Time

	mu       sync.Mutex // guards the fields below; never held across I/O
	outcome  Outcome
	refused  error // why it ended before anybody could drive it
	done     bool
	warnings int
	deadline *time.Timer // that of the build's limit of time, if there is one
}

// Outcome is how a build ended.
type Outcome struct {
	Started, Ended time.Time
	Response       map[string]string
	Results        map[int]ocispec.Descriptor // by exporter
	Err            error
	Stats          progress.Counts
	Warnings       int
}

func newBuild(ctx context.Context, e *Engine, req Request, limits ops.Limits) *Build {
	ctx, cancel := context.WithCancelCause(ctx)
	b := &Build{engine: e, req: req, ctx: ctx, cancel: cancel, stream: &progress.Stream{}, started: time.Now()}
	b.granted = map[string]bool{}
	for _, name := range req.Entitlements {
		b.granted[name] = true
	}
	b.asker = &ops.Build{SessionIDs: []string{req.Session}, Entitlements: b.granted}
	opts := solver.BuildOptions{
		Value:    b.asker,
		Domain:   strings.Join(slices.Sorted(maps.Keys(b.granted)), ","),
		Progress: progress.WriterFunc(b.write),
	}
	if e.cfg.Explain != nil && !req.Internal {
		b.explain = e.cfg.Explain.NewRecorder(explain.Options{
			Ref: req.Ref, Opts: req.Opts, Key: b.clientKey,
			Shown: func(v *solver.Vertex) progress.Vertex { return b.solver.Shown(v) },
			Kept:  func() { b.solver.Forget() },
		})
		opts.Observers = append(opts.Observers, b.explain)
		b.explainTo(req.Opts)
	}
	if rec := e.cfg.Record.Begin(req.Ref); rec != nil {
		opts.Trace = rec.Trace
		b.unwatch = append(b.unwatch, rec.Close)
	}
	for _, watch := range e.cfg.Watch {
		o, ended := watch()
		opts.Observers = append(opts.Observers, o)
		b.unwatch = append(b.unwatch, ended)
	}
	if len(req.CacheExports) > 0 {
		b.steps = remote.NewRecorder()
		opts.Observers = append(opts.Observers, b.steps)
	}
	b.solver = e.cfg.Worker.Solver().NewBuild(opts)
	b.imports = &imports{b: b, known: map[string]bool{}}
	b.bridge = newBridge(b, limits)
	b.endAfter(limits.Build)
	if len(req.Definition.GetDef()) == 0 && req.Frontend == "" {
		b.gateway = gateway.NewServer(gateway.Config{
			Bridge: b.bridge, Inputs: req.Inputs, Workers: e.cfg.Workers(), LLBCaps: e.cfg.LLBCaps,
		})
	}
	return b
}

// Request returns what was asked for.
func (b *Build) Request() Request { return b.req }

// Started is when the build began.
func (b *Build) Started() time.Time { return b.started }

// Events returns a reader of everything the build told so far and will tell.
func (b *Build) Events() *progress.Reader { return b.stream.NewReader() }

// Gateway serves the client that drives the build; nil if the daemon does.
func (b *Build) Gateway() *gateway.Server { return b.gateway }

// Context ends when the build does.
func (b *Build) Context() context.Context { return b.ctx }

// Outcome is valid once the build has ended.
func (b *Build) Outcome() Outcome {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.outcome
}

// Ended reports whether the build is over.
func (b *Build) Ended() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.done
}

// Refused is why the build ended before anybody could drive it; nil if it didn't.
func (b *Build) Refused() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.refused
}

func (b *Build) write(e progress.Event) {
	if e.Warning != nil {
		b.mu.Lock()
		b.warnings++
		b.mu.Unlock()
	}
	b.stream.Write(e)
}

// guarded is run for requests that bring a defect to light: a panic ends the
// build, not the daemon, and what the build holds is still given back.
func (b *Build) guarded() (resp map[string]string, err error) {
	defer func() {
		if r := recover(); r != nil {
			b.engine.cfg.Log.Error("build panicked", "build", b.req.Ref, "panic", r, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "internal error: build %s panicked: %v", b.req.Ref, r)
		}
	}()
	return b.run()
}

// run does the whole build (CTL-040): frontend, force, export, finalize.
func (b *Build) run() (map[string]string, error) {
	exporters, caches, err := b.prepare()
	if err != nil {
		b.mu.Lock()
		b.refused = err
		b.mu.Unlock()
		return nil, err
	}
	for _, im := range b.req.CacheImports {
		b.imports.add(im.Type, im.Attrs)
	}
	res, err := b.result()
	if err != nil {
		return nil, err
	}
	return b.deliver(exporters, caches, res)
}

// prepare makes what the result will be given to, if all that is asked for is
// allowed and known.
func (b *Build) prepare() (exporters []export.Exporter, caches []*remotecache.Exporter, err error) {
	if err := b.checkEntitlements(); err != nil {
		return nil, nil, err
	}
	if exporters, err = b.exporters(); err == nil {
		caches, err = b.cacheExporters()
	}
	return exporters, caches, err
}

// result gets the lazy result from whoever makes it.
func (b *Build) result() (*frontend.Result, error) {
	for _, w := range b.req.Warnings {
		b.bridge.Warn(b.ctx, progress.Warning{Level: 1, Short: []byte(w)})
	}
	if b.gateway != nil {
		return b.gateway.Wait(b.ctx)
	}
	return b.bridge.Solve(b.ctx, frontend.SolveRequest{
		Definition: b.req.Definition,
		Frontend:   b.req.Frontend,
		Opts:       b.req.Opts,
		Inputs:     b.req.Inputs,
	})
}

func (b *Build) checkEntitlements() error {
	for _, name := range b.req.Entitlements {
		kind, detail, qualified := strings.Cut(name, "=")
		switch {
		case qualified && (kind != "device" || detail == ""):
			return invalid("Entitlements: unknown entitlement %q", name)
		case !slices.Contains([]string{"network.host", "security.insecure", "device"}, kind):
			return invalid("Entitlements: unknown entitlement %q", name)
		case !slices.Contains(b.engine.cfg.Entitlements, kind):
			return invalid("Entitlements: %s is not allowed by this daemon; start it with --allow-insecure-entitlement %s", kind, kind)
		}
	}
	return nil
}

func (b *Build) exporters() ([]export.Exporter, error) {
	out := make([]export.Exporter, len(b.req.Exporters))
	for i, ex := range b.req.Exporters {
		var err error
		if out[i], err = export.New(b.engine.cfg.Export, ex.Type, ex.Attrs); err != nil {
			return nil, fmt.Errorf("exporter %d (%s): %w", i, ex.Type, err)
		}
	}
	return out, nil
}

// errEnded is what calls that a client makes for a build get when it is over.
var errEnded = status.Error(codes.Canceled, "the build has ended")

// endedBy is errEnded with why a build failed: which of its calls a client hears
// of first is open.
func endedBy(err error) error {
	if err == nil {
		return errEnded
	}
	return status.Errorf(codes.Canceled, "the build has ended: %v", err)
}

// finish records how the build ended and closes its stream.
func (b *Build) finish(resp map[string]string, err error) {
	stats := b.solver.Stats()
	b.cancel(endedBy(err))
	b.endAfter(0)
	b.bridge.release()
	b.solver.Close()
	if b.gateway != nil {
		b.gateway.Close()
	}
	b.imports.close()
	if b.explain != nil {
		b.explain.Close(err != nil)
	} else {
		b.solver.Forget()
	}
	for _, ended := range b.unwatch {
		ended()
	}

	b.mu.Lock()
	b.outcome.Started, b.outcome.Ended = b.started, time.Now()
	b.outcome.Response, b.outcome.Err = resp, err
	b.outcome.Stats, b.outcome.Warnings = stats, b.warnings
	b.done = true
	b.mu.Unlock()
	b.stream.Close()
}

// vertex runs fn as a vertex of its own, outside the graph, and reports its
// beginning and end.
func (b *Build) vertex(ctx context.Context, dgst digest.Digest, name string, fn func(ctx context.Context) error) error {
	start := time.Now()
	v := progress.Vertex{Digest: dgst, Name: name, Started: &start}
	b.write(progress.Event{Vertex: &v})
	err := fn(progress.With(ctx, progress.NewScope(progress.WriterFunc(b.write), dgst)))
	ended := v
	now := time.Now()
	ended.Completed = &now
	if err != nil {
		ended.Error = err.Error()
	}
	b.write(progress.Event{Vertex: &ended})
	return err
}
