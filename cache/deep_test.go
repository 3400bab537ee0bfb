package cache

import (
	"fmt"
	"testing"
)

// More layers than the kernel can stack, merged and then written on: what is shown
// is right, du adds up, and it survives a restart.
func TestMergeOfMoreLayersThanTheKernelStacks(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	var layers []*Ref
	var want []string
	for i := range 600 {
		name := fmt.Sprintf("f%03d=1", i)
		layers = append(layers, e.layer(nil, Options{}, name))
		want = append(want, name)
	}
	// The sizes are known by the time the files are shared.
	if got := len(get(e.m.DiskUsage(ctx, nil, 0))(t)); got != 600 {
		t.Fatalf("%d records", got)
	}
	merged := get(e.m.Merge(ctx, layers, Options{}))(t)
	e.wantFiles(merged, want...)
	top := e.layer(merged, Options{}, "z=1")
	e.wantFiles(top, append(want, "z=1")...)
	e.persist(top)
	id := top.ID()
	for _, r := range append(layers, merged, top) {
		r.Release()
	}
	e.restart() // which measures
	top = get(e.m.Get(ctx, id))(t)
	e.wantFiles(top, append(want, "z=1")...)
	top.Release()
	must(t, e.m.Prune(ctx, PruneOptions{All: true}, nil))
	e.empty()
}
