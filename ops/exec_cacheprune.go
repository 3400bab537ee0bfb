package ops

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// prune removes what the cache mounts of id hold: free ones at once, those in
// use when they are given back (LLB-007).
func (c *cacheMounts) prune(ctx context.Context, id string) error {
	keys := c.enterAll(id)
	defer func() {
		for _, k := range keys {
			c.leave(k)
		}
	}()
	for _, k := range keys {
		if err := k.turn.Acquire(ctx, 1); err != nil {
			return context.Cause(ctx)
		}
		defer k.turn.Release(1)
		for _, dir := range k.dirs {
			dir.doomed = true
		}
	}
	for _, record := range c.cache.Search(cacheMountID, id) {
		mutable, err := c.cache.GetMutable(ctx, record)
		if unavailable(err) {
			continue
		}
		if err == nil {
			err = mutable.Discard(ctx)
		}
		if err != nil {
			return fmt.Errorf("empty cache mount %q: %w", id, err)
		}
	}
	return nil
}

// enterAll enters every key of id, in a fixed order: two callers that take
// their turns can't wait for each other.
func (c *cacheMounts) enterAll(id string) []*cacheKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys := []*cacheKey{c.enterLocked(id, id)}
	for name, k := range c.keys {
		if k.id == id && name != id {
			keys = append(keys, c.enterLocked(name, id))
		}
	}
	slices.SortFunc(keys, func(a, b *cacheKey) int { return strings.Compare(a.name, b.name) })
	return keys
}

// prunedMounts are the cache mounts that were emptied for a build. A build
// empties each once, before the first ignore-cache step that uses it: what one
// of its steps then leaves in it is there for the next.
type prunedMounts struct {
	mu  sync.Mutex // held while a cache mount is emptied, so that others wait for it
	ids map[string]bool
}

func (p *prunedMounts) once(id string, prune func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ids[id] {
		return nil
	}
	if err := prune(); err != nil {
		return err
	}
	if p.ids == nil {
		p.ids = map[string]bool{}
	}
	p.ids[id] = true
	return nil
}

// pruneCacheMounts empties the step's cache mounts for every build that waits
// and hasn't done so (LLB-007).
func (e *execOp) pruneCacheMounts(ctx context.Context, asker solver.Asker) error {
	for _, m := range e.op.Mounts {
		if m.MountType != pb.MountType_CACHE {
			continue
		}
		id := cacheID(m)
		for _, v := range asker.Values() {
			b, ok := v.(*Build)
			if !ok {
				continue
			}
			if err := b.pruned.once(id, func() error { return e.loader.caches.prune(ctx, id) }); err != nil {
				return err
			}
		}
	}
	return nil
}
