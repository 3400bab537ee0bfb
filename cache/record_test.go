package cache

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
)

func TestRecordGoesWithItsLastHandle(t *testing.T) {
	e := newEnv(t)
	a := e.layer(nil, Options{}, "a=1")
	b := e.layer(a, Options{}, "b=2", "-a")
	id := b.ID()
	e.wantFiles(a, "a=1")
	e.wantFiles(b, "b=2")
	a.Release() // b still needs it
	c := b.Clone()
	b.Release()
	e.wantFiles(c, "b=2")
	p := c.Parent()
	e.wantFiles(p, "a=1")
	c.Release()
	if _, err := e.m.Get(t.Context(), id); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of what is gone: %v", err)
	}
	p.Release()
	e.empty()
}

func TestReleaseTwiceIsReportedAndHarmless(t *testing.T) {
	e := newEnv(t)
	a := e.layer(nil, Options{}, "a=1")
	b := a.Clone()
	a.Release()
	a.Release()
	e.wantFiles(b, "a=1")
	b.Release()
	e.empty()
	if n := len(e.logged()); n == 0 {
		t.Error("nothing was logged")
	}
}

func TestScratch(t *testing.T) {
	e := newEnv(t)
	var r *Ref
	if r.Clone() != nil || r.Parent() != nil || r.ChainID() != "" || r.Description() != "" {
		t.Error("scratch has properties")
	}
	r.Release()
	r.SetDescription("x")
	r.SetMetadata("k", []byte("v"))
	if _, ok := r.Metadata("k"); ok {
		t.Error("scratch has metadata")
	}
	must(t, r.Extract(t.Context()))
	must(t, r.Persist(&store.Batch{}))
	e.wantFiles(r)
	if layers, err := r.Layers(t.Context(), Compression{}); err != nil || layers != nil {
		t.Errorf("layers %v, %v", layers, err)
	}
	if m, err := e.m.Merge(t.Context(), []*Ref{nil, nil}, Options{}); err != nil || m != nil {
		t.Errorf("merge of nothing: %v, %v", m, err)
	}
}

func TestPersistedRecordSurvives(t *testing.T) {
	e := newEnv(t)
	created := time.Unix(1700000000, 5)
	a := e.layer(nil, Options{Description: "base", Type: TypeInternal, CreatedAt: created, Index: map[string]string{"k": "v"}}, "a=1")
	b := e.layer(a, Options{}, "b=2")
	b.SetMetadata("m", []byte("before"))
	e.persist(b)
	b.SetMetadata("n", []byte("after"))
	b.SetDescription("changed")
	lost := e.layer(b, Options{}, "c=3")
	id, lostID := b.ID(), lost.ID()
	e.crash()

	if _, err := e.m.Get(t.Context(), lostID); !errors.Is(err, ErrNotFound) {
		t.Errorf("a record that was never persisted came back: %v", err)
	}
	b = get(e.m.Get(t.Context(), id))(t)
	e.wantFiles(b, "a=1", "b=2")
	for k, want := range map[string]string{"m": "before", "n": "after"} {
		if v, ok := b.Metadata(k); !ok || string(v) != want {
			t.Errorf("metadata %s is %q, %t", k, v, ok)
		}
	}
	if b.Description() != "changed" {
		t.Errorf("description %q", b.Description())
	}
	if found := e.m.Search("k", "v"); len(found) != 1 {
		t.Errorf("search found %q", found)
	}
	du := get(e.m.DiskUsage(t.Context(), []string{"description==base"}, 0))(t)
	if len(du) != 1 || du[0].Type != TypeInternal || !du[0].CreatedAt.Equal(created) || !du[0].InUse {
		t.Errorf("usage %+v", du)
	}
	b.Release()
	e.restart()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

func TestCommitOnlyOnce(t *testing.T) {
	e := newEnv(t)
	u := get(e.m.New(t.Context(), nil, Options{}))(t)
	r := get(u.Commit(t.Context()))(t)
	if _, err := u.Commit(t.Context()); err == nil {
		t.Error("a second commit worked")
	}
	must(t, u.Release(t.Context())) // deferred releases do this
	e.wantFiles(r)
	r.Release()
	e.empty()
}

func TestRetainedMutable(t *testing.T) {
	e := newEnv(t)
	base := e.layer(nil, Options{}, "base=0")
	u := get(e.m.New(t.Context(), base, Options{Retain: true, Type: TypeCacheMount, Index: map[string]string{"mount": "id"}}))(t)
	base.Release()
	e.write(u, "x=1")
	id := u.ID()
	if _, err := e.m.GetMutable(t.Context(), id); !errors.Is(err, ErrLocked) {
		t.Errorf("second handle: %v", err)
	}
	if _, err := e.m.Get(t.Context(), id); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of a mutable: %v", err)
	}
	must(t, u.Release(t.Context()))
	e.crash()
	if found := e.m.Search("mount", "id"); !slices.Equal(found, []string{id}) {
		t.Fatalf("found %q", found)
	}
	u = get(e.m.GetMutable(t.Context(), id))(t)
	if u.ID() != id {
		t.Errorf("a mutable got the new id %s", u.ID())
	}
	v := get(u.Open(t.Context()))(t)
	if got := listFiles(t, v.Path()); !slices.Equal(got, []string{"base=0", "x=1"}) {
		t.Errorf("files %q", got)
	}
	must(t, v.Close())
	must(t, u.Discard(t.Context()))
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

// A local source is committed after each transfer and reopened for the next.
func TestReopenedImmutableIsAnother(t *testing.T) {
	e := newEnv(t)
	var forgotten []string
	e.m.OnRemove(func(b *store.Batch, ids []string) map[string][]string {
		forgotten = append(forgotten, ids...)
		return nil
	})
	u := get(e.m.New(t.Context(), nil, Options{Retain: true, Type: TypeLocal, Index: map[string]string{"local": "ctx"}}))(t)
	e.write(u, "a=1")
	u.SetMetadata("tree", []byte("a"))
	first := get(u.Commit(t.Context()))(t)
	if _, err := first.Layers(t.Context(), Compression{}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.m.GetMutable(t.Context(), first.ID()); !errors.Is(err, ErrLocked) {
		t.Errorf("reopened while held: %v", err)
	}
	id := first.ID()
	child := e.layer(first, Options{}, "b=2")
	first.Release()
	if _, err := e.m.GetMutable(t.Context(), id); !errors.Is(err, ErrLocked) {
		t.Errorf("reopened below a child: %v", err)
	}
	child.Release()

	u = get(e.m.GetMutable(t.Context(), e.m.Search("local", "ctx")[0]))(t)
	if u.ID() == id || !slices.Equal(forgotten, []string{id}) {
		t.Errorf("id %s, forgotten %q", u.ID(), forgotten)
	}
	if _, err := e.m.Get(t.Context(), id); !errors.Is(err, ErrNotFound) {
		t.Errorf("the old content is still there: %v", err)
	}
	if v, _ := u.Metadata("tree"); string(v) != "a" {
		t.Errorf("metadata %q", v)
	}
	e.write(u, "-a", "c=3")
	u.SetMetadata("tree", []byte("c"))
	second := get(u.Commit(t.Context()))(t)
	e.wantFiles(second, "c=3")
	layers := get(second.Layers(t.Context(), Compression{Type: "uncompressed"}))(t)
	if len(layers) != 1 {
		t.Fatalf("layers %v", layers)
	}
	second.Release()
	e.crash()
	second = get(e.m.Get(t.Context(), u.ID()))(t)
	e.wantFiles(second, "c=3")
	if v, _ := second.Metadata("tree"); string(v) != "c" {
		t.Errorf("metadata %q", v)
	}
	second.Release()
}

// What a crash interrupts must not be believed: neither the content of the
// record that was being written, nor what was known of it.
func TestCrashWhileReopened(t *testing.T) {
	e := newEnv(t)
	u := get(e.m.New(t.Context(), nil, Options{Retain: true, Index: map[string]string{"local": "ctx"}}))(t)
	e.write(u, "a=1")
	u.SetMetadata("tree", []byte("a"))
	r := get(u.Commit(t.Context()))(t)
	id := r.ID()
	r.Release()
	for range 2 { // an immutable record, then the mutable that it became
		u = get(e.m.GetMutable(t.Context(), e.m.Search("local", "ctx")[0]))(t)
		if v, _ := u.Metadata("tree"); string(v) != "a" {
			t.Errorf("metadata %q", v)
		}
		e.write(u, "b=2")
		e.crash()
		if _, err := e.m.Get(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("half written content came back: %v", err)
		}
		u = get(e.m.GetMutable(t.Context(), e.m.Search("local", "ctx")[0]))(t)
		if v, ok := u.Metadata("tree"); ok {
			t.Errorf("metadata of other content came back: %q", v)
		}
		u.SetMetadata("tree", []byte("a"))
		must(t, u.Release(t.Context()))
	}
}

func TestSearchFindsTheNewestFirst(t *testing.T) {
	e := newEnv(t)
	var refs []*Ref
	for i := range 3 {
		refs = append(refs, e.layer(nil, Options{CreatedAt: time.Unix(int64(10+i), 0), Index: map[string]string{"k": "v"}}))
	}
	want := []string{refs[2].ID(), refs[1].ID(), refs[0].ID()}
	if got := e.m.Search("k", "v"); !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
	for _, r := range refs {
		r.Release()
	}
	if got := e.m.Search("k", "v"); len(got) != 0 {
		t.Errorf("found %q after all were released", got)
	}
}

// A snapshot that somebody deleted is a miss, for the record and for all that
// builds on it.
func TestLostSnapshot(t *testing.T) {
	e := newEnv(t)
	a := e.layer(nil, Options{}, "a=1")
	b := e.layer(a, Options{}, "b=2")
	c := e.layer(b, Options{}, "c=3")
	e.persist(c)
	u := get(e.m.New(t.Context(), c, Options{}))(t)
	e.m.mu.Lock()
	dir := filepath.Join(e.root, "snapshots", b.r.snap)
	e.m.mu.Unlock()
	must(t, os.RemoveAll(dir))
	_, err := u.Place(t.Context(), "/d")
	wantErr(t, err, ErrLost, b.r.snap)
	must(t, u.Release(t.Context()))
	_, err = c.Mounts(t.Context())
	wantErr(t, err, ErrLost, b.r.snap)
	for _, r := range []*Ref{b, c} {
		if _, err := e.m.Get(t.Context(), r.ID()); !errors.Is(err, ErrNotFound) {
			t.Errorf("lost %s is handed out: %v", r.ID(), err)
		}
	}
	get(e.m.Get(t.Context(), a.ID()))(t).Release()
	if _, err := e.m.New(t.Context(), b, Options{}); !errors.Is(err, ErrLost) {
		t.Errorf("New on a lost parent: %v", err)
	}
	c.Release()
	b.Release()
	a.Release()
	if du := get(e.m.DiskUsage(t.Context(), nil, 0))(t); len(du) != 1 {
		t.Errorf("lost records stay: %+v", du)
	}
}

// Ids are in the order in which records are made, and different ones also
// within a moment, from one process to the next, and as the first letters of
// snapshots.
func TestIDs(t *testing.T) {
	seen := map[string]bool{}
	random := map[string]bool{}
	last := ""
	for range 1000 {
		id := newID()
		if len(id) != idLen || strings.Trim(id, idLetters) != "" {
			t.Fatalf("id %q", id)
		}
		if at := id[:idTimeLen]; at < last {
			t.Errorf("%s comes after %s", at, last)
		} else {
			last = at
		}
		seen[id], random[id[idTimeLen:][:lifeLen]] = true, true
	}
	if len(seen) != 1000 || len(random) < 900 {
		t.Errorf("of 1000 ids %d differ, and %d in their first random letters", len(seen), len(random))
	}
}
