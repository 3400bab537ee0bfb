package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// Many builds, prunes and du at once: nothing breaks, nobody sees another's
// files, and nothing stays.
func TestConcurrent(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layers := threeLayers(t, src)
	pruner, stop := context.WithCancel(t.Context())
	var background sync.WaitGroup
	background.Go(func() {
		for pruner.Err() == nil {
			if err := e.m.Prune(pruner, PruneOptions{All: true}, nil); err != nil && pruner.Err() == nil {
				t.Error(err)
			}
			if _, err := e.m.DiskUsage(pruner, nil, 0); err != nil && pruner.Err() == nil {
				t.Error(err)
			}
		}
	})
	var builds sync.WaitGroup
	for i := range 6 {
		builds.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for j := range 25 {
				if err := e.build(t.Context(), src, layers, fmt.Sprintf("%d-%d", i, j), rng); err != nil {
					t.Errorf("build %d-%d: %v", i, j, err)
					return
				}
			}
		})
	}
	builds.Wait()
	stop()
	background.Wait()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

// build does what a build does: pull, run two steps, merge, export, persist,
// and look its results up again.
func (e *env) build(ctx context.Context, src BlobSource, layers []Layer, name string, rng *rand.Rand) error {
	var base *Ref
	for i, l := range layers[:1+rng.IntN(len(layers))] {
		next, err := e.m.GetByBlob(ctx, l, base, src, Options{Description: fmt.Sprint("layer ", i)})
		base.Release()
		if err != nil {
			return err
		}
		base = next
	}
	defer base.Release()
	var steps []*Ref
	defer func() {
		for _, s := range steps {
			s.Release()
		}
	}()
	for i := range 2 {
		parent := base
		if i > 0 && rng.IntN(2) == 0 {
			parent = steps[i-1]
		}
		u, err := e.m.New(ctx, parent, Options{Description: name})
		if err != nil {
			return err
		}
		e.write(u, fmt.Sprintf("step%d=%s", i, name))
		r, err := u.Commit(ctx)
		if err != nil {
			return errors.Join(err, u.Release(ctx))
		}
		steps = append(steps, r)
	}
	merged, err := e.m.Merge(ctx, steps, Options{Description: name})
	if err != nil {
		return err
	}
	steps = append(steps, merged)
	b := &store.Batch{}
	if err := merged.Persist(b); err != nil {
		return err
	}
	e.db.Write(b)
	merged.SetMetadata("name", []byte(name))
	c := Compression{Type: []string{"gzip", "zstd", "uncompressed"}[rng.IntN(3)], Force: rng.IntN(2) == 0}
	if _, err := merged.Layers(ctx, c); err != nil {
		return err
	}
	for i, s := range []string{"step0=" + name, "step1=" + name} {
		found := false
		for _, f := range e.files(merged) {
			found = found || f == s
		}
		if !found {
			return fmt.Errorf("the file of step %d is not there", i)
		}
	}
	again, err := e.m.Get(ctx, merged.ID())
	if err != nil {
		return err
	}
	again.Release()
	return nil
}

// faulty is a snapshotter whose n-th call fails.
type faulty struct {
	snapshot.Snapshotter
	mu   sync.Mutex
	left int
	hit  string
}

var errFault = errors.New("injected fault")

func (f *faulty) fault(op string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left--
	if f.left != 0 {
		return nil
	}
	f.hit = op
	return fmt.Errorf("%s: %w", op, errFault)
}

func (f *faulty) Prepare(ctx context.Context, id, parent string) error {
	if err := f.fault("prepare"); err != nil {
		return err
	}
	return f.Snapshotter.Prepare(ctx, id, parent)
}

func (f *faulty) Commit(ctx context.Context, id string) error {
	if err := f.fault("commit"); err != nil {
		return err
	}
	return f.Snapshotter.Commit(ctx, id)
}

func (f *faulty) Reopen(ctx context.Context, id string) error {
	if err := f.fault("reopen"); err != nil {
		return err
	}
	return f.Snapshotter.Reopen(ctx, id)
}

func (f *faulty) Stack(ctx context.Context, id string, layers []string) error {
	if err := f.fault("stack"); err != nil {
		return err
	}
	return f.Snapshotter.Stack(ctx, id, layers)
}

func (f *faulty) Mounts(ctx context.Context, id string, readonly bool) ([]mount.Mount, error) {
	if err := f.fault("mounts"); err != nil {
		return nil, err
	}
	return f.Snapshotter.Mounts(ctx, id, readonly)
}

func (f *faulty) Persist(b *store.Batch, id string) error {
	if err := f.fault("persist"); err != nil {
		return err
	}
	return f.Snapshotter.Persist(b, id)
}

func (f *faulty) Usage(ctx context.Context, id string) (snapshot.Usage, error) {
	if err := f.fault("usage"); err != nil {
		return snapshot.Usage{}, err
	}
	return f.Snapshotter.Usage(ctx, id)
}

// Whatever call of the snapshotter fails, the error comes out or is logged,
// and nothing leaks.
func TestFaults(t *testing.T) {
	for n := 1; ; n++ {
		e := newEnv(t)
		src := newSource()
		layers := threeLayers(t, src)[:2]
		f := &faulty{Snapshotter: e.snaps, left: n}
		e.m.snapshots = f
		err := e.scenario(src, layers)
		if f.hit == "" {
			if err != nil {
				t.Fatalf("without a fault: %v", err)
			}
			if n < 15 {
				t.Fatalf("only %d calls were made to fail", n)
			}
			return
		}
		// What can't be stored is cache lost, not a failed build.
		if !errors.Is(err, errFault) && f.hit != "persist" {
			t.Errorf("call %d, %s: error %v", n, f.hit, err)
		}
		e.check()
		must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
		e.empty()
		if t.Failed() {
			t.Fatalf("call %d, %s", n, f.hit)
		}
	}
}

// scenario uses every part of the life of records once.
func (e *env) scenario(src BlobSource, layers []Layer) (err error) {
	ctx := e.t.Context()
	var refs []*Ref
	defer func() {
		for _, r := range refs {
			r.Release()
		}
	}()
	keep := func(r *Ref, err error) (*Ref, error) {
		if err == nil {
			refs = append(refs, r)
		}
		return r, err
	}
	bottom, err := keep(e.m.GetByBlob(ctx, layers[0], nil, src, Options{}))
	if err != nil {
		return err
	}
	top, err := keep(e.m.GetByBlob(ctx, layers[1], bottom, src, Options{}))
	if err != nil {
		return err
	}
	u, err := e.m.New(ctx, top, Options{Retain: true, Index: map[string]string{"k": "v"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, u.Release(ctx)) }()
	if _, err := u.Mounts(ctx, false); err != nil {
		return err
	}
	r, err := u.Commit(ctx)
	if err != nil {
		return err
	}
	id := r.ID()
	r.Release()
	again, err := e.m.GetMutable(ctx, id)
	if err != nil {
		return err // ErrNotFound if it could not be stored
	}
	defer again.Release(ctx)
	if _, err = keep(again.Commit(ctx)); err != nil {
		return err
	}
	other, err := e.m.New(ctx, nil, Options{})
	if err != nil {
		return err
	}
	defer other.Release(ctx)
	side, err := keep(other.Commit(ctx))
	if err != nil {
		return err
	}
	m, err := keep(e.m.Merge(ctx, []*Ref{refs[2], side}, Options{}))
	if err != nil {
		return err
	}
	if _, err := m.Mounts(ctx); err != nil {
		return err
	}
	b := &store.Batch{}
	if err := m.Persist(b); err != nil {
		return err
	}
	e.db.Write(b)
	if _, err := m.Layers(ctx, Compression{Type: "zstd", Force: true}); err != nil {
		return err
	}
	_, err = e.m.DiskUsage(ctx, nil, 0)
	return err
}

func (f *faulty) Extra(ctx context.Context) (snapshot.Extra, error) {
	return f.Snapshotter.(measured).Extra(ctx)
}
