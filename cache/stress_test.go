package cache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
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
