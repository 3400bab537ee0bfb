package ops

import (
	"context"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// mergeOp lays its inputs over one another, later ones on top (LLB-080).
type mergeOp struct {
	vertex
	op    *pb.MergeOp
	cache *cache.Manager
}

func (m *mergeOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	return definitionKey(struct {
		Type  string
		Merge *pb.MergeOp
	}{"buildkit.merge.v0", m.op}, len(m.pb.Inputs))
}

func (m *mergeOp) Exec(ctx context.Context, _ solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	all, err := refs(inputs)
	if err != nil {
		return nil, err
	}
	var parents []*cache.Ref
	for i, ref := range all {
		if err := wholeInput(i, ref); err != nil {
			return nil, err
		}
		if ref != nil {
			parents = append(parents, ref)
		}
	}
	switch len(parents) {
	case 0:
		return []solver.Result{Result{}}, nil
	case 1:
		return []solver.Result{Result{parents[0].Clone()}}, nil
	}
	merged, err := m.cache.Merge(ctx, parents, cache.Options{Description: m.name})
	if err != nil {
		return nil, err
	}
	return []solver.Result{Result{merged}}, nil
}
