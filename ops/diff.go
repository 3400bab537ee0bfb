package ops

import (
	"context"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops/filetree"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// diffOp is what changed from its lower input to its upper one (LLB-081).
type diffOp struct {
	vertex
	op    *pb.DiffOp
	cache *cache.Manager
}

func (d *diffOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	return definitionKey(struct {
		Type string
		Diff *pb.DiffOp
	}{"buildkit.diff.v0", d.op}, len(d.pb.Inputs))
}

func (d *diffOp) Exec(ctx context.Context, _ solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	all, err := refs(inputs)
	if err != nil {
		return nil, err
	}
	var lower, upper diffSide
	next := 0
	for _, side := range []struct {
		input int64
		side  *diffSide
	}{{d.op.Lower.Input, &lower}, {d.op.Upper.Input, &upper}} {
		if side.input != int64(pb.Empty) {
			*side.side = diffSide{all[next], next}
			next++
		}
	}
	if lower.ref != nil && upper.ref != nil && lower.ref.ID() == upper.ref.ID() {
		return []solver.Result{Result{}}, nil
	}
	opts := cache.Options{Description: d.name}
	ref, ok := d.cache.Diff(ctx, lower.ref, upper.ref, opts)
	if ok {
		if err := ref.Whole(); err != nil {
			ref.Release()
			return nil, lostInput(upper.input, err)
		}
	} else {
		if ref, err = d.compare(ctx, lower, upper, opts); err != nil {
			return nil, err
		}
	}
	return []solver.Result{Result{ref}}, nil
}

// diffSide is one of the two states; ref is nil if it is empty.
type diffSide struct {
	ref   *cache.Ref
	input int // of the op
}

// compare makes the difference of two states of which one isn't made of the
// other: it turns a layer on top of lower into upper, file by file. That layer
// is the difference.
func (d *diffOp) compare(ctx context.Context, lower, upper diffSide, opts cache.Options) (_ *cache.Ref, err error) {
	layer, err := d.cache.New(ctx, lower.ref, opts)
	if err != nil {
		return nil, lostInput(lower.input, err)
	}
	defer func() { err = errors.Join(err, release(ctx, layer)) }() // nothing, after Commit

	if err := d.turn(ctx, layer, lower, upper); err != nil {
		return nil, err
	}
	whole, err := layer.Commit(ctx)
	if err != nil {
		return nil, fmt.Errorf("commit %s: %w", d.name, err)
	}
	defer whole.Release()
	ref, ok := d.cache.Diff(ctx, lower.ref, whole, opts)
	if !ok {
		return nil, fmt.Errorf("internal error: a layer on top of %s doesn't have it below", lower.ref.ID())
	}
	return ref, nil
}

// turn makes layer hold what upper does.
func (d *diffOp) turn(ctx context.Context, layer *cache.Mutable, lower, upper diffSide) (err error) {
	to, err := layer.Open(ctx)
	if err != nil {
		return lostInput(lower.input, err)
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if upper.ref == nil {
		return filetree.At(to.FD()).Clear()
	}
	from, err := upper.ref.Open(ctx)
	if err != nil {
		return lostInput(upper.input, err)
	}
	defer func() { err = errors.Join(err, from.Close()) }()
	return filetree.Mirror(ctx, filetree.At(from.FD()), filetree.At(to.FD()))
}
