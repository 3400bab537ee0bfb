// Package build runs one build from request to export: it registers the build,
// runs the frontend or waits for a client that drives the build itself, forces
// the result, exports it, and keeps the stream of events that watchers read.
package build

import (
	"context"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/control/explain"
	"github.com/kilnbuild/kiln/control/record"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/kilnbuild/kiln/worker/export"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/errdefs"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config is what an Engine is made from.
type Config struct {
	Worker       *worker.Worker
	Export       export.Config
	Frontends    map[string]frontend.Frontend
	Workers      func() []*apitypes.WorkerRecord
	LLBCaps      []*capspb.APICap
	Entitlements []string   // those that requests may ask for
	Limits       ops.Limits // of builds that set no others
	// Linger is how long an ended build stays addressable (CTL-010).
	Linger time.Duration
	Log    *slog.Logger
	// Explain keeps why the steps of builds ran; nil keeps nothing.
	Explain *explain.Journal
	// Record keeps what the solver did in every build; nil keeps nothing.
	Record *record.Recorder
	// Cancelling is called before Drain cancels the builds that still run, with
	// the cause; may be nil.
	Cancelling func(cause error)
	// Watch are told of every build that begins. Each returns what observes it
	// and what is called when it is over.
	Watch []func() (o solver.Observer, ended func())
	// Ended is told of every build that is over.
	Ended func(*Build)
	// Started is told of every build that begins.
	Started func(*Build)
}

// Engine knows the builds that run, and for a while those that ended. All
// methods are safe for concurrent use.
type Engine struct {
	cfg Config

	mu       sync.Mutex // guards the fields below; never held across a build's work
	builds   map[string]*Build
	refused  map[string]error // refs of requests that never became builds, and why
	arrived  chan struct{}    // closed and replaced when a build registers or a ref is refused
	draining bool
	running  sync.WaitGroup
}

// NewEngine returns an engine without builds.
func NewEngine(cfg Config) *Engine {
	return &Engine{cfg: cfg, builds: map[string]*Build{}, refused: map[string]error{}, arrived: make(chan struct{})}
}

// Run registers req as a build, runs it to its end and returns the response.
// When ctx ends, which is when the client goes away, the build is cancelled.
func (e *Engine) Run(ctx context.Context, req Request) (map[string]string, error) {
	b, err := e.register(ctx, req)
	if err != nil {
		return nil, err
	}
	defer e.running.Done()
	if e.cfg.Started != nil {
		e.cfg.Started(b)
	}
	resp, err := b.guarded()
	b.finish(resp, err)
	if e.cfg.Ended != nil {
		e.cfg.Ended(b)
	}
	time.AfterFunc(e.cfg.Linger, func() { e.forget(b) })
	return resp, err
}

func (e *Engine) register(ctx context.Context, req Request) (*Build, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.draining {
		return nil, e.refuseLocked(req.Ref, status.Error(codes.Unavailable, "the daemon is shutting down and takes no new builds"))
	}
	if _, ok := e.builds[req.Ref]; ok {
		return nil, status.Errorf(codes.AlreadyExists, "Ref: a build %s runs or has just run; choose another id", req.Ref)
	}
	limits, err := e.cfg.Limits.With(req.Opts)
	if err != nil {
		return nil, e.refuseLocked(req.Ref, invalid("%v", err))
	}
	b := newBuild(ctx, e, req, limits)
	e.builds[req.Ref] = b
	delete(e.refused, req.Ref)
	e.running.Add(1)
	e.wakeLocked()
	return b, nil
}

func (e *Engine) wakeLocked() {
	close(e.arrived)
	e.arrived = make(chan struct{})
}

// Refuse notes why the request named ref will not become a build, so that
// nobody goes on waiting for it. It returns why.
func (e *Engine) Refuse(ref string, why error) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.refuseLocked(ref, why)
}

func (e *Engine) refuseLocked(ref string, why error) error {
	if e.refused[ref] != nil || e.builds[ref] != nil {
		return why
	}
	e.refused[ref] = why
	e.wakeLocked()
	time.AfterFunc(e.cfg.Linger, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.refused, ref)
	})
	return why
}

// forget forgets b. What the last builds took goes back to the machine then: a
// large one's memory would stay the daemon's for minutes.
func (e *Engine) forget(b *Build) {
	e.mu.Lock()
	if e.builds[b.req.Ref] == b {
		delete(e.builds, b.req.Ref)
	}
	idle := len(e.builds) == 0
	e.mu.Unlock()
	if idle {
		debug.FreeOSMemory()
	}
}

// RefusedError: there is no build because the request for it was refused. Who
// would drive the build hears why as well as who asked for it: of a client's
// two calls, either may return first, and its user sees that one's error.
type RefusedError struct{ Why error }

func (e *RefusedError) Error() string { return e.Why.Error() }

func (e *RefusedError) Unwrap() error { return e.Why }

// Get returns the build named ref, waiting up to wait for it to be registered:
// clients ask for a build's status before their request to build has arrived.
// The wait ends early, with a RefusedError, when the request is refused.
func (e *Engine) Get(ctx context.Context, ref string, wait time.Duration) (*Build, error) {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	for {
		e.mu.Lock()
		b, refused, arrived := e.builds[ref], e.refused[ref], e.arrived
		e.mu.Unlock()
		switch {
		case b != nil:
			return b, nil
		case refused != nil:
			return nil, &RefusedError{refused}
		}
		select {
		case <-arrived:
		case <-timeout.C:
			return nil, errdefs.NewUnknownJobError(ref)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Running lists the builds that haven't ended.
func (e *Engine) Running() []*Build {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []*Build
	for _, b := range e.builds {
		if !b.Ended() {
			out = append(out, b)
		}
	}
	return out
}

// Drain refuses new builds and waits for those that run. When ctx ends it
// cancels them, with an error that tells ctx's cause, and waits for them to be
// gone. It may be called again.
func (e *Engine) Drain(ctx context.Context) {
	e.mu.Lock()
	e.draining = true
	e.mu.Unlock()

	idle := make(chan struct{})
	go func() { e.running.Wait(); close(idle) }()
	select {
	case <-idle:
		return
	case <-ctx.Done():
	}
	if e.cfg.Cancelling != nil {
		e.cfg.Cancelling(context.Cause(ctx))
	}
	for _, b := range e.Running() {
		b.cancel(status.Errorf(codes.Unavailable, "the daemon is shutting down: %v", context.Cause(ctx)))
	}
	<-idle
}
