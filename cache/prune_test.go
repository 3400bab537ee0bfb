package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
)

// aged makes a persisted, unused record with n KB of files.
func (e *env) aged(parent *Ref, name string, kb int, lastUsed time.Time, uses int, opts Options) string {
	e.t.Helper()
	opts.Description = name
	r := e.layer(parent, opts, name+"="+strings.Repeat("x", kb<<10))
	e.persist(r)
	id := r.ID()
	rec := r.r
	r.Release()
	e.m.mu.Lock()
	rec.lastUsed, rec.uses = lastUsed, uses
	e.m.changedLocked(rec)
	e.m.mu.Unlock()
	return id
}

func (e *env) prune(opts PruneOptions) (names []string) {
	e.t.Helper()
	must(e.t, e.m.Prune(e.t.Context(), opts, func(u Usage) error {
		names = append(names, u.Description)
		return nil
	}))
	return names
}

func (e *env) names(filters ...string) (names []string) {
	e.t.Helper()
	for _, u := range get(e.m.DiskUsage(e.t.Context(), filters, 0))(e.t) {
		names = append(names, u.Description)
	}
	slices.Sort(names)
	return names
}

// compat: CTL-100
// compat: CTL-101
// compat: CTL-102
// compat: CTL-104
// compat: CTL-106
func TestDiskUsage(t *testing.T) {
	e := newEnv(t)
	now := time.Now()
	baseID := e.aged(nil, "base", 8, now.Add(-time.Hour), 3, Options{})
	base := get(e.m.Get(t.Context(), baseID))(t)
	childID := e.aged(base, "child", 4, now, 1, Options{Type: TypeInternal})
	base.Release()
	e.aged(nil, "git", 4, now, 1, Options{Type: TypeGit})
	mount := get(e.m.New(t.Context(), nil, Options{Description: "mount", Type: TypeCacheMount, Retain: true}))(t)
	e.write(mount, "big="+strings.Repeat("x", 64<<10))

	for filter, want := range map[string][]string{
		"":                                 {"base", "child", "git", "mount"},
		"id==" + baseID:                    {"base"},
		"id~=" + baseID[:10]:               {"base"},
		"parents==" + baseID:               {"child"},
		"description~=i":                   {"child", "git"},
		"inuse":                            {"mount"},
		"mutable":                          {"mount"},
		"immutable":                        {"base", "child", "git"},
		"type==internal":                   {"child"},
		"type==source.git.checkout":        {"git"},
		"type==regular":                    {"base"},
		"private,immutable,type!=internal": {"base", "git"},
		"shared":                           nil,
		"nonsense==1":                      nil,
	} {
		var by []string
		if filter != "" {
			by = []string{filter}
		}
		if got := e.names(by...); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", filter, got, want)
		}
	}
	if got := e.names("description==base", "description==git"); !slices.Equal(got, []string{"base", "git"}) {
		t.Errorf("either: %q", got)
	}
	if _, err := e.m.DiskUsage(t.Context(), []string{"id==="}, 0); err == nil {
		t.Error("a filter that can't be parsed was accepted")
	}

	for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
		switch u.Description {
		case "mount":
			if u.Size != 0 || !u.Mutable || !u.InUse || u.Type != TypeCacheMount {
				t.Errorf("%+v", u)
			}
		case "child":
			if u.ID != childID || !slices.Equal(u.Parents, []string{baseID}) || u.Size < 4<<10 || u.Size > 20<<10 || u.UsageCount != 1 || !u.LastUsedAt.Equal(now) {
				t.Errorf("%+v", u)
			}
		}
	}
	must(t, mount.Release(t.Context()))
	before := get(e.m.DiskUsage(t.Context(), []string{"description==mount"}, 0))(t)[0]
	if before.Size < 64<<10 {
		t.Errorf("released: %+v", before)
	}
	e.restart()
	e.m.mu.Lock()
	for _, r := range e.m.records {
		if r.snapSize == sizeUnknown {
			t.Errorf("the size of %q was not remembered", r.opts.Description)
		}
	}
	e.m.mu.Unlock()
	child := get(e.m.Get(t.Context(), childID))(t)
	if got := e.names("inuse"); !slices.Equal(got, []string{"base", "child"}) {
		t.Errorf("in use: %q", got)
	}
	child.Release()
}

// compat: CTL-103
func TestDiskUsageByAge(t *testing.T) {
	e := newEnv(t)
	e.aged(nil, "old", 1, time.Now().Add(-time.Hour), 1, Options{})
	e.aged(nil, "new", 1, time.Now(), 1, Options{})
	du := get(e.m.DiskUsage(t.Context(), nil, time.Minute))(t)
	if len(du) != 1 || du[0].Description != "old" {
		t.Errorf("%+v", du)
	}
}

// Blobs are counted once, however many records have them.
func TestUsageAddsUp(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	one, two := src.add(t, "uncompressed", tarOf(t, "one="+strings.Repeat("1", 50<<10))), src.add(t, "gzip", tarOf(t, "two=2"))
	top := src.add(t, "uncompressed", tarOf(t, "top="+strings.Repeat("t", 100<<10)))
	a, b := e.pull(src, one, top), e.pull(src, two, top)
	must(t, a.Extract(t.Context()))
	must(t, b.Extract(t.Context()))
	total := int64(0)
	for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
		total += u.Size
	}
	rep := get(e.m.Check(t.Context(), true))(t)
	if rep.Bytes != total {
		t.Errorf("du says %d, there are %d bytes", total, rep.Bytes)
	}
	a.Release()
	b.Release()
}

// compat: CTL-107
// compat: CTL-108
// compat: CTL-112
func TestPruneTypes(t *testing.T) {
	e := newEnv(t)
	now := time.Now()
	e.aged(nil, "regular", 1, now, 1, Options{})
	e.aged(nil, "internal", 1, now, 1, Options{Type: TypeInternal})
	e.aged(nil, "frontend", 1, now, 1, Options{Type: TypeFrontend})
	held := e.layer(nil, Options{Description: "held"}, "x=1")
	e.persist(held)
	if got := e.names("shared"); len(got) > 0 { // there is no store of images
		t.Errorf("shared: %q", got) // compat: CTL-105
	}
	if got := e.prune(PruneOptions{Filters: []string{"description==internal"}}); got != nil {
		t.Errorf("removed %q without all", got)
	}
	if got := e.prune(PruneOptions{}); !slices.Equal(got, []string{"regular"}) {
		t.Errorf("removed %q", got)
	}
	if got := e.prune(PruneOptions{All: true, Filters: []string{"type==frontend"}}); !slices.Equal(got, []string{"frontend"}) {
		t.Errorf("removed %q", got)
	}
	if got := e.prune(PruneOptions{All: true}); !slices.Equal(got, []string{"internal"}) {
		t.Errorf("removed %q", got)
	}
	held.Release()
	e.prune(PruneOptions{All: true})
	e.empty()
}

func TestPruneByAge(t *testing.T) {
	e := newEnv(t)
	now := time.Now()
	e.aged(nil, "old", 1, now.Add(-time.Hour), 9, Options{})
	e.aged(nil, "new", 1, now, 1, Options{})
	e.aged(nil, "crashed", 1, time.Time{}, 0, Options{})
	if got := e.prune(PruneOptions{KeepDuration: time.Minute}); !slices.Equal(got, []string{"old"}) {
		t.Errorf("removed %q", got)
	}
}

// compat: CTL-110
func TestEvictionOrder(t *testing.T) {
	e := newEnv(t)
	now := time.Now()
	ago := func(h int) time.Time { return now.Add(-time.Duration(h) * time.Hour) }
	e.aged(nil, "old and rare", 8, ago(9), 1, Options{})
	e.aged(nil, "old and often", 8, ago(8), 50, Options{})
	e.aged(nil, "new and rare", 8, ago(2), 2, Options{})
	e.aged(nil, "new and often", 8, ago(1), 60, Options{})
	total := int64(0)
	for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
		total += u.Size
	}
	var got []string
	for keep := total - 1; keep > 0; {
		removed := e.prune(PruneOptions{MaxUsedSpace: keep})
		got = append(got, removed...)
		left := int64(0)
		for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
			left += u.Size
		}
		if len(removed) != 1 || left > keep {
			t.Fatalf("keep %d: removed %q, %d left", keep, removed, left)
		}
		keep = left - 1
	}
	// Ranks add up: 1/4+1/4, 2/4+3/4, 3/4+2/4 (equal; then by id), 1+1.
	if got[0] != "old and rare" || got[3] != "new and often" {
		t.Errorf("order %q", got)
	}
}

// compat: CTL-111
func TestChildrenGoFirst(t *testing.T) {
	e := newEnv(t)
	var top *Ref
	var want []string
	for i := range 30 {
		name := fmt.Sprintf("l%02d", i)
		// The lower, the older: by rank alone the base would go first.
		id := e.aged(top, name, 1, time.Unix(int64(i), 0), 1, Options{})
		top.Release()
		top = get(e.m.Get(t.Context(), id))(t)
		want = append(want, name)
	}
	if got := e.prune(PruneOptions{}); got != nil {
		t.Errorf("removed %q below what is in use", got)
	}
	top.Release()
	slices.Reverse(want)
	if got := e.prune(PruneOptions{}); !slices.Equal(got, want) {
		t.Errorf("removed %q", got)
	}
	e.empty()
}

// compat: CTL-109
func TestSpaceTargets(t *testing.T) {
	const gb = int64(1) << 30
	tests := map[string]struct {
		opts        PruneOptions
		total, free int64
		keep        int64
	}{
		"max":                      {PruneOptions{MaxUsedSpace: 5 * gb}, 9 * gb, 0, 5 * gb},
		"reserved only":            {PruneOptions{ReservedSpace: 2 * gb}, 9 * gb, 0, 2 * gb},
		"reserved above max":       {PruneOptions{MaxUsedSpace: 5 * gb, ReservedSpace: 7 * gb}, 9 * gb, 0, 7 * gb},
		"disk short":               {PruneOptions{MaxUsedSpace: 8 * gb, MinFreeSpace: 4 * gb}, 9 * gb, 1 * gb, 6 * gb},
		"disk short, max is lower": {PruneOptions{MaxUsedSpace: 5 * gb, MinFreeSpace: 4 * gb}, 9 * gb, 1 * gb, 5 * gb},
		"disk short, reserved":     {PruneOptions{MaxUsedSpace: 8 * gb, MinFreeSpace: 9 * gb, ReservedSpace: 3 * gb}, 9 * gb, 0, 3 * gb},
		"only min free, short":     {PruneOptions{MinFreeSpace: 4 * gb}, 9 * gb, 3 * gb, 8 * gb},
		"only min free, satisfied": {PruneOptions{MinFreeSpace: 4 * gb}, 9 * gb, 5 * gb, 9 * gb},
		"more short than there is": {PruneOptions{MinFreeSpace: 40 * gb}, 9 * gb, 5 * gb, 0},
		"max with free satisfied":  {PruneOptions{MaxUsedSpace: 8 * gb, MinFreeSpace: 4 * gb}, 9 * gb, 5 * gb, 8 * gb},
	}
	for name, tc := range tests {
		m := newManager(Config{})
		m.free = func(context.Context) (int64, error) { return tc.free, nil }
		if got := get(m.target(t.Context(), tc.opts, tc.total))(t); got != tc.keep {
			t.Errorf("%s: keep %d, want %d", name, got, tc.keep)
		}
	}
}

func TestPruneByFreeSpace(t *testing.T) {
	e := newEnv(t)
	for i := range 10 {
		e.aged(nil, fmt.Sprint(i), 100, time.Unix(int64(i), 0), 1, Options{})
	}
	free := int64(1 << 30)
	e.m.free = func(context.Context) (int64, error) { return free, nil }
	if got := e.prune(PruneOptions{MinFreeSpace: free}); got != nil {
		t.Errorf("removed %q though enough is free", got)
	}
	if got := e.prune(PruneOptions{MinFreeSpace: free + 150<<10}); !slices.Equal(got, []string{"0", "1"}) {
		t.Errorf("removed %q", got)
	}
	boom := errors.New("statfs")
	e.m.free = func(context.Context) (int64, error) { return 0, boom }
	if err := e.m.Prune(t.Context(), PruneOptions{MinFreeSpace: 1}, nil); !errors.Is(err, boom) {
		t.Errorf("error %v", err)
	}
	if got := get(e.m.freeSpace(t.Context()))(t); got <= 0 {
		t.Errorf("free space %d", got)
	}
}

// Hundreds of records in chains and trees go in batches; the key store hears
// of each inside the batch, and an error or a cancelled context stops it with
// the cache whole.
func TestPruneMany(t *testing.T) {
	e := newEnv(t)
	const n = 600
	var tops []*Ref
	b := &store.Batch{}
	for i := range n {
		var parent *Ref
		if i%7 != 0 {
			parent = tops[i-1-i%3%i]
		}
		u := get(e.m.New(t.Context(), parent, Options{Description: fmt.Sprint(i)}))(t)
		r := get(u.Commit(t.Context()))(t)
		must(t, r.Persist(b))
		tops = append(tops, r)
	}
	e.db.Write(b)
	for _, r := range tops {
		r.Release()
	}
	forgotten := map[string]bool{}
	e.m.OnRemove(func(b *store.Batch, ids []string) map[string][]string {
		for _, id := range ids {
			forgotten[id] = true
			b.Delete("test", id)
		}
		return nil
	})
	boom := errors.New("client is gone")
	seen := 0
	err := e.m.Prune(t.Context(), PruneOptions{All: true}, func(Usage) error {
		if seen++; seen == 10 {
			return boom
		}
		return nil
	})
	if !errors.Is(err, boom) {
		t.Fatalf("error %v", err)
	}
	e.check()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.m.Prune(ctx, PruneOptions{All: true}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	e.check()
	before := len(forgotten)
	rest := e.prune(PruneOptions{All: true})
	if len(rest)+before != n || len(forgotten) != n {
		t.Errorf("%d and %d removed, %d forgotten", before, len(rest), len(forgotten))
	}
	e.empty()
	e.restart()
	e.empty()
}

// What comes into use between the plan and the deed stays.
func TestPruneRace(t *testing.T) {
	e := newEnv(t)
	a := e.aged(nil, "a", 1, time.Unix(1, 0), 1, Options{})
	ra := get(e.m.Get(t.Context(), a))(t)
	b := e.aged(ra, "b", 1, time.Unix(2, 0), 1, Options{})
	ra.Release()
	entries := e.m.survey()
	slices.Reverse(entries) // the child first
	rb := get(e.m.Get(t.Context(), b))(t)
	must(t, e.m.evict(entries, "", func(u Usage) error { t.Errorf("removed %s", u.Description); return nil }))
	e.wantFiles(rb, "a="+strings.Repeat("x", 1<<10), "b="+strings.Repeat("x", 1<<10))
	rb.Release()
	must(t, e.m.evict(entries, "", nil))
	if _, err := e.m.Get(t.Context(), a); !errors.Is(err, ErrNotFound) {
		t.Errorf("a reader that lost the race got %v", err)
	}
	e.empty()
}

func TestPruneFilterError(t *testing.T) {
	e := newEnv(t)
	if err := e.m.Prune(t.Context(), PruneOptions{Filters: []string{"=="}}, nil); err == nil {
		t.Error("accepted")
	}
}

func TestOpenDropsWhatLostItsFiles(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	a := e.aged(nil, "a", 1, time.Now(), 1, Options{})
	ra := get(e.m.Get(t.Context(), a))(t)
	b := e.aged(ra, "b", 1, time.Now(), 1, Options{})
	ra.Release()
	c := e.aged(nil, "c", 1, time.Now(), 1, Options{})
	lazy := e.pull(src, src.add(t, "gzip", tarOf(t, "x=1")))
	e.persist(lazy)
	lazy.Release()
	e.m.mu.Lock()
	snap := e.m.records[a].snap
	e.m.mu.Unlock()
	batch := &store.Batch{}
	batch.Put(bucketRecords, "damaged", []byte("{"))
	batch.Put(bucketRecords, "orphan", []byte(`{"p":["nobody"],"c":1}`))
	batch.Put(bucketMetadata, "orphan/k", []byte(`x`))
	e.db.Write(batch)
	must(t, e.m.Close())
	// Somebody removes the snapshot of a, record and all.
	batch = &store.Batch{}
	batch.Delete("snapshot", snap)
	e.db.Write(batch)
	must(t, e.db.Sync(t.Context()))
	e.down()
	e.open()
	for _, id := range []string{a, b, "damaged", "orphan"} {
		if _, err := e.m.Get(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", id, err)
		}
		if !strings.Contains(e.logged(), id) {
			t.Errorf("nothing was logged about %s", id)
		}
	}
	for _, id := range []string{c, lazy.ID()} {
		get(e.m.Get(t.Context(), id))(t).Release()
	}
	e.check()
}

func TestOpenSweeps(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	l := src.add(t, "gzip", tarOf(t, "x=1"))
	r := e.pull(src, l)
	must(t, r.Extract(t.Context()))
	u := get(e.m.New(t.Context(), r, Options{}))(t)
	e.write(u, "y=2")
	kept := e.aged(nil, "kept", 1, time.Now(), 1, Options{})
	e.crash()
	e.check()
	rep := get(e.m.Check(t.Context(), false))(t)
	if rep.Records != 1 || rep.Snapshots != 1 || rep.Blobs != 0 {
		t.Errorf("left %+v", *rep)
	}
	if _, err := os.Stat(filepath.Join(e.root, "blobs", "sha256", l.Blob.Digest.Encoded())); err == nil {
		t.Error("the blob of a record that was never persisted is still there")
	}
	get(e.m.Get(t.Context(), kept))(t).Release()
}

func TestCheckFindsWhatIsWrong(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	l := src.add(t, "uncompressed", tarOf(t, "x=1"))
	r := e.pull(src, l)
	must(t, r.Extract(t.Context()))
	e.persist(r)
	problems := func(part string) {
		t.Helper()
		rep := get(e.m.Check(t.Context(), true))(t)
		if !slices.ContainsFunc(rep.Problems, func(p string) bool { return strings.Contains(p, part) }) {
			t.Errorf("nothing about %q in %q", part, rep.Problems)
		}
	}
	must(t, e.snaps.Prepare(t.Context(), "stray", ""))
	problems("snapshot stray belongs to no record")
	b := &store.Batch{}
	must(t, e.snaps.Remove(b, "stray"))
	e.db.Write(b)

	d := digest.FromString("nobody's")
	w := get(e.blobs.Create())(t)
	get(w.Write([]byte("nobody's")))(t)
	get(w.Commit(0, d))(t)
	problems(d.String())
	b = &store.Batch{}
	must(t, e.blobs.Remove(b, d))
	e.db.Write(b)

	path := filepath.Join(e.root, "blobs", "sha256", l.Blob.Digest.Encoded())
	data := get(os.ReadFile(path))(t)
	must(t, os.Chmod(path, 0o600))
	must(t, os.WriteFile(path, append([]byte("!"), data[1:]...), 0o600))
	problems("doesn't match its digest")
	must(t, os.WriteFile(path, data, 0o600))

	e.m.mu.Lock()
	r.r.children++
	e.m.mu.Unlock()
	problems("counts 1 children and has 0")
	e.m.mu.Lock()
	r.r.children--
	e.m.mu.Unlock()

	b = &store.Batch{}
	b.Put(bucketRecords, "ghost", []byte("{}"))
	e.db.Write(b)
	problems("ghost")
	b = &store.Batch{}
	b.Delete(bucketRecords, "ghost")
	e.db.Write(b)
	r.Release()
}
