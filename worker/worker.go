// Package worker assembles the one place where builds run: the store, the
// snapshotter, the blobs, the cache, the executor, the sources, the ops and the
// solver.
package worker

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/keys"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/git"
	"github.com/kilnbuild/kiln/ops/source/http"
	"github.com/kilnbuild/kiln/ops/source/image"
	"github.com/kilnbuild/kiln/ops/source/local"
	"github.com/kilnbuild/kiln/ops/source/ocilayout"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config is what a Worker is made from.
type Config struct {
	Root         string // state directory, made if missing
	Labels       map[string]string
	Platforms    []string // announced ones, the default first; nil: what the machine can run
	Runtime      string   // OCI runtime binary; "" is the built-in one
	CgroupParent string
	AppArmor     string // profile of steps; "" is none
	Most         executor.Most
	MachinePIDs  bool // see executor.Config
	Parallelism  int
	DNS          *executor.DNS
	Network      network.Config // of steps that ask for none in particular
	Registry     registry.Config
	GC           GC
	// Supervisor is the command that runs supervisor.Main, for steps that outlive
	// the daemon, by Unclaimed at most; none do if it is empty or Unclaimed is 0.
	Supervisor []string
	Unclaimed  time.Duration
	// CancelGrace is how long a cancelled step may take to end after TERM; 0 is
	// executor.DefaultGrace.
	CancelGrace time.Duration
	Log         *slog.Logger // nil discards
}

// Worker is the place. Close it after the last build.
type Worker struct {
	cfg       Config
	readOnly  bool // nothing on disk is changed
	id        string
	platforms []ocispec.Platform
	locked    *os.File // the state directory, until the store has it

	store     *store.DB
	snapshots *snapshot.Overlay
	blobs     *snapshot.Blobs
	cache     *cache.Manager
	keys      *keys.Store
	sessions  *session.Manager
	registry  *registry.Client
	image     *image.Source
	layout    *ocilayout.Source
	git       *git.Source
	http      *http.Source
	loader    *ops.Loader
	solver    *solver.Solver
	rules     []cache.PruneOptions
	collector *collector

	earlier    []*supervisor.Earlier // of earlier daemons
	supervisor *supervisor.Client    // nil: steps end with the daemon

	release []func() error // of Open and Load
}

// New is Open and Load.
func New(ctx context.Context, cfg Config) (*Worker, error) {
	w, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	if err := w.Load(ctx); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// Open checks cfg and takes the state under cfg.Root for this process. After it the
// worker can say what it is: ID, Labels, Platforms and GCRules; all else takes Load.
// It has to be closed.
//
// What takes time in proportion to what is cached is in Load, and so is whatever a
// damaged database costs.
func Open(cfg Config) (_ *Worker, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	w := &Worker{cfg: cfg, collector: newCollector(cfg.Log)}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()

	if w.platforms, err = announced(cfg.Platforms); err != nil {
		return nil, err
	}
	if err := w.openRoot(&undo); err != nil {
		return nil, err
	}
	if w.rules, err = cfg.GC.rules(w.cfg.Root); err != nil {
		return nil, err
	}
	if w.cfg.Network, err = cfg.Network.Resolve(cfg.Log); err != nil {
		return nil, err
	}
	if w.cfg.Network.Dir, err = filepath.Abs(cmp.Or(w.cfg.Network.Dir, filepath.Join(w.cfg.Root, "net"))); err != nil {
		return nil, fmt.Errorf("directory for networks: %w", err)
	}
	w.release = append(w.release, undo.Keep())
	return w, nil
}

// Load sees to it that the database is sound, reads what is cached and cleans up
// what a crash left behind. The worker has to be closed whether it fails or not.
func (w *Worker) Load(ctx context.Context) (err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	if err := w.openFiles(&undo, w.cfg.Log.Warn); err != nil {
		return err
	}
	if w.earlier, err = supervisor.Find(w.supervisors(), w.executorConfig()); err != nil {
		return err
	}
	// Before the cache, which deletes what steps of a daemon that was killed have
	// left: with another runtime they go on until the executor ends them.
	exec, err := executor.New(w.ownExecutor())
	if err != nil {
		return fmt.Errorf("set up the executor: %w", err)
	}
	undo.Add(exec.Close)
	if err := w.openCache(ctx, &undo, w.collector.nudge); err != nil {
		return err
	}
	w.supervise(&undo)
	if w.sessions, err = session.NewManager(); err != nil {
		return fmt.Errorf("set up sessions: %w", err)
	}
	w.registry = registry.New(w.cfg.Registry)
	undo.AddFunc(w.registry.Close)
	if err := w.openOps(exec); err != nil {
		return err
	}
	w.loader.TakeUp(ctx, w.earlier, w.cfg.Unclaimed)
	undo.Add(w.loader.Close)
	w.collector.start(w.collect)
	undo.AddFunc(w.collector.close)
	w.release = append(w.release, undo.Keep())
	return nil
}

// openRoot takes the state directory, and gives it up when that is undone unless
// openFiles has handed it on.
func (w *Worker) openRoot(undo *cleanup.Stack) (err error) {
	if w.cfg.Root, err = filepath.Abs(w.cfg.Root); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := prepareRoot(w.cfg.Root); err != nil {
		return err
	}
	if w.locked, err = store.Lock(w.cfg.Root); err != nil {
		return err
	}
	undo.Add(func() error {
		if w.locked == nil {
			return nil
		}
		return w.locked.Close()
	})
	w.id, err = workerID(w.cfg.Root)
	return err
}

// openFiles opens what the cache stands on: store, snapshots, blobs. warn is
// told what the store found wrong and set aside.
func (w *Worker) openFiles(undo *cleanup.Stack, warn func(msg string, args ...any)) error {
	opts := store.Options{Root: w.cfg.Root, Locked: w.locked, Warn: warn, ReadOnly: w.readOnly}
	w.locked = nil
	var err error
	if w.store, err = store.Open(opts); err != nil {
		return err
	}
	undo.Add(w.closeFiles)
	snapshots, err := snapshot.NewOverlay(w.cfg.Root, w.store)
	if err != nil {
		return fmt.Errorf("open snapshots: %w", err)
	}
	w.snapshots = snapshots.(*snapshot.Overlay)
	if w.blobs, err = snapshot.NewBlobs(w.cfg.Root, w.store); err != nil {
		return fmt.Errorf("open blobs: %w", err)
	}
	return nil
}

// closeFiles closes what openFiles has opened: the store first, since its last
// commit may remove files, which snapshots and blobs wait for.
func (w *Worker) closeFiles() error {
	err := w.store.Close()
	if w.snapshots != nil {
		err = errors.Join(err, w.snapshots.Close())
	}
	if w.blobs != nil {
		err = errors.Join(err, w.blobs.Close())
	}
	return err
}

// openCache opens the cache, which calls grown when it holds more.
func (w *Worker) openCache(ctx context.Context, undo *cleanup.Stack, grown func()) (err error) {
	w.cache, err = cache.Open(ctx, cache.Config{
		Store: w.store, Snapshots: w.snapshots, Blobs: w.blobs, Log: w.cfg.Log, Root: w.cfg.Root, Rules: w.rules, Grown: grown,
		Adopt: ops.Written(w.earlier),
	})
	if err != nil {
		return err
	}
	undo.Add(w.cache.Close)
	return nil
}

// openOps makes the sources, the loader and the solver.
func (w *Worker) openOps(exec executor.Executor) error {
	w.image = image.New(image.Options{Cache: w.cache, Store: w.store, Registry: w.registry, Sessions: w.sessions})
	w.layout = ocilayout.New(ocilayout.Options{Cache: w.cache, Sessions: w.sessions})
	w.git = git.New(git.Options{Cache: w.cache, Sessions: w.sessions})
	w.http = http.New(http.Options{Cache: w.cache, Sessions: w.sessions})
	cfg := ops.Config{
		Cache: w.cache, Executor: exec, Sessions: w.sessions, Platform: w.platforms[0], Parallelism: w.cfg.Parallelism,
		Sources: []ops.Source{w.image, w.layout, w.git, w.http, local.New(local.Options{Cache: w.cache, Sessions: w.sessions})},
		Logs:    w.cfg.Root,
		Log:     w.cfg.Log,
	}
	if w.supervisor != nil {
		cfg.Supervisor = w.supervisor
	}
	var err error
	if w.loader, err = ops.NewLoader(cfg); err != nil {
		return fmt.Errorf("set up ops: %w", err)
	}
	w.openKeys(false)
	w.solver = solver.New(solver.Options{Keys: w.keys, Results: ops.Results{Cache: w.cache}, Warn: w.cfg.Log.Warn})
	return nil
}

// Close ends the worker; builds must have ended before.
func (w *Worker) Close() (err error) {
	for _, release := range slices.Backward(w.release) {
		err = errors.Join(err, release())
	}
	return err
}

// prepareRoot makes the state directory and refuses one that another program
// keeps its state in (DMN-124).
func prepareRoot(root string) error {
	if root == "" {
		return errors.New("no state directory is given")
	}
	for _, foreign := range []string{"buildkitd.lock", "cache.db", "history.db", "containerdmeta.db", "runc-*", "containerd-*"} {
		found, err := filepath.Glob(filepath.Join(escapeGlob(root), foreign))
		if err != nil {
			return fmt.Errorf("look at state directory %s: %w", root, err)
		}
		if len(found) > 0 {
			return fmt.Errorf("state directory %s holds the state of buildkitd (%s); choose another with --root", root, filepath.Base(found[0]))
		}
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	return nil
}

// escapeGlob makes path stand for itself in a pattern.
func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// workerID is the same across restarts.
func workerID(root string) (string, error) {
	path := filepath.Join(root, "workerid")
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read the worker's id: %w", err)
	}
	if id := strings.TrimSpace(string(data)); id != "" {
		return id, nil
	}
	id := strings.ToLower(rand.Text())
	// In two steps: a crash leaves no half of it.
	if err := os.WriteFile(path+".new", []byte(id), 0o600); err != nil {
		return "", fmt.Errorf("keep the worker's id: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return "", fmt.Errorf("keep the worker's id: %w", err)
	}
	return id, nil
}

// announced are the platforms that clients are told of.
func announced(given []string) ([]ocispec.Platform, error) {
	if len(given) == 0 {
		return native(), nil
	}
	var out []ocispec.Platform
	for _, s := range given {
		p, err := platforms.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w", s, err)
		}
		out = append(out, platforms.Normalize(p))
	}
	return out, nil
}

// ID names the worker.
func (w *Worker) ID() string { return w.id }

// Labels describe the worker (DMN-070).
func (w *Worker) Labels() map[string]string {
	const prefix = "org.mobyproject.buildkit.worker."
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	mode := string(w.cfg.Network.Mode)
	if w.cfg.Network.Mode == network.Bridge {
		mode = string(network.CNI) // the name that clients know for it
	}
	out := map[string]string{
		prefix + "executor": "oci", prefix + "hostname": host, prefix + "snapshotter": "overlayfs",
		prefix + "network": mode, prefix + "oci.process-mode": "sandbox",
		prefix + "selinux.enabled": "false", prefix + "apparmor.profile": w.cfg.AppArmor,
	}
	if w.cfg.MachinePIDs {
		out[prefix+"oci.process-mode"] = "no-sandbox"
	}
	maps.Copy(out, w.cfg.Labels)
	return out
}

// Platforms are those the worker builds for, native first.
func (w *Worker) Platforms() []ocispec.Platform { return w.platforms }

// Store is the daemon's one database.
func (w *Worker) Store() *store.DB { return w.store }

// Cache is the cache of everything that was built.
func (w *Worker) Cache() *cache.Manager { return w.cache }

// Keys lead from steps to the cache's records.
func (w *Worker) Keys() *keys.Store { return w.keys }

// Registry talks to image registries.
func (w *Worker) Registry() *registry.Client { return w.registry }

// Sessions are the clients' connections.
func (w *Worker) Sessions() *session.Manager { return w.sessions }

// Loader turns definitions into vertices.
func (w *Worker) Loader() *ops.Loader { return w.loader }

// Solver is shared by all builds.
func (w *Worker) Solver() *solver.Solver { return w.solver }
