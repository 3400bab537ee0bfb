package cache

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/opencontainers/go-digest"
)

// plan returns those of list to remove, in order.
func (m *Manager) plan(ctx context.Context, list []*entry, opts PruneOptions, filter filters.Filter) ([]*entry, error) {
	may := candidates(list, opts, filter)
	if len(may) == 0 {
		return nil, nil
	}
	sized := may
	if opts.limited() {
		sized = list
	}
	if err := m.measure(ctx, sized); err != nil {
		return nil, err
	}
	surplus := int64(0) // what has to go; 0 is everything that may
	if opts.limited() {
		total := int64(0)
		for _, e := range list {
			total += e.usage.Size
		}
		keep, err := m.target(ctx, opts, total)
		if err != nil || total <= keep {
			return nil, err
		}
		surplus = total - keep
	}
	s := newSimulation(list, may)
	rank(may)
	return s.evict(surplus), nil
}

// prospect is what a plan thinks of an entry.
type prospect struct {
	may      bool
	score    float64 // lowest first to go
	children int     // that stay so far
}

// simulation is what remains while records are chosen one after another.
type simulation struct {
	may     []*entry
	blobUse map[digest.Digest]int
	ready   evictQueue // may go next
}

func newSimulation(list, may []*entry) *simulation {
	s := &simulation{may: may, blobUse: map[digest.Digest]int{}}
	for _, e := range list {
		e.plan = prospect{}
	}
	for _, e := range list {
		for _, b := range e.below {
			if b != nil {
				b.plan.children++
			}
		}
		for _, d := range e.blobs {
			s.blobUse[d]++
		}
	}
	for _, e := range may {
		e.plan.may = true
	}
	return s
}

// evict chooses records until they free that many bytes, or all if it is 0.
func (s *simulation) evict(bytes int64) (order []*entry) {
	for _, e := range s.may {
		if e.plan.children == 0 {
			s.ready = append(s.ready, e)
		}
	}
	heap.Init(&s.ready)
	for freed := int64(0); s.ready.Len() > 0 && (bytes == 0 || freed < bytes); {
		e := heap.Pop(&s.ready).(*entry)
		order = append(order, e)
		freed += s.remove(e)
	}
	return order
}

// remove returns what is freed, in bytes that count.
func (s *simulation) remove(e *entry) (freed int64) {
	freed = max(e.snapSize, 0)
	for i, d := range e.blobs {
		if s.blobUse[d]--; s.blobUse[d] == 0 {
			freed += e.sizes[i]
		}
	}
	for _, b := range e.below {
		if b == nil {
			continue
		}
		if b.plan.children--; b.plan.children == 0 && b.plan.may {
			heap.Push(&s.ready, b)
		}
	}
	return freed
}

// target returns how many bytes of total may stay.
func (m *Manager) target(ctx context.Context, opts PruneOptions, total int64) (keep int64, err error) {
	keep = opts.MaxUsedSpace
	if opts.MinFreeSpace != 0 {
		free, err := m.free(ctx)
		if err != nil {
			return 0, err
		}
		short := opts.MinFreeSpace - free
		switch {
		case short > 0 && keep == 0:
			keep = total - short
		case short > 0:
			keep = min(keep, total-short)
		case keep == 0:
			keep = total // enough is free, and that is all that was asked for
		}
	}
	return max(keep, opts.ReservedSpace, 0), nil
}

// settler is a store that removes files later, and can wait for it.
type settler interface {
	Settle(ctx context.Context) error
}

// removed waits until what was removed is gone from disk.
func (m *Manager) removed(ctx context.Context) error {
	if err := m.db.Sync(ctx); err != nil {
		return fmt.Errorf("wait for removals: %w", err)
	}
	if s, ok := m.snapshots.(settler); ok {
		if err := s.Settle(ctx); err != nil {
			return err
		}
	}
	return m.blobs.Settle(ctx)
}

// freeSpace waits for the files of removed records to go: counted as used, they
// would cost others their place.
func (m *Manager) freeSpace(ctx context.Context) (int64, error) {
	if m.root == "" {
		return 0, fmt.Errorf("internal error: prune by free space without a root directory")
	}
	if err := m.removed(ctx); err != nil {
		return 0, err
	}
	free, _, err := m.statfs()
	return free, err
}

// candidates are those of list that opts allow to go.
func candidates(list []*entry, opts PruneOptions, filter filters.Filter) []*entry {
	cutoff := time.Now().Add(-opts.KeepDuration)
	var out []*entry
	for _, e := range list {
		u := &e.usage
		used := u.LastUsedAt
		if used.IsZero() {
			used = u.CreatedAt // by a process that didn't live to note the use
		}
		switch {
		case u.InUse, !opts.covers(u):
		case opts.KeepDuration > 0 && used.After(cutoff):
		case filter.Match((*fields)(u)):
			out = append(out, e)
		}
	}
	return out
}

// covers reports whether records of this kind may go (CTL-108).
func (o *PruneOptions) covers(u *Usage) bool {
	return o.All || u.Type != TypeInternal && u.Type != TypeFrontend
}

// rank scores the entries of list, lowest first to go: by where they stand in
// the order of last use plus where they stand in the order of use counts, each
// from 0 to 1.
func rank(list []*entry) {
	add := func(compare func(a, b *entry) int) {
		sorted := slices.Clone(list)
		slices.SortFunc(sorted, compare)
		place := make([]float64, len(sorted))
		last := 1.0
		for i := range sorted {
			if i > 0 && compare(sorted[i-1], sorted[i]) != 0 {
				last++
			}
			place[i] = last
		}
		for i, e := range sorted {
			e.plan.score += place[i] / last
		}
	}
	add(func(a, b *entry) int { return a.usage.LastUsedAt.Compare(b.usage.LastUsedAt) })
	add(func(a, b *entry) int { return cmp.Compare(a.usage.UsageCount, b.usage.UsageCount) })
}

// evictQueue is a heap of entries that may go now, since nothing builds on them
// any more; the next to go comes first.
type evictQueue []*entry

func (q evictQueue) Len() int { return len(q) }
func (q evictQueue) Less(i, j int) bool {
	if a, b := q[i].plan.score, q[j].plan.score; a != b {
		return a < b
	}
	return q[i].usage.ID < q[j].usage.ID
}
func (q evictQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *evictQueue) Push(x any)   { *q = append(*q, x.(*entry)) }
func (q *evictQueue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	*q = (*q)[:last]
	return e
}
