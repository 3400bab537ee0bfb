package ops

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/steplog"
	"github.com/moby/buildkit/solver/pb"
)

// namedAsker is an asker whose execution has a name.
type namedAsker struct {
	asker
	name string
}

func (n namedAsker) Identity() string { return n.name }

// fakeSupervisor runs Go functions where a supervisor would run a process.
type fakeSupervisor struct {
	run      func(ctx context.Context, p executor.Process, note []byte) error
	expected int
	done     int
}

func (f *fakeSupervisor) Expect() { f.expected++ }

func (f *fakeSupervisor) Run(ctx context.Context, p executor.Process, note []byte, _ func(steplog.Extent)) (executor.Usage, func(), error) {
	return executor.Usage{}, func() { f.done++ }, f.run(ctx, p, note)
}

var writtenRoot = &pb.Mount{Input: -1, Dest: "/", Output: 0}

func shellOp(mounts ...*pb.Mount) *pb.ExecOp {
	return &pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}}, Mounts: append([]*pb.Mount{writtenRoot}, mounts...)}
}

func TestWhatOutlivesTheDaemon(t *testing.T) {
	b := newExecBench(t, nil)
	identity := func(op *pb.ExecOp, who namedAsker, change func(e *execOp)) string {
		t.Helper()
		e := b.op(op, 0, nil)
		if change != nil {
			change(e)
		}
		id, err := e.identity(who)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	who := namedAsker{name: "a"}
	if id := identity(shellOp(), who, nil); id != "" {
		t.Error("a step outlives a daemon without a supervisor")
	}
	b.cfg.Supervisor = &fakeSupervisor{}
	plain := identity(shellOp(), who, nil)
	if plain == "" || plain != identity(shellOp(), who, nil) {
		t.Errorf("a plain step is %q", plain)
	}
	for name, other := range map[string]string{
		"another execution":  identity(shellOp(), namedAsker{name: "b"}, nil),
		"another limit":      identity(shellOp(), who, func(e *execOp) { e.limits.Step = time.Hour }),
		"another proxy":      identity(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, ProxyEnv: &pb.ProxyEnv{HttpProxy: "x"}}, Mounts: []*pb.Mount{writtenRoot}}, who, nil),
		"with a cache mount": identity(shellOp(&pb.Mount{Dest: "/c", Input: -1, Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}}), who, nil),
	} {
		if other == "" || other == plain {
			t.Errorf("%s: %q", name, other)
		}
	}
	secret := &pb.Mount{Dest: "/s", Input: -1, Output: -1, MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s"}}
	agent := &pb.Mount{Dest: "/a", Input: -1, Output: -1, MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "default"}}
	variable := shellOp()
	variable.Secretenv = []*pb.SecretEnv{{ID: "s", Name: "S"}}
	for name, id := range map[string]string{
		"a secret file": identity(shellOp(secret), who, nil), "an agent": identity(shellOp(agent), who, nil), "a secret variable": identity(variable, who, nil),
		"nobody knows it": func() string { id, _ := b.op(shellOp(), 0, nil).identity(who.asker); return id }(),
	} {
		if id != "" {
			t.Errorf("%s: outlives the daemon", name)
		}
	}
}

// What is told of a step is all that the next daemon needs, and the supervisor
// hears when the result is safe.
func TestNoteOfStep(t *testing.T) {
	b := newExecBench(t, nil)
	base := b.ref(nil, fileSet{"f": "1"})
	var n stepNote
	sup := &fakeSupervisor{}
	sup.run = func(_ context.Context, _ executor.Process, note []byte) error {
		if sup.expected != 1 {
			t.Errorf("a step was expected %d times when it began", sup.expected)
		}
		return json.Unmarshal(note, &n)
	}
	b.cfg.Supervisor = sup
	op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}}, Mounts: []*pb.Mount{
		{Input: 0, Dest: "/", Output: 0},
		{Input: 0, Dest: "/ro", Output: 1, Readonly: true},
		{Input: -1, Dest: "/scratch", Output: -1},
		{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}},
	}}, 1, nil)
	out, err := op.Exec(t.Context(), namedAsker{name: "a"}, results(base))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range out {
		r.Release()
	}
	if len(n.Layers) != 3 || n.Layers[0].Written == nil || n.Layers[0].Written.Parent != base.ID() || n.Layers[1].Ref != base.ID() ||
		n.Layers[2].Written == nil || n.Layers[2].Mount != 2 || n.Layers[2].Written.Parent != "" {
		t.Errorf("layers %+v", n.Layers)
	}
	if len(n.Caches) != 1 || n.Caches[0].ID != "c" || !n.Caches[0].Shared || n.Identity == "" {
		t.Errorf("note %+v", n)
	}
	if sup.done != 1 {
		t.Errorf("the supervisor was told %d times that the result is safe", sup.done)
	}
}

// A step that is left keeps what it writes to and gives back all else; the test's
// cache has no handle left in the end.
func TestLeftStep(t *testing.T) {
	b := newExecBench(t, nil)
	base := b.ref(nil, fileSet{"f": "1"})
	var n stepNote
	b.cfg.Supervisor = &fakeSupervisor{run: func(_ context.Context, _ executor.Process, note []byte) error {
		return errors.Join(supervisor.ErrLeft, context.Canceled, json.Unmarshal(note, &n))
	}}
	op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}}, Mounts: []*pb.Mount{{Input: 0, Dest: "/", Output: 0}}}, 1, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := op.Exec(ctx, namedAsker{name: "a"}, results(base)); !errors.Is(err, supervisor.ErrLeft) {
		t.Fatalf("error %v", err)
	}
	ref, err := b.cache.Get(t.Context(), base.ID())
	if err != nil {
		t.Fatalf("its input is gone: %v", err)
	}
	ref.Release()
	if _, err := os.Stat(filepath.Join(b.root, "snapshots", n.Layers[0].Written.Snapshot, "fs")); err != nil {
		t.Errorf("what it writes to is gone: %v", err)
	}
}

// interrupt makes the loader hold a step that uses a ref and a cache mount.
func (b *execBench) interrupt(t *testing.T, unclaimed time.Duration, layers ...noteLayer) *cache.Ref {
	t.Helper()
	ref := b.ref(nil, fileSet{"f": "1"})
	dir, err := b.caches.acquire(t.Context(), cacheWant{id: "c", sharing: pb.CacheSharingOpt_LOCKED})
	if err != nil {
		t.Fatal(err)
	}
	note, err := json.Marshal(stepNote{
		Identity: "it", Layers: append(layers, noteLayer{Ref: ref.ID()}), Caches: []noteCache{{Record: dir.mutable.ID(), Key: "c", ID: "c"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.caches.release(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	b.TakeUp(t.Context(), []*supervisor.Earlier{{Steps: []supervisor.Step{{ID: "step", Note: note}}}}, unclaimed)
	return ref
}

// free fails unless somebody else gets the cache mount, in the end.
func (b *execBench) free(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir, err := b.caches.acquire(ctx, cacheWant{id: "c", sharing: pb.CacheSharingOpt_LOCKED})
	if err != nil {
		t.Fatalf("the cache mount is not given back: %v", err)
	}
	if err := b.caches.release(ctx, dir); err != nil {
		t.Error(err)
	}
}

// taken reports whether the cache mount is in use.
func (b *execBench) taken(t *testing.T) bool {
	t.Helper()
	k := b.caches.enter("c", "c")
	defer b.caches.leave(k)
	_, wait, err := b.caches.tryAcquire(t.Context(), k, cacheWant{id: "c", sharing: pb.CacheSharingOpt_LOCKED})
	if err != nil {
		t.Fatal(err)
	}
	return wait != nil
}

func TestTakeUp(t *testing.T) {
	t.Run("claimed", func(t *testing.T) {
		b := newExecBench(t, nil)
		b.interrupt(t, time.Hour)
		if !b.taken(t) || !b.interrupted.has("it") || b.interrupted.claim("other") != nil || b.interrupted.claim("") != nil {
			t.Error("it isn't held, or is given to others")
		}
		i := b.interrupted.claim("it")
		if i == nil || len(i.layers) != 1 || b.interrupted.claim("it") != nil {
			t.Fatalf("claimed %+v", i)
		}
		if err := i.end(t.Context()); err != nil {
			t.Error(err)
		}
		b.free(t)
	})
	t.Run("never claimed", func(t *testing.T) {
		b := newExecBench(t, nil)
		b.interrupt(t, time.Nanosecond)
		b.free(t)
		if err := b.Loader.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("the daemon ends", func(t *testing.T) {
		b := newExecBench(t, nil)
		b.interrupt(t, time.Hour)
		if err := b.Loader.Close(); err != nil {
			t.Error(err)
		}
		b.free(t)
	})
	t.Run("something is missing", func(t *testing.T) {
		b := newExecBench(t, nil)
		b.interrupt(t, time.Hour, noteLayer{Written: &cache.Interrupted{Snapshot: "gone"}})
		if b.interrupted.has("it") {
			t.Error("a step goes on though what it writes to is gone")
		}
		b.free(t)
	})
	t.Run("it has ended since", func(t *testing.T) {
		b := newExecBench(t, nil)
		b.interrupt(t, time.Hour)
		ran := 0
		b.cfg.Supervisor = &fakeSupervisor{run: func(context.Context, executor.Process, []byte) error { ran++; return nil }}
		op := b.op(shellOp(), 0, nil)
		id, err := op.identity(namedAsker{name: "a"})
		if err != nil {
			t.Fatal(err)
		}
		i := b.interrupted.claim("it")
		b.interrupted.mu.Lock()
		b.interrupted.steps[id] = i
		b.interrupted.mu.Unlock()
		out, err := op.Exec(t.Context(), namedAsker{name: "a"}, nil)
		if err != nil || ran != 1 {
			t.Errorf("ran %d times: %v", ran, err)
		}
		for _, r := range out {
			r.Release()
		}
		b.free(t)
	})
}
