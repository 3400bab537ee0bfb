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

// plan returns the records to remove, in order.
func (m *Manager) plan(ctx context.Context, entries []*entry, opts PruneOptions, filter filters.Filter) ([]*entry, error) {
	may := candidates(entries, opts, filter)
	if len(may) == 0 {
		return nil, nil
	}
	sized := may
	if opts.limited() {
		sized = entries
	}
	if err := m.measure(ctx, sized); err != nil {
		return nil, err
	}
	s := newSimulation(entries, rank(may))
	if !opts.limited() {
		return s.evict(0), nil
	}
	keep, err := m.target(ctx, opts, s.total)
	if err != nil {
		return nil, err
	}
	if s.total <= keep {
		return nil, nil
	}
	return s.evict(s.total - keep), nil
}

// simulation is what remains while records are chosen one after another.
type simulation struct {
	total    int64 // bytes of records that no image shares
	scores   map[*entry]float64
	entries  map[*record]*entry
	children map[*record]int
	blobUse  map[digest.Digest]int
	ready    evictQueue // may go next
}

func newSimulation(entries []*entry, scores map[*entry]float64) *simulation {
	s := &simulation{
		scores:   scores,
		entries:  make(map[*record]*entry, len(entries)),
		children: map[*record]int{},
		blobUse:  map[digest.Digest]int{},
	}
	for _, e := range entries {
		s.entries[e.r] = e
		if !e.usage.Shared {
			s.total += e.usage.Size
		}
		for _, n := range e.needs {
			s.children[n]++
		}
		for _, d := range e.blobs {
			s.blobUse[d]++
		}
	}
	for e, score := range scores {
		if s.children[e.r] == 0 {
			s.ready = append(s.ready, ranked{e, score})
		}
	}
	heap.Init(&s.ready)
	return s
}

// evict chooses records until they free that many bytes, or all if it is 0.
func (s *simulation) evict(bytes int64) (order []*entry) {
	for freed := int64(0); s.ready.Len() > 0 && (bytes == 0 || freed < bytes); {
		e := heap.Pop(&s.ready).(ranked).entry
		order = append(order, e)
		freed += s.remove(e)
	}
	return order
}

// remove returns what is freed, in bytes that count.
func (s *simulation) remove(e *entry) (freed int64) {
	if !e.usage.Shared {
		freed = max(e.snapSize, 0)
	}
	for i, d := range e.blobs {
		if s.blobUse[d]--; s.blobUse[d] == 0 && !e.usage.Shared {
			freed += e.sizes[i]
		}
	}
	for _, n := range e.needs {
		s.children[n]--
		below := s.entries[n]
		if score, ok := s.scores[below]; ok && s.children[n] == 0 {
			heap.Push(&s.ready, ranked{below, score})
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

// candidates are the entries that opts allow to go.
func candidates(entries []*entry, opts PruneOptions, filter filters.Filter) []*entry {
	cutoff := time.Now().Add(-opts.KeepDuration)
	var out []*entry
	for _, e := range entries {
		u := &e.usage
		used := u.LastUsedAt
		if used.IsZero() {
			used = u.CreatedAt // by a process that didn't live to note the use
		}
		switch {
		case u.InUse, !opts.covers(u):
		case opts.KeepDuration > 0 && used.After(cutoff):
		case filter.Match(adapt(u)):
			out = append(out, e)
		}
	}
	return out
}

// covers reports whether records of this kind may go (CTL-108).
func (o *PruneOptions) covers(u *Usage) bool {
	return o.All || !u.Shared && u.Type != TypeInternal && u.Type != TypeFrontend
}

// rank scores entries, lowest first to go: by where they stand in the order of
// last use plus where they stand in the order of use counts, each from 0 to 1.
func rank(entries []*entry) map[*entry]float64 {
	score := make(map[*entry]float64, len(entries))
	add := func(compare func(a, b *entry) int) {
		sorted := slices.Clone(entries)
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
			score[e] += place[i] / last
		}
	}
	add(func(a, b *entry) int { return a.usage.LastUsedAt.Compare(b.usage.LastUsedAt) })
	add(func(a, b *entry) int { return cmp.Compare(a.usage.UsageCount, b.usage.UsageCount) })
	return score
}

// ranked is an entry that may go now, since nothing builds on it any more.
type ranked struct {
	*entry
	score float64
}

// evictQueue is a heap of entries, the next to go first.
type evictQueue []ranked

func (q evictQueue) Len() int { return len(q) }
func (q evictQueue) Less(i, j int) bool {
	if q[i].score != q[j].score {
		return q[i].score < q[j].score
	}
	return q[i].usage.ID < q[j].usage.ID
}
func (q evictQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *evictQueue) Push(x any)   { *q = append(*q, x.(ranked)) }
func (q *evictQueue) Pop() any {
	last := len(*q) - 1
	e := (*q)[last]
	*q = (*q)[:last]
	return e
}
