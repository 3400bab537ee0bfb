package cache

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

var (
	modelSteps = flag.Int("model.steps", 300, "steps of the random model test")
	modelSeeds = flag.Int("model.seeds", 8, "runs of the random model test")
)

// model says in a few lines what the manager must do: which records there are
// and what is in them.
type model struct {
	records []*modelRecord
	refs    []modelRef
	muts    []modelMut
	written int
}

type modelRecord struct {
	id        string
	needs     []*modelRecord
	files     map[string]string
	mutable   bool
	persisted bool
	retain    bool
	stack     bool
	handles   int
}

type modelRef struct {
	*Ref
	rec *modelRecord
}

type modelMut struct {
	*Mutable
	rec *modelRecord
}

// live computes the set that keep leads to, downwards.
func (m *model) live(keep func(*modelRecord) bool) map[*modelRecord]bool {
	out := map[*modelRecord]bool{}
	var mark func(r *modelRecord)
	mark = func(r *modelRecord) {
		if !out[r] {
			out[r] = true
			for _, n := range r.needs {
				mark(n)
			}
		}
	}
	for _, r := range m.records {
		if keep(r) {
			mark(r)
		}
	}
	return out
}

func (r *modelRecord) held() bool { return r.handles > 0 }
func (r *modelRecord) kept() bool { return r.persisted && (!r.mutable || r.retain) }

// settle drops what nothing keeps.
func (m *model) settle() {
	live := m.live(func(r *modelRecord) bool { return r.held() || r.kept() })
	m.records = slices.DeleteFunc(m.records, func(r *modelRecord) bool { return !live[r] })
}

func (m *model) children(r *modelRecord) bool {
	return slices.ContainsFunc(m.records, func(c *modelRecord) bool { return slices.Contains(c.needs, r) })
}

func (r *modelRecord) persist() {
	r.persisted = true
	for _, n := range r.needs {
		n.persist()
	}
}

func (r *modelRecord) list() (out []string) {
	for k, v := range r.files {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

// walker runs random steps against both.
type walker struct {
	*env
	model
	rng *rand.Rand
}

func pick[T any](rng *rand.Rand, from []T) (v T, ok bool) {
	if len(from) == 0 {
		return v, false
	}
	return from[rng.IntN(len(from))], true
}

func drop[T any](from []T, gone func(T) bool) []T { return slices.DeleteFunc(from, gone) }

func (w *walker) step() string {
	switch w.rng.IntN(14) {
	case 0, 1, 2:
		return w.create()
	case 3, 4:
		return w.commit()
	case 5:
		return w.endMutable()
	case 6, 7:
		return w.release()
	case 8:
		return w.cloneOrGet()
	case 9:
		return w.save()
	case 10:
		return w.reopen()
	case 11:
		return w.merge()
	case 12:
		return w.pack()
	default:
		if w.rng.IntN(3) > 0 {
			return "pass"
		}
		if w.rng.IntN(2) == 0 {
			return w.pruneAll()
		}
		return w.crashNow()
	}
}

func (w *walker) write(u *Mutable, rec *modelRecord) {
	w.written++
	name, content := fmt.Sprintf("f%d", w.rng.IntN(6)), fmt.Sprint(w.written)
	w.env.write(u, name+"="+content)
	rec.files[name] = content
}

func (w *walker) create() string {
	rec := &modelRecord{mutable: true, handles: 1, files: map[string]string{}, retain: w.rng.IntN(5) == 0}
	var parent *Ref
	if p, ok := pick(w.rng, w.refs); ok && w.rng.IntN(4) > 0 {
		parent = p.Ref
		rec.needs = []*modelRecord{p.rec}
		rec.files = maps.Clone(p.rec.files)
	}
	u := get(w.m().New(w.t.Context(), parent, Options{Retain: rec.retain}))(w.t)
	rec.id = u.ID()
	w.records = append(w.records, rec)
	if rec.retain {
		rec.persist()
	}
	w.write(u, rec)
	w.muts = append(w.muts, modelMut{u, rec})
	return "create " + rec.id
}

func (w *walker) m() *Manager { return w.env.m }

func (w *walker) commit() string {
	u, ok := pick(w.rng, w.muts)
	if !ok {
		return "nothing to commit"
	}
	r := get(u.Commit(w.t.Context()))(w.t)
	u.rec.mutable = false
	w.muts = drop(w.muts, func(o modelMut) bool { return o == u })
	w.refs = append(w.refs, modelRef{r, u.rec})
	return "commit " + u.rec.id
}

func (w *walker) endMutable() string {
	u, ok := pick(w.rng, w.muts)
	if !ok {
		return "no mutable to end"
	}
	u.rec.handles--
	if w.rng.IntN(2) == 0 {
		must(w.t, u.Release(w.t.Context()))
	} else {
		u.rec.retain = false
		must(w.t, u.Discard(w.t.Context()))
	}
	w.muts = drop(w.muts, func(o modelMut) bool { return o == u })
	return "end " + u.rec.id
}

func (w *walker) release() string {
	r, ok := pick(w.rng, w.refs)
	if !ok {
		return "nothing to release"
	}
	r.Release()
	r.rec.handles--
	w.refs = drop(w.refs, func(o modelRef) bool { return o == r })
	return "release " + r.rec.id
}

func (w *walker) cloneOrGet() string {
	rec, ok := pick(w.rng, w.records)
	if !ok {
		return "no records"
	}
	r, err := w.m().Get(w.t.Context(), rec.id)
	if rec.mutable {
		wantErr(w.t, err, ErrNotFound)
		return "get mutable " + rec.id
	}
	must(w.t, err)
	rec.handles += 2
	w.refs = append(w.refs, modelRef{r, rec}, modelRef{r.Clone(), rec})
	return "get " + rec.id
}

func (w *walker) save() string {
	r, ok := pick(w.rng, w.refs)
	if !ok {
		return "nothing to persist"
	}
	w.persist(r.Ref)
	r.rec.persist()
	if w.rng.IntN(2) == 0 {
		r.SetMetadata("k", []byte(r.rec.id))
	}
	return "persist " + r.rec.id
}

func (w *walker) reopen() string {
	rec, ok := pick(w.rng, w.records)
	if !ok {
		return "no records"
	}
	u, err := w.m().GetMutable(w.t.Context(), rec.id)
	if rec.handles > 0 || w.children(rec) || rec.stack {
		wantErr(w.t, err, ErrLocked)
		return "reopen locked " + rec.id
	}
	must(w.t, err)
	if renamed := u.ID() != rec.id; renamed == rec.mutable {
		w.t.Errorf("%s (mutable %t) became %s", rec.id, rec.mutable, u.ID())
	}
	old := rec.id
	rec.id, rec.mutable, rec.handles = u.ID(), true, 1
	w.write(u, rec)
	w.muts = append(w.muts, modelMut{u, rec})
	return "reopen " + old + " as " + rec.id
}

func (w *walker) merge() string {
	a, ok := pick(w.rng, w.refs)
	b, _ := pick(w.rng, w.refs)
	if !ok {
		return "nothing to merge"
	}
	r := get(w.m().Merge(w.t.Context(), []*Ref{a.Ref, nil, b.Ref}, Options{}))(w.t)
	for _, rec := range w.records {
		if rec.id == r.ID() {
			rec.handles++
			w.refs = append(w.refs, modelRef{r, rec})
			return "merge gives " + rec.id
		}
	}
	rec := &modelRecord{id: r.ID(), handles: 1, stack: true, files: map[string]string{}}
	rec.needs = []*modelRecord{a.rec, b.rec}
	// What a merge shows is the concern of its own tests.
	for _, f := range w.env.files(r) {
		name, content, _ := cut(f)
		rec.files[name] = content
	}
	if r.r.twin != nil { // another merge of the same content lends its files
		i := slices.IndexFunc(w.records, func(o *modelRecord) bool { return o.id == r.r.twin.id })
		rec.needs = append(rec.needs, w.records[i])
	}
	w.records = append(w.records, rec)
	w.refs = append(w.refs, modelRef{r, rec})
	return "merge as " + rec.id
}

func cut(f string) (name, content string, ok bool) {
	for i := range f {
		if f[i] == '=' {
			return f[:i], f[i+1:], true
		}
	}
	return f, "", false
}

func (w *walker) pack() string {
	r, ok := pick(w.rng, w.refs)
	if !ok {
		return "nothing to pack"
	}
	c := Compression{Type: []string{"gzip", "zstd", "uncompressed"}[w.rng.IntN(3)], Force: w.rng.IntN(2) == 0}
	if len(get(r.Layers(w.t.Context(), c))(w.t)) == 0 {
		w.t.Error("no layers")
	}
	return "pack " + r.rec.id
}

func (w *walker) pruneAll() string {
	inUse := w.live((*modelRecord).held)
	var gone []string
	must(w.t, w.m().Prune(w.t.Context(), PruneOptions{All: true}, func(u Usage) error {
		gone = append(gone, u.ID)
		return nil
	}))
	var want []string
	w.records = drop(w.records, func(r *modelRecord) bool {
		if inUse[r] {
			return false
		}
		want = append(want, r.id)
		return true
	})
	slices.Sort(gone)
	slices.Sort(want)
	if !slices.Equal(gone, want) {
		w.t.Errorf("pruned %q, want %q", gone, want)
	}
	return "prune"
}

func (w *walker) crashNow() string {
	w.crash()
	for _, r := range w.records {
		r.handles = 0
	}
	w.refs, w.muts = nil, nil
	return "crash"
}

// compare checks the manager against the model.
func (w *walker) compare() {
	w.t.Helper()
	w.settle()
	m := w.m()
	m.mu.Lock()
	got := slices.Sorted(maps.Keys(m.records))
	m.mu.Unlock()
	var want []string
	for _, r := range w.records {
		want = append(want, r.id)
	}
	slices.Sort(want)
	for _, r := range w.records {
		if !slices.Contains(got, r.id) {
			w.t.Errorf("record %s (mutable %t, persisted %t, retained %t) is missing", r.id, r.mutable, r.persisted, r.retain)
		}
	}
	for _, id := range got {
		if !slices.Contains(want, id) {
			m.mu.Lock()
			w.t.Errorf("record %s is left: %+v", id, *m.records[id])
			m.mu.Unlock()
		}
	}
	if r, ok := pick(w.rng, w.refs); ok {
		if got := w.env.files(r.Ref); !slices.Equal(got, r.rec.list()) {
			w.t.Errorf("%s has %q, want %q", r.rec.id, got, r.rec.list())
		}
	}
}

// Random steps, crashes included, leave exactly what the model says, and
// nothing else on disk.
func TestModel(t *testing.T) {
	for seed := range *modelSeeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := &walker{env: newEnv(t), rng: rand.New(rand.NewPCG(uint64(seed), 7))}
			for i := range *modelSteps {
				did := w.step()
				w.compare()
				if i%10 == 0 {
					w.check()
					w.addsUp()
				}
				if t.Failed() {
					t.Fatalf("after step %d: %s", i, did)
				}
			}
			for _, r := range w.refs {
				r.Release()
			}
			for _, u := range w.muts {
				must(t, errors.Join(u.Release(t.Context())))
			}
			must(t, w.m().Prune(t.Context(), PruneOptions{All: true}, nil))
			w.empty()
		})
	}
}
