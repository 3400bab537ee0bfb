package ops

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// step is one run of an exec op.
type step struct {
	*execOp
	mountSet
	identity string // see execOp.identity
	done     func() // of a supervisor's run; nil if there is none
}

func (e *execOp) newStep(g session.Group, inputs []*cache.Ref) *step {
	return &step{execOp: e, mountSet: mountSet{
		ops: e.loader, platform: e.platform, group: g, list: e.op.Mounts, cwd: e.op.Meta.Cwd, inputs: inputs,
		user: "exec " + strings.Join(e.op.Meta.Args, " "),
	}}
}

// commit turns the outputs into results, in the order of the mounts.
func (s *step) commit(ctx context.Context) ([]solver.Result, error) {
	var results []solver.Result
	var rest []mountLayer
	for i, l := range s.layers {
		if !hasOutput(s.list[l.index]) {
			rest = append(rest, l)
			continue
		}
		ref, err := l.commit(ctx)
		if err != nil {
			s.layers = append(rest, s.layers[i:]...)
			releaseAll(results)
			return nil, fmt.Errorf("commit output %d: %w", len(results), err)
		}
		results = append(results, Result{ref})
	}
	s.layers = rest // the results have the others now
	return results, nil
}

// commit turns the layer into a ref, which the caller releases.
func (l mountLayer) commit(ctx context.Context) (*cache.Ref, error) {
	if l.mutable == nil {
		return l.ref, nil
	}
	return l.mutable.Commit(ctx)
}

// remains is what whoever debugs a failed step may look at: the state that each
// mount began with and what the step made of it (LLB-034).
func (s *step) remains(ctx context.Context) (*solver.Remains, error) {
	left := &solver.Remains{Inputs: make([]solver.Result, len(s.list)), Left: make([]solver.Result, len(s.list))}
	for i, m := range s.list {
		if m.Input != int64(pb.Empty) {
			left.Inputs[i] = Result{s.input(m).Clone()}
		}
	}
	layers := s.layers
	for i, l := range layers {
		ref, err := l.commit(ctx)
		if err != nil {
			s.layers = layers[i:]
			left.Release()
			return nil, fmt.Errorf("keep what mount %s of the failed step holds: %w", s.list[l.index].Dest, err)
		}
		left.Left[l.index] = Result{ref}
	}
	s.layers = nil
	for i, in := range left.Inputs {
		if left.Left[i] == nil && in != nil {
			left.Left[i] = in.Clone()
		}
	}
	return left, nil
}

func releaseAll(results []solver.Result) {
	for _, r := range slices.Backward(results) {
		r.Release()
	}
}
