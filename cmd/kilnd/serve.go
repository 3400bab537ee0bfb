package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/control"
	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/control/explain"
	"github.com/kilnbuild/kiln/control/history"
	"github.com/kilnbuild/kiln/control/monitor"
	"github.com/kilnbuild/kiln/control/record"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/seal"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/frontend/dockerfile"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/footprint"
	"github.com/kilnbuild/kiln/internal/orphans"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/kilnbuild/kiln/worker/export"
	"github.com/kilnbuild/kiln/worker/verify"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"
)

// buildLinger is how long an ended build can still be asked for its status.
const buildLinger = 10 * time.Second

// serve runs the daemon until it is told to end.
func serve(ctx context.Context, cfg *config, warnings []string) (err error) {
	log, err := newLogger(cfg)
	if err != nil {
		return err
	}
	if err := rootless.Enter(worker.Supervisors(cfg.Root)...); err != nil {
		return err
	}
	if err := seal.Self(); err != nil {
		return err
	}
	for _, w := range warnings {
		log.Warn(w)
	}
	if err := rootless.Claim(cfg.Root); err != nil {
		return err
	}
	if err := sayRootless(cfg, log); err != nil {
		return err
	}
	// The process takes its signals from the beginning to the end: one that
	// comes while it opens or closes its state must not kill it in the middle.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	// Whoever reads the log may be gone; writing to nobody must not be the end.
	// The signal is caught and not ignored, for what is ignored stays so in the
	// programs that the daemon starts.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()

	// Sockets first: clients that connect while the daemon opens its state wait
	// in the backlog instead of failing (DMN-111).
	listeners, err := listen(cfg, log)
	if err != nil {
		return err
	}
	for _, l := range listeners {
		undo.Add(func() error { return ignoreClosed(l.Close()) })
	}
	var debug net.Listener
	if cfg.GRPC.DebugAddress != "" {
		if debug, err = listenDebug(cfg); err != nil {
			return err
		}
		undo.Add(func() error { return ignoreClosed(debug.Close()) })
	}
	undo.AddFunc(reapOrphans(ctx, log))
	footprint.Pace()
	w, err := worker.Open(workerConfig(cfg, log))
	if err != nil {
		return err
	}
	undo.Add(w.Close)
	var rec *record.Recorder
	if dir := cfg.Kiln.RecordBuilds; dir != "" {
		if rec, err = record.Open(dir, log); err != nil {
			return fmt.Errorf("--record-builds, [kiln] recordBuilds: %w", err)
		}
		log.Warn("what the solver does in builds is recorded, for reports of defects", "directory", dir)
	}
	d := newDaemon(cfg, w, log)
	// From here on clients are told what the daemon is; their builds wait until
	// what is cached has been read.
	d.serve(listeners)
	if err := w.Load(ctx); err != nil {
		d.control.Fail(err)
		d.grpc.Stop()
		return err
	}
	d.open(w, rec)
	if d.verify != nil {
		undo.AddFunc(d.verify.Close)
	}
	if debug != nil {
		undo.Add(serveDebug(debug, d.monitor.Handler(), log))
	}
	return d.run(signals)
}

// reapOrphans has the first process of a container wait for all others, until the
// function that it returns was called.
func reapOrphans(ctx context.Context, log *slog.Logger) func() {
	ctx, cancel := context.WithCancel(ctx)
	var reaper sync.WaitGroup
	reaper.Go(func() { orphans.Reap(ctx, log) })
	return func() {
		cancel()
		reaper.Wait()
	}
}

// sayRootless logs what the daemon can't do if it isn't the machine's root.
func sayRootless(cfg *config, log *slog.Logger) error {
	if cfg.Worker.OCI.Rootless && !rootless.Here().Mapped() {
		log.Warn("steps are not rootless, as worker.oci.rootless (--oci-worker-rootless) asks: the machine's root runs this daemon; they are where an ordinary user starts it")
	}
	if cfg.Worker.OCI.NoProcessSandbox && rootless.Here().Mapped() {
		log.Warn("steps have no process sandbox: they can end and look into all processes of this daemon's user namespace, the daemon included")
	}
	missing, err := executor.Unavailable()
	if len(missing) > 0 {
		log.Warn("rootless: builds can't have "+strings.Join(missing, "; "), "user", rootless.Here().UIDs[0].Outside)
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// daemon is a worker behind the control API.
type daemon struct {
	cfg     *config
	log     *slog.Logger
	builds  *build.Engine
	history *history.Log
	explain *explain.Journal
	verify  *verify.Verifier // nil if the cache isn't verified
	monitor *monitor.Monitor
	control *control.Server
	grpc    *grpc.Server
	failed  chan error      // of listeners
	idle    <-chan struct{} // no client was connected for the idle time; nil: that doesn't count
	memory  *footprint.Keeper
	leave   func() // has steps go on that may outlive the daemon
	rest    func() // has nothing begin any more in the background
}

const (
	// verifySettle is how long no build must have run before hits are verified.
	verifySettle = time.Second
	// verifyApart is how far apart two executions of a step are.
	verifyApart = 1100 * time.Millisecond
)

const (
	// memoryAfterStart and memoryAfterBuild are when an idle daemon gives memory
	// back: once what began with the start has settled, and once an ended build
	// is forgotten.
	memoryAfterStart = 3 * time.Second
	memoryAfterBuild = buildLinger + 2*time.Second
)

// logsDir is where in the state directory the history has logs of steps.
const logsDir = "logs"

// newDaemon returns a daemon whose worker is open but hasn't read yet what is
// cached: it can serve, and open has to follow.
func newDaemon(cfg *config, w *worker.Worker, log *slog.Logger) *daemon {
	d := &daemon{cfg: cfg, log: log, monitor: monitor.New(), leave: w.Leave, rest: w.StopCollecting}
	d.control = control.New(control.Front{Workers: workersOf(w), Log: log})
	d.grpc = grpc.NewServer(append(d.control.Options(), d.monitor.Options()...)...)
	d.control.Register(d.grpc)
	return d
}

func workersOf(w *worker.Worker) func() []*apitypes.WorkerRecord {
	return func() []*apitypes.WorkerRecord { return []*apitypes.WorkerRecord{control.WorkerRecord(w)} }
}

// open lets clients build on w. What the solver does is written to rec, unless
// that is nil.
func (d *daemon) open(w *worker.Worker, rec *record.Recorder) {
	cfg, log := d.cfg, d.log
	d.explain = explain.Open(explain.Config{Store: w.Store(), Evictions: w.Cache(), Log: log})
	d.history = history.Open(history.Config{
		Store: w.Store(), MaxAge: cfg.historyAge, MaxEntries: cfg.History.MaxEntries, Log: log, Forgotten: d.explain.Forget,
		Logs: filepath.Join(cfg.Root, logsDir), MaxLogs: cfg.maxLogs,
	})
	started, ended := control.Record(d.history, log)
	var watch []func() (solver.Observer, func())
	if share := cfg.Cache.Verify; share > 0 {
		d.verify = verify.New(verify.Config{
			Share: share, Cache: w.Cache(), Keys: w.Keys(), Repeat: ops.Repeat, Settle: verifySettle, Apart: verifyApart, Log: log,
		})
		watch = append(watch, d.verify.Observe)
	}
	d.monitor.Attach(monitor.Config{Cache: w.Cache(), Verify: d.verify})
	watch = append(watch, d.monitor.Watch)
	d.builds = build.NewEngine(build.Config{
		Worker: w,
		Export: export.Config{
			Cache: w.Cache(), Sessions: w.Sessions(), Registry: w.Registry(), Platform: w.Platforms()[0],
		},
		Frontends:    map[string]frontend.Frontend{"dockerfile.v0": dockerfile.Frontend{}},
		Workers:      workersOf(w),
		LLBCaps:      ops.Caps(),
		Entitlements: cfg.InsecureEntitlements,
		Limits:       cfg.limits,
		Linger:       buildLinger,
		Log:          log,
		Explain:      d.explain,
		Record:       rec,
		Cancelling:   d.cancelling,
		Watch:        watch,
		Started:      started,
		Ended:        func(b *build.Build) { ended(b); d.monitor.Ended(b); w.CollectSoon(); d.memory.Used(memoryAfterBuild) },
	})
	d.memory = footprint.Keep(memoryAfterStart, footprint.Config{
		Busy: func() bool { return len(d.builds.Running()) > 0 },
		Rest: func() { d.explain.Rest(); contenthash.Rest() },
		Tell: func(err error) { log.Warn("memory of the idle daemon stays larger than it needs to be", "error", err) },
	})
	d.control.Open(control.Config{
		Builds: d.builds, History: d.history, Explain: d.explain, Cache: w.Cache(), Sessions: w.Sessions(), GCRules: w.GCRules(),
	})
}

// serve answers clients on listeners.
func (d *daemon) serve(listeners []net.Listener) {
	if d.cfg.idleExit > 0 {
		watch := newIdleWatch(d.cfg.idleExit)
		d.idle = watch.idle
		for i, l := range listeners {
			listeners[i] = watched{Listener: l, watch: watch}
		}
	}
	d.failed = make(chan error, len(listeners))
	for i, l := range listeners {
		go func() {
			if err := d.grpc.Serve(l); err != nil {
				d.failed <- fmt.Errorf("serve %s: %w", d.cfg.GRPC.Address[i], err)
			}
		}()
		d.log.Info("listening", "address", d.cfg.GRPC.Address[i])
	}
}

// run waits for a signal, or until nobody was connected for the idle time, and
// ends what runs.
func (d *daemon) run(signals <-chan os.Signal) (err error) {
	select {
	case sig := <-signals:
		d.log.Info("draining: running builds may end", "signal", sig.String(), "grace", d.cfg.grace.String())
		d.drain(signals, sig == syscall.SIGTERM)
	case <-d.idle:
		d.log.Info("ending: no client was connected", "for", d.cfg.idleExit.String())
		d.drain(signals, false)
	case err = <-d.failed:
		d.log.Error("ending: a listener failed", "err", err)
		d.drain(signals, true)
	}
	footprint.Ending()
	d.rest()
	d.memory.Close()
	d.hangUp()
	return err
}

// errGraceOver ends builds for whose steps another daemon may come.
var errGraceOver = errors.New("the grace period is over")

// cancelling is called before builds are cancelled because the daemon ends.
func (d *daemon) cancelling(cause error) {
	if errors.Is(cause, errGraceOver) && d.cfg.unclaimed > 0 {
		d.log.Info("leaving running steps to the next daemon", "for", d.cfg.unclaimed.String())
		d.leave()
	}
}

// drain waits for running builds until the grace period is over or a second
// signal comes; then they are cancelled. A third one ends the process at once.
// If another daemon is expected, steps go on when the grace period is over.
func (d *daemon) drain(signals <-chan os.Signal, another bool) {
	over := errGraceOver
	if !another {
		over = errors.New("the daemon's grace period is over")
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), d.cfg.grace, over)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go func() {
		stop(fmt.Errorf("second signal: %s", <-signals))
		d.log.Error("ending at once", "signal", (<-signals).String())
		os.Exit(1)
	}()
	d.builds.Drain(ctx)
}

// hangUpWait bounds how long clients get to read the last answers. Those that
// only listen for news would stay for ever.
const hangUpWait = 2 * time.Second

// hangUp ends the connections: at once where nothing is under way, else after
// the answers were read.
func (d *daemon) hangUp() {
	d.history.Close()
	d.explain.Close()
	done := make(chan struct{})
	go func() { d.grpc.GracefulStop(); close(done) }()
	timer := time.NewTimer(hangUpWait)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		d.grpc.Stop()
		<-done
	}
}

func newLogger(cfg *config) (*slog.Logger, error) {
	var level slog.Level
	switch cfg.Log.Level {
	case "", "info":
	case "trace", "debug":
		level = slog.LevelDebug
	case "warn", "warning":
		level = slog.LevelWarn
	case "error", "fatal", "panic":
		level = slog.LevelError
	default:
		return nil, fmt.Errorf("log level %q: must be debug, info, warn or error", cfg.Log.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.Log.Format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return nil, fmt.Errorf("log format %q: must be text or json", cfg.Log.Format)
}
