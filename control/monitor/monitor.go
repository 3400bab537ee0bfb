// Package monitor tells what the daemon does to whoever looks after it: counts
// in Prometheus' format, and the debug pages of --debugaddr.
package monitor

import (
	"context"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/internal/metrics"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker/verify"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
)

// Config is what a Monitor looks at.
type Config struct {
	Cache  *cache.Manager
	Verify *verify.Verifier // nil if the cache isn't verified
}

// Monitor counts. Its methods are safe for concurrent use. Of its locks scrape
// is taken before mu.
type Monitor struct {
	cfg Config
	set metrics.Set

	started      *metrics.Counter
	builds       *metrics.Counter   // by status and error_code, as upstream names it (DMN-115)
	steps        *metrics.Counter   // by kind, likewise
	duration     *metrics.Histogram // by status, likewise
	vertices     *metrics.Counter   // by result
	stepDuration *metrics.Histogram
	rpcs         *metrics.Counter // by method and code

	scrape sync.Mutex   // held while values are read; guards totals
	totals cache.Totals // as of the beginning of the scrape

	mu      sync.Mutex // guards the fields below
	running int        // builds
	calls   map[string]int
	begun   map[*solver.Execute]time.Time // the steps that run

	recent recent
}

// seconds are bucket bounds from 10 ms to an hour.
var seconds = []float64{.01, .03, .1, .3, 1, 3, 10, 30, 60, 300, 900, 3600}

// New returns a monitor that has seen nothing. It counts calls; all else is
// there after Attach.
func New() *Monitor {
	m := &Monitor{calls: map[string]int{}, begun: map[*solver.Execute]time.Time{}}
	m.recent.noted = map[kind][]note{}
	m.started = m.set.Counter("kiln_builds_started_total", "Builds that have begun.")
	m.builds = m.set.Counter("buildkit_builds_total", "Builds that have ended, by status and, if they failed, gRPC code.", "status", "error_code")
	m.steps = m.set.Counter("buildkit_builds_steps_total", "Steps of builds that have ended, by kind.", "kind")
	m.duration = m.set.Histogram("buildkit_build_duration_seconds", "How long builds took, by status.", seconds, "status")
	m.vertices = m.set.Counter("kiln_vertices_total", "Vertices of builds: hit in the cache, executed, or failed.", "result")
	m.stepDuration = m.set.Histogram("kiln_step_duration_seconds", "How long vertices took that were executed.", seconds)
	m.rpcs = m.set.Counter("kiln_rpcs_total", "Calls of the API that have ended, by method and gRPC code.", "method", "code")
	m.builds.Add(0, "success", "")
	for _, kind := range []string{"completed", "cached", "total", "warnings"} {
		m.steps.Add(0, kind)
	}
	for _, result := range []string{"hit", "executed", "failed"} {
		m.vertices.Add(0, result)
	}
	m.gauge("kiln_builds_running", "Builds that run.", func() float64 { return float64(m.count(&m.running)) })
	m.gauge("kiln_sessions", "Clients that serve files, secrets and credentials.", func() float64 { return float64(m.inCall(sessionMethod)) })
	m.addProcess()
	return m
}

// Attach adds what there is to tell of cfg. It is called once, before anything is
// asked of the monitor and before the first build.
func (m *Monitor) Attach(cfg Config) {
	m.cfg = cfg
	m.addCache()
	m.addVerify()
}

// sessionMethod is the call that lasts as long as a session.
const sessionMethod = "/moby.buildkit.v1.Control/Session"

func (m *Monitor) gauge(name, help string, value func() float64) {
	m.set.Func(metrics.GaugeKind, name, help, nil, func(emit func(float64, ...string)) { emit(value()) })
}

func (m *Monitor) count(n *int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *n
}

func (m *Monitor) inCall(method string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.calls[method]
}

// Watch is for build.Config: it counts a build and observes it.
func (m *Monitor) Watch() (o solver.Observer, ended func()) {
	m.started.Add(1)
	m.mu.Lock()
	m.running++
	m.mu.Unlock()
	return &observer{m: m}, func() {
		m.mu.Lock()
		m.running--
		m.mu.Unlock()
	}
}

// Ended is for build.Config: it counts how a build ended.
func (m *Monitor) Ended(b *build.Build) {
	out := b.Outcome()
	m.ended(b, out)
	status, code := "success", ""
	if out.Err != nil {
		status, code = "failure", grpcerrors.Code(build.WithCode(out.Err)).String()
	}
	m.builds.Add(1, status, code)
	m.duration.Observe(out.Ended.Sub(out.Started).Seconds(), status)
	m.vertices.Add(float64(out.Stats.Cached), "hit")
	for kind, n := range map[string]int{
		"completed": out.Stats.Completed, "cached": out.Stats.Cached, "total": out.Stats.Total, "warnings": out.Warnings,
	} {
		m.steps.Add(float64(n), kind)
	}
}

// observer counts what builds execute.
type observer struct {
	solver.Unobserved
	m *Monitor
}

func (o *observer) Starts(eff *solver.Execute, _ progress.Scope) {
	o.m.mu.Lock()
	defer o.m.mu.Unlock()
	o.m.begun[eff] = time.Now()
}

func (o *observer) Ended(eff *solver.Execute, ev *solver.Executed) {
	o.m.mu.Lock()
	begun, ok := o.m.begun[eff]
	delete(o.m.begun, eff)
	o.m.mu.Unlock()
	switch {
	case ev.Err == nil && ok:
		o.m.vertices.Add(1, "executed")
		o.m.stepDuration.Observe(time.Since(begun).Seconds())
		o.m.made(ev)
	case ev.Err != nil && !ev.Interrupted():
		o.m.vertices.Add(1, "failed")
	}
}

// Options are what the gRPC server must be made with for its calls to count.
func (m *Monitor) Options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
			defer m.call(info.FullMethod)(&err)
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
			defer m.call(info.FullMethod)(&err)
			return handler(srv, ss)
		}),
	}
}

// call counts a call that begins; what it returns counts its end.
func (m *Monitor) call(method string) (ended func(*error)) {
	m.mu.Lock()
	m.calls[method]++
	m.mu.Unlock()
	return func(err *error) {
		m.mu.Lock()
		m.calls[method]--
		m.mu.Unlock()
		m.rpcs.Add(1, method, grpcerrors.Code(*err).String())
	}
}
