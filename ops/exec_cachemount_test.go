package ops

import (
	"context"
	"errors"
	"maps"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/moby/buildkit/solver/pb"
)

func cacheMount(dest, id string, sharing pb.CacheSharingOpt) *pb.Mount {
	return &pb.Mount{Input: -1, Dest: dest, Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: id, Sharing: sharing}}
}

func mustAcquire(t *testing.T, c *cacheMounts, want cacheWant) *cacheDir {
	t.Helper()
	dir, err := c.acquire(context.Background(), want)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func mustRelease(t *testing.T, c *cacheMounts, dirs ...*cacheDir) {
	t.Helper()
	for _, dir := range dirs {
		if err := c.release(context.Background(), dir); err != nil {
			t.Error(err)
		}
	}
	if n := len(c.keys); n != 0 {
		t.Errorf("%d keys are still known", n)
	}
}

// compat: LLB-044
func TestCacheMountPersists(t *testing.T) {
	runs := 0
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		got := tree(t, at["/c"])
		if want := map[int]fileSet{0: {}, 1: {"n": "0"}}[runs]; !maps.Equal(got, want) {
			t.Errorf("run %d finds %v, want %v", runs, got, want)
		}
		write(t, at["/c"]+"n", "0")
		runs++
		return nil
	})
	op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, cacheMount("/c", "mine", pb.CacheSharingOpt_SHARED)}}, 0, nil)
	b.run(op, asker{})
	b.run(op, asker{})
	usage, err := b.cache.DiskUsage(context.Background(), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, u := range usage {
		if u.Type == cache.TypeCacheMount {
			found++
			if want := `cached mount /c from exec run it with id "mine"`; u.Description != want {
				t.Errorf("description is %q, want %q", u.Description, want)
			}
		}
	}
	if found != 1 {
		t.Errorf("%d cache mounts are kept, want 1", found)
	}
}

// compat: LLB-044
// A mount that is based on an input starts with its content, is kept apart from
// one with another base, and never changes the input.
func TestCacheMountOnBase(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, p executor.Process, at map[string]string) error {
		write(t, at["/c"]+"out", p.Args[0]+tree(t, at["/c"])["out"])
		return nil
	})
	one, two := b.ref(nil, fileSet{"base": "1"}), b.ref(nil, fileSet{"base": "2"})
	step := func(name string, base *cache.Ref) fileSet {
		m := cacheMount("/c", "id", pb.CacheSharingOpt_SHARED)
		m.Input, m.Output = 0, 1
		op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{name}}, Mounts: []*pb.Mount{scratchRoot, m}}, 1, nil)
		out := b.run(op, asker{}, base)
		if out[1].ID() != base.ID() {
			t.Errorf("the output of a cache mount is %s, want its base %s", out[1].ID(), base.ID())
		}
		dir := mustAcquire(t, b.caches, cacheWant{id: "id", base: base, sharing: pb.CacheSharingOpt_SHARED})
		defer mustRelease(t, b.caches, dir)
		view, err := dir.mutable.Open(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer view.Close()
		return tree(t, view.Path()+"/")
	}
	for _, c := range []struct {
		name string
		base *cache.Ref
		want fileSet
	}{
		{"a", one, fileSet{"base": "1", "out": "a"}},
		{"b", two, fileSet{"base": "2", "out": "b"}},
		{"c", one, fileSet{"base": "1", "out": "ca"}},
	} {
		if got := step(c.name, c.base); !maps.Equal(got, c.want) {
			t.Errorf("after %s the mount holds %v, want %v", c.name, got, c.want)
		}
	}
	wantFiles(t, "base", Result{one}, fileSet{"base": "1"})
}

// compat: LLB-045
// Two steps at once see each other's files, also in a mount with a base, which
// is an overlay that must not be mounted twice.
func TestCacheMountShared(t *testing.T) {
	for _, withBase := range []bool{false, true} {
		var wrote sync.WaitGroup
		wrote.Add(2)
		b := newExecBench(t, func(_ context.Context, p executor.Process, at map[string]string) error {
			write(t, at["/c"]+p.Args[0], "x")
			wrote.Done()
			wrote.Wait()
			if got := tree(t, at["/c"]); got["a"] != "x" || got["b"] != "x" {
				t.Errorf("step %s sees %v", p.Args[0], got)
			}
			return nil
		})
		base := b.ref(nil, fileSet{"base": "1"})
		var steps sync.WaitGroup
		for _, name := range []string{"a", "b"} {
			m := cacheMount("/c", "id", pb.CacheSharingOpt_SHARED)
			if withBase {
				m.Input = 0
			}
			op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{name}}, Mounts: []*pb.Mount{scratchRoot, m}}, 1, nil)
			steps.Go(func() {
				out, err := op.Exec(context.Background(), asker{}, results(base))
				if err != nil {
					t.Error(err)
					return
				}
				out[0].Release()
			})
		}
		steps.Wait()
	}
}

// compat: LLB-045
func TestCacheMountPrivate(t *testing.T) {
	c := newCacheMounts(newTestCache(t))
	want := cacheWant{id: "p", sharing: pb.CacheSharingOpt_PRIVATE}
	one, two := mustAcquire(t, c, want), mustAcquire(t, c, want)
	if one.mutable.ID() == two.mutable.ID() {
		t.Error("two users at once got the same directory")
	}
	ids := []string{one.mutable.ID(), two.mutable.ID()}
	mustRelease(t, c, one, two)
	one, two = mustAcquire(t, c, want), mustAcquire(t, c, want)
	again := []string{one.mutable.ID(), two.mutable.ID()}
	if !(again[0] == ids[0] && again[1] == ids[1] || again[0] == ids[1] && again[1] == ids[0]) {
		t.Errorf("directories %q weren't used again but %q", ids, again)
	}
	mustRelease(t, c, one, two)
}

// compat: LLB-045
func TestCacheMountLocked(t *testing.T) {
	ctx := context.Background()
	c := newCacheMounts(newTestCache(t))
	want := cacheWant{id: "l", sharing: pb.CacheSharingOpt_LOCKED}
	for _, first := range []pb.CacheSharingOpt{pb.CacheSharingOpt_LOCKED, pb.CacheSharingOpt_SHARED} {
		holder := mustAcquire(t, c, cacheWant{id: "l", sharing: first})
		dir, wait, err := c.tryAcquire(ctx, holder.key, want)
		if dir != nil || wait == nil || err != nil {
			t.Fatalf("while it is %s: got %v, %v, want something to wait for", first, dir, err)
		}
		got := make(chan *cacheDir)
		var waiter sync.WaitGroup
		waiter.Go(func() {
			dir, err := c.acquire(ctx, want)
			if err != nil {
				t.Error(err)
			}
			got <- dir
		})
		id := holder.mutable.ID()
		if err := c.release(ctx, holder); err != nil {
			t.Fatal(err)
		}
		<-wait // closed
		next := <-got
		waiter.Wait()
		if next.mutable.ID() != id {
			t.Errorf("the next user got %s, want %s", next.mutable.ID(), id)
		}
		mustRelease(t, c, next)
	}
}

// compat: LLB-045
func TestCacheMountLockedCanBeCancelled(t *testing.T) {
	c := newCacheMounts(newTestCache(t))
	want := cacheWant{id: "l", sharing: pb.CacheSharingOpt_LOCKED}
	holder := mustAcquire(t, c, want)
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	if _, err := c.acquire(ctx, want); !errors.Is(err, gone) {
		t.Errorf("error is %v, want %v", err, gone)
	}
	mustRelease(t, c, holder)
}

// Steps that lock two mounts do so in one order, whatever order they list them
// in: otherwise these would wait for each other in some runs.
func TestCacheMountsLockedInOrder(t *testing.T) {
	b := newExecBench(t, nil)
	var steps sync.WaitGroup
	for i := range 20 {
		m := []*pb.Mount{scratchRoot, cacheMount("/a", "a", pb.CacheSharingOpt_LOCKED), cacheMount("/b", "b", pb.CacheSharingOpt_LOCKED)}
		if i%2 == 1 {
			m[1], m[2] = m[2], m[1]
		}
		op := b.op(&pb.ExecOp{Mounts: m}, 0, nil)
		steps.Go(func() {
			out, err := op.Exec(context.Background(), asker{}, nil)
			if err != nil {
				t.Error(err)
				return
			}
			out[0].Release()
		})
	}
	steps.Wait()
}

// compat: LLB-045
func TestCacheMountOnceInAStep(t *testing.T) {
	for _, sharing := range []pb.CacheSharingOpt{pb.CacheSharingOpt_SHARED, pb.CacheSharingOpt_PRIVATE, pb.CacheSharingOpt_LOCKED} {
		b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
			write(t, at["/c"]+"f", "x")
			if got := tree(t, at["/d"]); got["f"] != "x" {
				t.Errorf("%s: the second mount holds %v", sharing, got)
			}
			return nil
		})
		b.run(b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, cacheMount("/c", "x", sharing), cacheMount("/d", "x", sharing)}}, 0, nil), asker{})
	}
}

// compat: LLB-007
func TestIgnoreCacheEmptiesCacheMounts(t *testing.T) {
	var found []fileSet
	b := newExecBench(t, func(_ context.Context, p executor.Process, at map[string]string) error {
		found = append(found, tree(t, at["/c"]))
		write(t, at["/c"]+p.Args[0], "x")
		return nil
	})
	step := func(name, id string, ignore bool, who asker) {
		b.run(b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{name}}, Mounts: []*pb.Mount{scratchRoot, cacheMount("/c", id, 0)}}, 0,
			&pb.OpMetadata{IgnoreCache: ignore}), who)
	}
	one, two := asker{&Build{}}, asker{&Build{}}
	step("a", "m", false, one)
	step("b", "m", true, one)  // emptied: nothing of a
	step("c", "m", true, one)  // once a build: b is there
	step("d", "m", false, two) // nothing is emptied
	step("e", "m", true, two)  // another build: emptied again
	step("f", "", false, one)  // without a name: by its path
	step("g", "", true, one)
	want := []fileSet{{}, {}, {"b": "x"}, {"b": "x", "c": "x"}, {}, {}, {}}
	for i := range want {
		if !maps.Equal(found[i], want[i]) {
			t.Errorf("step %d found %v, want %v", i, found[i], want[i])
		}
	}
}

// A mount in use stays with its users; the next one gets an empty one.
func TestPruneCacheMountInUse(t *testing.T) {
	ctx := context.Background()
	m := newTestCache(t)
	c := newCacheMounts(m)
	base := newRef(t, m, nil, fileSet{"base": "1"})
	defer base.Release()
	for _, want := range []cacheWant{
		{id: "s", sharing: pb.CacheSharingOpt_SHARED},
		{id: "l", sharing: pb.CacheSharingOpt_LOCKED},
		{id: "b", base: base, sharing: pb.CacheSharingOpt_SHARED},
	} {
		old := mustAcquire(t, c, want)
		if err := c.prune(ctx, want.id); err != nil {
			t.Fatal(err)
		}
		fresh := mustAcquire(t, c, want)
		if fresh.mutable.ID() == old.mutable.ID() {
			t.Errorf("%s: the old directory was handed out again", want.id)
		}
		id := old.mutable.ID()
		mustRelease(t, c, old, fresh)
		if _, err := m.GetMutable(ctx, id); !errors.Is(err, cache.ErrNotFound) {
			t.Errorf("%s: the old directory is still there: %v", want.id, err)
		}
	}
}
