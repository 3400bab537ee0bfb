package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	"golang.org/x/sync/errgroup"
)

// PruneOptions say what may go (CTL-107 to -111). Sizes are bytes.
type PruneOptions struct {
	Filters       []string
	All           bool // internal and frontend records too
	KeepDuration  time.Duration
	ReservedSpace int64
	MaxUsedSpace  int64
	MinFreeSpace  int64
	Rule          string // named in the log and the journal
}

// limited reports whether there is a space target: without one, all that
// matches goes.
func (o *PruneOptions) limited() bool {
	return o.MaxUsedSpace != 0 || o.ReservedSpace != 0 || o.MinFreeSpace != 0
}

const (
	// evictBatch is how many records go in one batch. Builds that change records
	// wait for no more than that.
	evictBatch = 32
	// syncEvery is after how many batches the removal of those before them is
	// awaited, so that no commit becomes long. With four times as many a prune of
	// a big cache writes half as much, as each record of a commit costs pages of
	// its own there; but the slowest builds beside it take twice as long.
	syncEvery = 32
)

// Prune removes unused records as opts say and calls removed, unless nil, for
// each. Without a space target everything that matches goes; with one, the
// least useful records go first, until it is met. A record goes before those
// that it builds on. What comes into use in the meantime stays. When Prune
// returns, the removal is on disk. An error of removed ends it.
func (m *Manager) Prune(ctx context.Context, opts PruneOptions, removed func(Usage) error) error {
	return m.Collect(ctx, []PruneOptions{opts}, removed)
}

// Collect is Prune by several rules, one after the other.
func (m *Manager) Collect(ctx context.Context, rules []PruneOptions, removed func(Usage) error) error {
	parsed := make([]filters.Filter, len(rules))
	for i, r := range rules {
		var err error
		if parsed[i], err = filters.ParseAll(r.Filters...); err != nil {
			return fmt.Errorf("parse prune filters %q: %w", r.Filters, err)
		}
	}
	select {
	case m.pruning <- struct{}{}:
		defer func() { <-m.pruning }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	entries := m.survey()
	for i, rule := range rules {
		victims, err := m.plan(ctx, entries, rule, parsed[i])
		if err != nil {
			return err
		}
		if len(victims) == 0 {
			continue
		}
		if err := m.evictAll(ctx, victims, rule.Rule, removed); err != nil {
			return err
		}
		entries = m.survey()
	}
	m.flushUses(ctx) // of what is left
	return nil
}

// evictAll removes the entries that are still unused, and waits until that is
// on disk. While some are being written, the next are removed.
func (m *Manager) evictAll(ctx context.Context, victims []*entry, rule string, removed func(Usage) error) (err error) {
	var writing errgroup.Group
	defer func() { err = cmp.Or(err, writing.Wait()) }()
	for round := range slices.Chunk(victims, syncEvery*evictBatch) {
		for batch := range slices.Chunk(round, evictBatch) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := m.evict(batch, rule, removed); err != nil {
				return err
			}
			runtime.Gosched() // those who waited for the locks come first
		}
		if err := writing.Wait(); err != nil {
			return err
		}
		writing.Go(func() error { return m.db.Sync(ctx) })
	}
	return m.db.Sync(ctx)
}

// evict removes the entries of one batch that are still unused.
func (m *Manager) evict(batch []*entry, rule string, removed func(Usage) error) error {
	var doomed []*record
	var usages []Usage
	orphaned := map[*record]int{} // children of a record that go in this batch
	m.mu.Lock()
	for _, e := range batch {
		r := e.r
		if r.state == gone || r.handles > 0 || r.id != e.usage.ID || r.children > orphaned[r] {
			continue
		}
		for _, n := range r.needs() {
			orphaned[n]++
		}
		m.forgetLocked(r)
		r.rule, r.freed = rule, e.usage.Size
		doomed = append(doomed, r)
		usages = append(usages, e.usage)
	}
	m.mu.Unlock()
	if len(doomed) == 0 {
		return nil
	}
	err := m.remove(doomed)
	for _, u := range usages {
		m.log.Info("evicted cache record", "record", u.ID, "size", u.Size, "description", u.Description, "rule", rule)
		if removed == nil {
			continue
		}
		if rerr := removed(u); rerr != nil {
			return errors.Join(rerr, err)
		}
	}
	return err
}
