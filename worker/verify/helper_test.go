package verify

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/cache/keys"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// site is a cache, a solver on it, and a verifier.
type site struct {
	t      *testing.T
	root   string
	db     *store.DB
	cache  *cache.Manager
	keys   *keys.Store
	solver *solver.Solver
	v      *Verifier
	log    *logs
}

func newSite(t *testing.T, share float64) *site {
	t.Helper()
	s := &site{t: t, root: t.TempDir(), log: &logs{lines: make(chan string, 1000)}}
	c := cachetest.Open(t, s.root)
	s.cache, s.db = c.Manager, c.Store
	s.keys = keys.Open(s.db)
	s.cache.OnRemove(s.keys.Forget)
	s.solver = solver.New(solver.Options{Keys: s.keys, Results: ops.Results{Cache: s.cache}})
	s.v = New(Config{Share: share, Cache: s.cache, Keys: s.keys, Repeat: repeat, Log: slog.New(s.log)})
	t.Cleanup(func() {
		s.v.Close()
		s.solver.Close()
		c.Shut() // which names records that are still held
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func repeat(v *solver.Vertex) (solver.Op, string) {
	if v.Op.(*step).source {
		return nil, "source"
	}
	return v.Op, ""
}

// logs is a slog.Handler that hands on what is logged, a line a message.
type logs struct {
	slog.Handler
	lines chan string
}

func (l *logs) Enabled(context.Context, slog.Level) bool { return true }

func (l *logs) Handle(_ context.Context, r slog.Record) error {
	var line strings.Builder
	line.WriteString(r.Level.String() + " " + r.Message)
	r.Attrs(func(a slog.Attr) bool {
		line.WriteString(" " + a.String())
		return true
	})
	l.lines <- line.String()
	return nil
}

// expect waits for a message that holds every part.
func (s *site) expect(parts ...string) string {
	s.t.Helper()
	select {
	case line := <-s.log.lines:
		for _, p := range parts {
			if !strings.Contains(line, p) {
				s.t.Errorf("log %q lacks %q", line, p)
			}
		}
		return line
	case <-time.After(time.Minute):
		s.t.Fatalf("no message %q", parts)
	}
	return ""
}

// counts fails unless these checks had these outcomes.
func (s *site) counts(want map[Outcome]int) {
	s.t.Helper()
	if got := s.v.Summary().Counts; !maps.Equal(got, want) {
		s.t.Errorf("outcomes %v, want %v", got, want)
	}
}

// step writes files on top of its first input, or on nothing.
type step struct {
	s       *site
	name    string
	source  bool
	content bool // inputs are matched by content
	alone   bool // the first input is read only
	err     error
	make    func(run int, inputs []string) map[string]string // inputs by their file "out"

	mu    sync.Mutex
	runs  int
	enter chan context.Context // if set, gets the context of each run
	leave chan struct{}        // then a run waits for it, or for its context
}

func (s *site) step(name string, files ...string) *step {
	return &step{s: s, name: name, make: func(int, []string) map[string]string {
		out := map[string]string{}
		for _, f := range files {
			k, v, _ := strings.Cut(f, "=")
			out[k] = v
		}
		return out
	}}
}

func (st *step) vertex(inputs ...*solver.Vertex) *solver.Vertex {
	v := &solver.Vertex{Digest: digest.FromString(st.name), Name: st.name, Op: st}
	for _, in := range inputs {
		v.Inputs = append(v.Inputs, solver.Edge{Vertex: in})
	}
	return v
}

func (st *step) count() int {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.runs
}

func (st *step) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	m := &solver.CacheMap{Digest: digest.FromString("op " + st.name), Deps: make([]solver.Dep, 4)}
	for i := range m.Deps {
		if st.content {
			m.Deps[i].Content = func(ctx context.Context, _ solver.Asker, in solver.Result) (digest.Digest, error) {
				return contenthash.Checksum(ctx, in.(ops.Result).Ref, "/out", contenthash.Options{})
			}
		}
	}
	m.Deps = m.Deps[:st.inputs()]
	return m, false, nil
}

func (st *step) inputs() int { return map[bool]int{true: 0, false: 1}[st.source] }

func (st *step) Exec(ctx context.Context, _ solver.Asker, inputs []solver.Result) (_ []solver.Result, err error) {
	st.mu.Lock()
	st.runs++
	run := st.runs
	st.mu.Unlock()
	var parent *cache.Ref
	var read []string
	for i, in := range inputs {
		ref := in.(ops.Result).Ref
		if i == 0 && !st.alone {
			parent = ref
		}
		view, err := ref.Open(ctx)
		if err != nil {
			return nil, err
		}
		data, err := os.ReadFile(filepath.Join(view.Path(), "out"))
		if err := errors.Join(err, view.Close()); err != nil {
			return nil, err
		}
		read = append(read, string(data))
	}
	u, err := st.s.cache.New(ctx, parent, cache.Options{Description: st.name})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, u.Release(context.WithoutCancel(ctx))) }()
	if st.enter != nil {
		st.enter <- ctx
		select {
		case <-st.leave:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if st.err != nil {
		return nil, st.err
	}
	view, err := u.Open(ctx)
	if err != nil {
		return nil, err
	}
	for name, data := range st.make(run, read) {
		err = errors.Join(err, os.WriteFile(filepath.Join(view.Path(), name), []byte(data), 0o644))
	}
	if err := errors.Join(err, view.Close()); err != nil {
		return nil, err
	}
	ref, err := u.Commit(ctx)
	if err != nil {
		return nil, err
	}
	return []solver.Result{ops.Result{Ref: ref}}, nil
}

// build solves v and returns the id of the result. A build that only fills the
// cache isn't watched.
func (s *site) build(v *solver.Vertex, watched bool) string {
	s.t.Helper()
	opts := solver.BuildOptions{}
	end := func() {}
	if watched {
		w := s.v.Watch()
		opts.Observers, end = []solver.Observer{w}, w.End
	}
	b := s.solver.NewBuild(opts)
	r, err := b.Solve(s.t.Context(), solver.Edge{Vertex: v})
	must(s.t, err)
	id := r.ID()
	r.Release()
	b.Close()
	end()
	return id
}

// damage writes into the files of a record behind the cache's back.
func (s *site) damage(id, name, data string) {
	s.t.Helper()
	ref, err := s.cache.Get(s.t.Context(), id)
	must(s.t, err)
	defer ref.Release()
	found, err := filepath.Glob(filepath.Join(s.root, "snapshots", "*", "fs", name))
	must(s.t, err)
	view, err := ref.Open(s.t.Context())
	must(s.t, err)
	st, err := os.Stat(filepath.Join(view.Path(), name))
	must(s.t, errors.Join(err, view.Close()))
	n := slices.IndexFunc(found, func(path string) bool {
		other, err := os.Stat(path)
		return err == nil && other.ModTime().Equal(st.ModTime()) && other.Size() == st.Size()
	})
	if n < 0 {
		s.t.Fatalf("no layer holds %s of %s: %q", name, id, found)
	}
	must(s.t, os.WriteFile(found[n], []byte(data), 0o644))
}

// rootLookup finds the records of a source.
func rootLookup(st *step) solver.Lookup {
	return solver.Lookup{Roots: []solver.Key{solver.RootKey(digest.FromString("op "+st.name), 0)}}
}

func recordNamed(id string) solver.Record { return solver.Record{Result: id} }
