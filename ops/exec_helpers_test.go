package ops

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// newTestCache opens a cache in a directory of its own.
func newTestCache(t testing.TB) *cache.Manager {
	t.Helper()
	return cachetest.Open(t, t.TempDir()).Manager
}

// fileSet is a tree's regular files by path.
type fileSet map[string]string

// newRef commits a record on parent with the given files written to it.
func newRef(t testing.TB, m *cache.Manager, parent *cache.Ref, content fileSet) *cache.Ref {
	t.Helper()
	return commitRef(t, m, parent, func(dir string) {
		for name, text := range content {
			write(t, filepath.Join(dir, name), text)
		}
	})
}

// commitRef commits a record on parent that fill has changed.
func commitRef(t testing.TB, m *cache.Manager, parent *cache.Ref, fill func(dir string)) *cache.Ref {
	t.Helper()
	ctx := context.Background()
	u, err := m.New(ctx, parent, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	view, err := u.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fill(view.Path())
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	ref, err := u.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Error(err)
	}
}

// tree reads all regular files below dir.
func tree(t testing.TB, dir string) fileSet {
	t.Helper()
	out := fileSet{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		dt, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = string(dt)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return out
}

// wantFiles compares what a result holds.
func wantFiles(t testing.TB, what string, r solver.Result, want fileSet) {
	t.Helper()
	view, err := r.(Result).Ref.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	if got := tree(t, view.Path()+"/"); !maps.Equal(got, want) {
		t.Errorf("%s holds %v, want %v", what, got, want)
	}
}

// fakeExecutor runs Go functions where a process would run.
type fakeExecutor struct {
	// process is given the paths of what is mounted, by destination.
	process func(ctx context.Context, p executor.Process, at map[string]string) error

	t    testing.TB
	mu   sync.Mutex
	runs []executor.Process
}

func (f *fakeExecutor) Run(ctx context.Context, p executor.Process) (executor.Usage, error) {
	f.mu.Lock()
	f.runs = append(f.runs, p)
	f.mu.Unlock()
	at := map[string]string{}
	for _, m := range append([]executor.Mount{{Dest: "/", Source: p.Root}}, p.Mounts...) {
		view, err := snapshot.Open(m.Source)
		if err != nil {
			f.t.Errorf("open mount %s: %v", m.Dest, err)
			return executor.Usage{}, err
		}
		defer view.Close()
		at[m.Dest] = filepath.Join(view.Path(), m.Selector) + "/"
		if info, err := os.Stat(at[m.Dest][:len(at[m.Dest])-1]); err == nil && !info.IsDir() {
			at[m.Dest] = at[m.Dest][:len(at[m.Dest])-1]
		}
	}
	if f.process == nil {
		return executor.Usage{}, nil
	}
	return executor.Usage{}, f.process(ctx, p, at)
}

func (f *fakeExecutor) Close() error { return nil }

// execBench is a loader with a real cache, a fake executor and sessions.
type execBench struct {
	*Loader
	t        testing.TB
	root     string // of the cache
	cache    *cache.Manager
	exec     *fakeExecutor
	sessions *session.Manager
}

func newExecBench(t testing.TB, process func(ctx context.Context, p executor.Process, at map[string]string) error) *execBench {
	t.Helper()
	sessions, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	b := &execBench{t: t, root: root, cache: cachetest.Open(t, root).Manager, sessions: sessions, exec: &fakeExecutor{t: t, process: process}}
	b.Loader = newTestLoader(t, Config{Cache: b.cache, Executor: b.exec, Sessions: sessions, Logs: root})
	return b
}

// op makes an exec op out of e with the given number of inputs.
func (b *execBench) op(e *pb.ExecOp, inputs int, meta *pb.OpMetadata) *execOp {
	b.t.Helper()
	d := newDef(b.t)
	op := execOf(e)
	src := d.add(sourceOf("test://base"))
	for range inputs {
		op.Inputs = append(op.Inputs, input(src, 0))
	}
	dgst := d.add(op)
	d.meta(dgst, meta)
	edge, err := b.Load(d.done(dgst, 0), LoadOptions{Entitlements: map[string]bool{entitlementNetworkHost: true, entitlementInsecure: true}})
	if err != nil {
		b.t.Fatal(err)
	}
	return edge.Vertex.Op.(*execOp)
}

// run executes op on inputs for who and fails the test on an error.
func (b *execBench) run(op *execOp, who asker, inputs ...*cache.Ref) []solver.Result {
	b.t.Helper()
	out, err := op.Exec(context.Background(), who, results(inputs...))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		for _, r := range out {
			r.Release()
		}
	})
	return out
}

func results(in ...*cache.Ref) []solver.Result {
	out := make([]solver.Result, len(in))
	for i, ref := range in {
		out[i] = Result{ref}
	}
	return out
}

// ref is newRef, released with the test.
func (b *execBench) ref(parent *cache.Ref, content fileSet) *cache.Ref {
	b.t.Helper()
	ref := newRef(b.t, b.cache, parent, content)
	b.t.Cleanup(ref.Release)
	return ref
}

// session starts a client session that offers the given services and returns
// an asker with that session.
func (b *execBench) session(services ...session.Attachable) asker {
	b.t.Helper()
	return asker{&Build{SessionIDs: []string{sessiontest.Connect(b.t, b.sessions, "", services...)}}}
}
