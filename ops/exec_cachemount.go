package ops

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/cache"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sync/semaphore"
)

// The indexes by which cache mounts are found: the exact directory, and all
// that an id has, whatever they are based on.
const (
	cacheMountKey = "cachemount.key"
	cacheMountID  = "cachemount.id"
)

// cacheMounts knows the cache mounts that steps hold now, over all builds. The
// directories themselves are retained records of the cache (LLB-044).
type cacheMounts struct {
	cache *cache.Manager

	mu   sync.Mutex // guards keys and the users of each; never held across I/O
	keys map[string]*cacheKey
}

// cacheKey is what is known of one key while somebody uses or waits for it.
type cacheKey struct {
	name  string
	id    string
	users int // of this struct

	turn  *semaphore.Weighted // one at a time looks at or changes the fields below
	dirs  []*cacheDir         // in use
	freed chan struct{}       // closed and replaced when one of dirs is given back
}

// cacheDir is a cache mount in use.
type cacheDir struct {
	key     *cacheKey
	mutable *cache.Mutable
	mounts  []mount.Mount // may be mounted any number of times
	users   int
	shared  bool
	doomed  bool // emptied meanwhile: nobody else gets it, and it is removed in the end
}

// cacheWant describes the cache mount that a step asks for.
type cacheWant struct {
	id          string
	base        *cache.Ref // nil for none
	sharing     pb.CacheSharingOpt
	description string
}

func newCacheMounts(c *cache.Manager) *cacheMounts {
	return &cacheMounts{cache: c, keys: map[string]*cacheKey{}}
}

func (w cacheWant) key() string {
	if w.base == nil {
		return w.id
	}
	return w.id + ":" + w.base.ID()
}

func (w cacheWant) shared() bool { return w.sharing == pb.CacheSharingOpt_SHARED }

// acquire returns a directory for want, which the caller gives back with
// release: one that others write to as well (shared), one that nobody else has
// (private), or the one there is, once it is free (locked) (LLB-045).
func (c *cacheMounts) acquire(ctx context.Context, want cacheWant) (*cacheDir, error) {
	k := c.enter(want.key(), want.id)
	for {
		if err := k.turn.Acquire(ctx, 1); err != nil {
			c.leave(k)
			return nil, context.Cause(ctx)
		}
		dir, wait, err := c.tryAcquire(ctx, k, want)
		k.turn.Release(1)
		if err != nil {
			c.leave(k)
			return nil, err
		}
		if dir != nil {
			return dir, nil // which keeps k
		}
		select {
		case <-wait:
		case <-ctx.Done():
			c.leave(k)
			return nil, context.Cause(ctx)
		}
	}
}

// tryAcquire returns a directory, or what to wait for. The caller has k's turn.
func (c *cacheMounts) tryAcquire(ctx context.Context, k *cacheKey, want cacheWant) (_ *cacheDir, wait <-chan struct{}, err error) {
	for _, dir := range k.dirs {
		switch {
		case dir.doomed:
		case want.shared() && dir.shared:
			dir.users++
			return dir, nil, nil
		case want.sharing == pb.CacheSharingOpt_LOCKED:
			return nil, k.freed, nil
		}
	}
	dir, err := c.open(ctx, k, want)
	if err != nil {
		return nil, nil, err
	}
	k.dirs = append(k.dirs, dir)
	return dir, nil, nil
}

// open returns a directory that nobody has, an old one if there is one. A
// record that someone other than a step holds, such as a prune, is passed
// over; one whose files are gone is removed.
func (c *cacheMounts) open(ctx context.Context, k *cacheKey, want cacheWant) (*cacheDir, error) {
	for _, id := range c.cache.Search(cacheMountKey, k.name) {
		mutable, err := c.cache.GetMutable(ctx, id)
		if unavailable(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open cache mount %q: %w", want.id, err)
		}
		mounts, err := mutable.Mounts(ctx, false)
		if errors.Is(err, cache.ErrLost) {
			if err := mutable.Discard(ctx); err != nil {
				return nil, fmt.Errorf("remove lost cache mount %q: %w", want.id, err)
			}
			continue
		}
		if err != nil {
			return nil, errors.Join(err, release(ctx, mutable))
		}
		return newCacheDir(k, mutable, mounts, want.shared()), nil
	}
	mutable, err := c.cache.New(ctx, want.base, cache.Options{
		Description: want.description,
		Type:        cache.TypeCacheMount,
		Index:       map[string]string{cacheMountKey: k.name, cacheMountID: want.id},
		Retain:      true,
	})
	if err != nil {
		return nil, err
	}
	mounts, err := mutable.Mounts(ctx, false)
	if err != nil {
		return nil, errors.Join(err, mutable.Discard(ctx))
	}
	return newCacheDir(k, mutable, mounts, want.shared()), nil
}

func newCacheDir(k *cacheKey, u *cache.Mutable, mounts []mount.Mount, shared bool) *cacheDir {
	return &cacheDir{key: k, mutable: u, mounts: mounts, users: 1, shared: shared}
}

// unavailable says whether GetMutable failed because the record is in use or
// gone.
func unavailable(err error) bool {
	return errors.Is(err, cache.ErrLocked) || errors.Is(err, cache.ErrNotFound) || errors.Is(err, cache.ErrLost)
}

// release gives dir back; the last one to do so frees it.
func (c *cacheMounts) release(ctx context.Context, dir *cacheDir) error {
	k := dir.key
	defer c.leave(k)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if err := k.turn.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("give back cache mount %q: %w", k.id, context.Cause(ctx))
	}
	defer k.turn.Release(1)
	if dir.users--; dir.users > 0 {
		return nil
	}
	err := dir.close(ctx)
	k.dirs = slices.DeleteFunc(k.dirs, func(d *cacheDir) bool { return d == dir })
	close(k.freed)
	k.freed = make(chan struct{})
	return err
}

func (d *cacheDir) close(ctx context.Context) error {
	if d.doomed {
		return d.mutable.Discard(ctx)
	}
	return d.mutable.Release(ctx)
}

// enter returns the key's struct, which the caller keeps until leave.
func (c *cacheMounts) enter(name, id string) *cacheKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.enterLocked(name, id)
}

func (c *cacheMounts) enterLocked(name, id string) *cacheKey {
	k := c.keys[name]
	if k == nil {
		k = &cacheKey{name: name, id: id, turn: semaphore.NewWeighted(1), freed: make(chan struct{})}
		c.keys[name] = k
	}
	k.users++
	return k
}

func (c *cacheMounts) leave(k *cacheKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(c.keys, k.name)
	}
}

// acquireCaches gets the step's cache mounts, in the order of their keys: two
// steps that lock the same two don't wait for each other.
func (s *mountSet) acquireCaches(ctx context.Context) error {
	var mounts []*pb.Mount
	for _, m := range s.list {
		if m.MountType == pb.MountType_CACHE {
			mounts = append(mounts, m)
		}
	}
	slices.SortStableFunc(mounts, func(a, b *pb.Mount) int {
		return strings.Compare(s.cacheWant(a).key(), s.cacheWant(b).key())
	})
	for _, m := range mounts {
		want := s.cacheWant(m)
		if s.caches[want.key()] != nil {
			continue // one key is one directory
		}
		dir, err := s.ops.caches.acquire(ctx, want)
		if err != nil {
			return fmt.Errorf("prepare mount %s: %w", m.Dest, lostInput(int(m.Input), err))
		}
		s.undo.Add(func() error { return s.ops.caches.release(ctx, dir) })
		if s.caches == nil {
			s.caches = map[string]*cacheDir{}
		}
		s.caches[want.key()] = dir
	}
	return nil
}

func (s *mountSet) cacheWant(m *pb.Mount) cacheWant {
	want := cacheWant{
		id:          cacheID(m),
		base:        s.input(m),
		sharing:     m.CacheOpt.Sharing,
		description: fmt.Sprintf("cached mount %s from %s", m.Dest, s.user),
	}
	if want.id != m.Dest {
		want.description += fmt.Sprintf(" with id %q", want.id)
	}
	return want
}

// cacheMount is source for cache mounts, which acquireCaches got.
func (s *mountSet) cacheMount(i int, m *pb.Mount) []mount.Mount {
	want := s.cacheWant(m)
	if hasOutput(m) {
		s.layers = append(s.layers, mountLayer{index: i, ref: want.base.Clone()})
	}
	return s.caches[want.key()].mounts
}

// cacheID names m's cache mount; one without a name goes by where it is.
func cacheID(m *pb.Mount) string {
	if m.CacheOpt.ID == "" {
		return m.Dest
	}
	return m.CacheOpt.ID
}
