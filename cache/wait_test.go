package cache

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
)

// step makes a record, persists it, reads it and lets go of it, as a build does
// with a step: whatever lock somebody held meanwhile would make it wait for good.
func (e *env) step(name string) {
	e.t.Helper()
	r := e.layer(nil, Options{Description: name}, "f="+name)
	e.persist(r)
	get(e.m.Get(e.t.Context(), r.ID()))(e.t).Release()
	r.Release()
	get(e.m.DiskUsage(e.t.Context(), []string{"id==" + r.ID()}, 0))(e.t)
}

// However much a prune removes, a build waits for a batch of it at most: whole
// steps are built between one and the next.
func TestPruneLetsBuildsIn(t *testing.T) {
	e := newEnv(t)
	const n = 3*evictBatch + 1
	e.unused(n)
	batches, told, removed := 0, 0, 0
	e.m.snapshots = &onRemove{e.snaps, func() { removed++ }}
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, func(Usage) error {
		if told++; told%evictBatch == 1 {
			if removed == 0 || removed > evictBatch {
				t.Errorf("batch %d removed %d records", batches, removed)
			}
			e.step(fmt.Sprint("step ", batches))
			batches++
			removed = 0
		}
		return nil
	}))
	if told != n || batches != 4 {
		t.Errorf("%d records in %d batches", told, batches)
	}
	e.prune(PruneOptions{All: true})
	e.empty()
}

// unused makes n small unused records.
func (e *env) unused(n int) {
	e.t.Helper()
	for i := range n {
		r := e.layer(nil, Options{Description: fmt.Sprint(i)})
		e.persist(r)
		r.Release()
	}
}

// Whoever goes through all records, for du, prune or metrics, lets builds in
// between some and the next.
func TestSurveyLetsBuildsIn(t *testing.T) {
	e := newEnv(t)
	const n = 2*atOnce + 10
	e.unused(n)
	for name, survey := range map[string]func() int{
		"du":     func() int { return len(get(e.m.DiskUsage(t.Context(), nil, 0))(t)) },
		"totals": func() int { return e.m.Totals().Records[TypeRegular] },
	} {
		breathed := 0
		letGo := e.m.breathe
		e.m.breathe = func() {
			breathed++
			e.m.mu.Unlock()
			e.m.breathe = letGo
			r := e.layer(nil, Options{Description: "meanwhile"}, "f=x") // unpersisted: it goes again
			r.Release()
			e.m.mu.Lock()
		}
		if found := survey(); found < n || found > n+1 {
			t.Errorf("%s saw %d records of %d", name, found, n)
		}
		if breathed != 1 {
			t.Errorf("%s let go %d times", name, breathed)
		}
		e.m.breathe = letGo
	}
}

// Last uses are written in small batches, and all of them.
func TestFlushLetsBuildsIn(t *testing.T) {
	e := newEnv(t)
	const n = 2*someUsed + 10
	e.unused(n)
	must(t, e.db.Sync(t.Context())) // no batches of others are on their way
	e.m.mu.Lock()
	for _, r := range e.m.records {
		e.m.used[r] = struct{}{}
	}
	e.m.mu.Unlock()
	e.m.flush(flushSome)
	if left := len(e.m.used); left != n-someUsed {
		t.Errorf("a batch wrote %d last uses, not %d", n-left, someUsed)
	}
	rest := e.m.usedInOrder()
	if !slices.IsSortedFunc(rest, func(a, b *record) int { return cmp.Compare(a.id[:idTimeLen], b.id[:idTimeLen]) }) {
		t.Error("last uses aren't written in the order of the database")
	}
	e.m.flushUses(t.Context())
	if left := len(e.m.used); left != 0 || len(rest) != n-someUsed {
		t.Errorf("%d last uses aren't written, of %d that were to be", left, len(rest))
	}
}

// A use that ends soon after the record was written isn't written again; one that
// goes on for long, and the next one, are.
func TestUseIsWrittenOnce(t *testing.T) {
	e := newEnv(t)
	ref := e.layer(nil, Options{}, "f=x")
	r := ref.r
	e.persist(ref)
	must(t, e.db.Sync(t.Context()))
	unwritten := func() bool {
		e.m.mu.Lock()
		defer e.m.mu.Unlock()
		_, there := e.m.used[r]
		return there
	}
	ref.Release()
	if unwritten() {
		t.Error("a use that was written with its record is to be written again")
	}
	get(e.m.Get(t.Context(), r.id))(t).Release()
	if !unwritten() {
		t.Error("the second use isn't to be written")
	}
	e.m.flushUses(t.Context())
	if unwritten() {
		t.Error("the second use wasn't written")
	}
	e.m.mu.Lock()
	r.stored = use{r.stored.at - int64(useSlack), r.stored.count + 1} // as if written while it was held
	e.m.mu.Unlock()
	get(e.m.Get(t.Context(), r.id))(t).Release()
	if !unwritten() {
		t.Error("the end of a long use isn't to be written")
	}
}
