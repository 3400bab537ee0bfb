package build

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// ref is a lazy reference to one edge of the build's graph.
type ref struct {
	br   *bridge
	def  *pb.Definition
	edge solver.Edge

	mu     sync.Mutex // guards result; not held while solving
	result *ops.Result
}

// Definition is what the ref stands for.
func (r *ref) Definition() *pb.Definition { return r.def }

// Evaluate solves the ref.
func (r *ref) Evaluate(ctx context.Context) error {
	_, err := r.solve(ctx)
	return err
}

// solve returns the result, which the bridge holds until the build ends.
// Concurrent calls are one solve in the build's graph.
func (r *ref) solve(ctx context.Context) (ops.Result, error) {
	r.mu.Lock()
	known := r.result
	r.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	res, err := r.br.b.solver.Solve(ctx, r.edge)
	if err != nil {
		err = r.br.located(err, r.def)
		r.br.containers.remember(err)
		return ops.Result{}, err
	}
	out, ok := res.(ops.Result)
	if !ok {
		res.Release()
		return ops.Result{}, fmt.Errorf("internal error: a result of type %T is not a reference", res)
	}
	if err := r.br.hold(out); err != nil {
		return ops.Result{}, err
	}
	r.mu.Lock()
	r.result = &out
	r.mu.Unlock()
	return out, nil
}

// maxLosses bounds how often what turns out lost when it is used is made again.
const maxLosses = 5

// lost makes the next solve return another result than res, which turned out
// lost.
func (r *ref) lost(res ops.Result, why error) {
	r.mu.Lock()
	if r.result != nil && *r.result == res {
		r.result = nil
	}
	r.mu.Unlock()
	r.br.b.solver.Lost(r.edge, res, why)
}

// loseIfLost is lost for the result that the ref has, if it is lost.
func (r *ref) loseIfLost(why error) bool {
	r.mu.Lock()
	result := r.result
	r.mu.Unlock()
	if result == nil {
		return false
	}
	err := result.Ref.Lost()
	if err != nil {
		r.lost(*result, fmt.Errorf("%w (%w)", why, err))
	}
	return err != nil
}

// view solves the ref and opens what it stands for. If that is lost, it is made
// again.
func (r *ref) view(ctx context.Context) (*snapshot.View, error) {
	for losses := 0; ; losses++ {
		res, err := r.solve(ctx)
		if err != nil {
			return nil, err
		}
		v, err := res.Ref.Open(ctx)
		if !errors.Is(err, cache.ErrLost) || losses == maxLosses {
			return v, err
		}
		r.lost(res, err)
	}
}
