package cache

import (
	"context"
	"maps"
	"testing"
)

func TestTotals(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	lazy := e.pull(src, src.add(t, "gzip", tarOf(t, "l=1")))
	a := e.layer(nil, Options{}, "a=1")
	b := e.layer(a, Options{Type: TypeFrontend}, "b=1")
	e.persist(a, b)
	got := e.m.Totals()
	if want := map[RecordType]int{TypeRegular: 2, TypeFrontend: 1}; !maps.Equal(got.Records, want) {
		t.Errorf("records %v, want %v", got.Records, want)
	}
	if got.Bytes != 0 || got.Unmeasured != 2 {
		t.Errorf("%d bytes, %d unmeasured, before anything was measured or fetched", got.Bytes, got.Unmeasured)
	}
	must(t, lazy.Extract(t.Context()))
	var du int64
	for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
		du += u.Size
	}
	if got := e.m.Totals(); got.Bytes != du || got.Unmeasured != 0 {
		t.Errorf("%d bytes, %d unmeasured; du has %d", got.Bytes, got.Unmeasured, du)
	}
	for _, r := range []*Ref{lazy, a, b} {
		r.Release()
	}
	must(t, e.m.Prune(context.Background(), PruneOptions{All: true, Rule: "prune"}, func(Usage) error { return nil }))
	if got := e.m.Totals(); len(got.Records) != 0 || got.Bytes != 0 || got.Evictions != 2 || got.EvictedBytes == 0 {
		t.Errorf("after prune: %+v", got)
	}
}
