package ops

import (
	"context"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
)

// Result is the solver.Result of every op: a ref, nil for scratch.
type Result struct{ Ref *cache.Ref }

// scratchID names the empty result in the key store.
const scratchID = "scratch"

// ID is the record's, or scratchID.
func (r Result) ID() string {
	if r.Ref == nil {
		return scratchID
	}
	return r.Ref.ID()
}

// Clone returns a further handle.
func (r Result) Clone() solver.Result { return Result{r.Ref.Clone()} }

// Release gives the handle back.
func (r Result) Release() { r.Ref.Release() }

// Persist makes the result survive a restart together with what else is in b.
func (r Result) Persist(b *store.Batch) error { return r.Ref.Persist(b) }

// Results loads results for the solver.
type Results struct{ Cache *cache.Manager }

var _ solver.ResultStore = Results{}

// Load returns the result named id. A record that is gone or lost is
// solver.ErrNoResult: a miss, never an error of the build.
func (r Results) Load(ctx context.Context, id string) (solver.Result, error) {
	if id == scratchID {
		return Result{}, nil
	}
	ref, err := r.Cache.Get(ctx, id)
	if errors.Is(err, cache.ErrNotFound) || errors.Is(err, cache.ErrLost) {
		return nil, fmt.Errorf("%w: %w", solver.ErrNoResult, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load record %s: %w", id, err)
	}
	return Result{ref}, nil
}

// Exists says whether Load would find the result.
func (r Results) Exists(id string) bool { return id == scratchID || r.Cache.Exists(id) }

// refs returns the refs behind results; they stay the results'.
func refs(results []solver.Result) ([]*cache.Ref, error) {
	out := make([]*cache.Ref, len(results))
	for i, r := range results {
		ref, err := refOf(r)
		if err != nil {
			return nil, fmt.Errorf("input %d: %w", i, err)
		}
		out[i] = ref
	}
	return out, nil
}

func refOf(r solver.Result) (*cache.Ref, error) {
	res, ok := r.(Result)
	if !ok {
		return nil, fmt.Errorf("internal error: result of type %T isn't an op's", r)
	}
	return res.Ref, nil
}

// lostInput turns cache.ErrLost, met while using input i, into the solver's
// *LostError. Other errors pass unchanged, and so do all if i is no input.
func lostInput(i int, err error) error {
	if i >= 0 && errors.Is(err, cache.ErrLost) {
		return &solver.LostError{Inputs: []int{i}, Err: err}
	}
	return err
}

// wholeInput returns a LostError if what is handed on of input i is known to be of
// no use. Ops that mount nothing ask for it: they don't find out by themselves,
// and their results would be lost again and again.
func wholeInput(i int, ref *cache.Ref) error { return lostInput(i, ref.Whole()) }

// extract is the Prepare of inputs whose content the op needs: it fetches them
// before the op takes a slot.
func extract(ctx context.Context, _ solver.Asker, input solver.Result) error {
	ref, err := refOf(input)
	if err != nil {
		return err
	}
	return lostInput(0, ref.Extract(ctx))
}
