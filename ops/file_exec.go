package ops

import (
	"context"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/ops/filetree"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/solver/pb"
)

// fileRun is one execution of a fileOp. Actions run one after the other, each
// after those whose states it needs; copies use several cores by themselves.
type fileRun struct {
	*fileOp
	inputs []*cache.Ref
	states []*fileState // of the actions, nil until they ran
	views  map[int]*snapshot.View
}

// fileState is what an action made. While it is only passed on, the record
// stays mutable; who goes on from it takes it over.
type fileState struct {
	parent  int // the state that mutable was made of
	mutable *cache.Mutable
	view    *snapshot.View // of mutable, once an action needed it
	ref     *cache.Ref     // once it is committed
}

// run executes the actions that the outputs need and returns the outputs.
func (f *fileOp) run(ctx context.Context, inputs []*cache.Ref) (out []*cache.Ref, err error) {
	r := &fileRun{fileOp: f, inputs: inputs, states: make([]*fileState, len(f.op.Actions)), views: map[int]*snapshot.View{}}
	defer func() { err = errors.Join(err, r.close(context.WithoutCancel(ctx))) }()
	for _, action := range f.plan.outputs {
		if err := r.state(ctx, len(inputs)+action); err != nil {
			return nil, err
		}
	}
	for _, action := range f.plan.outputs {
		out = append(out, r.states[action].ref)
		r.states[action].ref = nil
	}
	return out, nil
}

// close lets go of everything that isn't an output.
func (r *fileRun) close(ctx context.Context) error {
	var errs []error
	for _, v := range r.views {
		errs = append(errs, v.Close())
	}
	for _, s := range r.states {
		if s != nil {
			errs = append(errs, s.close(ctx))
		}
	}
	return errors.Join(errs...)
}

func (s *fileState) close(ctx context.Context) error {
	var errs []error
	if s.view != nil {
		errs = append(errs, s.view.Close())
	}
	if s.mutable != nil {
		errs = append(errs, s.mutable.Release(ctx))
	}
	s.ref.Release()
	*s = fileState{}
	return errors.Join(errs...)
}

// state sees to it that the state of that number exists.
func (r *fileRun) state(ctx context.Context, state int) error {
	i := state - len(r.inputs)
	if i < 0 || r.states[i] != nil {
		return nil
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	a := r.op.Actions[i]
	for _, need := range fileNeeds(a) {
		if err := r.state(ctx, need); err != nil {
			return err
		}
	}
	s, err := r.act(ctx, i, a)
	if err != nil {
		return &FileActionError{Index: i, Err: err}
	}
	r.states[i] = s
	return nil
}

// act runs the action i and returns the state it makes.
func (r *fileRun) act(ctx context.Context, i int, a *pb.FileAction) (_ *fileState, err error) {
	s, err := r.take(ctx, int(a.Input))
	if err != nil {
		return nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(func() error { return s.close(context.WithoutCancel(ctx)) })

	if err := r.change(ctx, a, s); err != nil {
		return nil, err
	}
	if r.plan.commit[i] {
		if err := s.commit(ctx); err != nil {
			return nil, err
		}
	}
	undo.Keep()
	return s, nil
}

// change does to s what a says. Without a mount, if that is possible: of a small
// step the mount is most of the cost.
func (r *fileRun) change(ctx context.Context, a *pb.FileAction, s *fileState) (err error) {
	if s.view == nil {
		place, err := s.mutable.Place(ctx, fileActionPlace(a))
		if err != nil {
			return r.lost(s.parent, err)
		}
		if place != nil {
			err := r.apply(ctx, a, filetree.Below(place.FD(), place.Path()))
			return errors.Join(err, place.Close())
		}
	}
	if err := r.open(ctx, s); err != nil {
		return err
	}
	return r.apply(ctx, a, filetree.At(s.view.FD()))
}

// open sees to it that s, which isn't committed, has a view.
func (r *fileRun) open(ctx context.Context, s *fileState) (err error) {
	if s.view != nil {
		return nil
	}
	if s.view, err = s.mutable.Open(ctx); err != nil {
		return r.lost(s.parent, fmt.Errorf("open the filesystem to change: %w", err))
	}
	return nil
}

func (s *fileState) commit(ctx context.Context) error {
	if s.view != nil {
		err := s.view.Close()
		s.view = nil
		if err != nil {
			return fmt.Errorf("close %s: %w", s.mutable.ID(), err)
		}
	}
	ref, err := s.mutable.Commit(ctx)
	if err != nil {
		return err
	}
	s.ref, s.mutable = ref, nil
	return nil
}

// take returns a state that may be changed: what an action left for this one,
// or a new record on top of the given state, -1 being nothing.
func (r *fileRun) take(ctx context.Context, state int) (*fileState, error) {
	var parent *cache.Ref
	if i := state - len(r.inputs); i >= 0 {
		left := r.states[i]
		if left.mutable != nil {
			// Nobody else asks for it, by plan; it leaves an empty state behind.
			taken := *left
			*left = fileState{}
			return &taken, nil
		}
		parent = left.ref
	} else if state >= 0 {
		parent = r.inputs[state]
	}
	desc := r.name
	if desc == "" {
		desc = "fileop target"
	}
	u, err := r.cache.New(ctx, parent, cache.Options{Description: desc})
	if err != nil {
		return nil, r.lost(state, fmt.Errorf("make a filesystem to change: %w", err))
	}
	return &fileState{parent: state, mutable: u}, nil
}

// root opens a state for reading, until the run ends.
func (r *fileRun) root(ctx context.Context, state int) (filetree.Root, error) {
	if v, ok := r.views[state]; ok {
		return filetree.At(v.FD()), nil
	}
	var ref *cache.Ref
	if i := state - len(r.inputs); i >= 0 {
		s := r.states[i]
		if s.mutable != nil {
			if err := r.open(ctx, s); err != nil {
				return filetree.Root{}, err
			}
			return filetree.At(s.view.FD()), nil
		}
		ref = s.ref
	} else if state >= 0 {
		ref = r.inputs[state]
	}
	v, err := ref.Open(ctx)
	if err != nil {
		return filetree.Root{}, r.lost(state, err)
	}
	r.views[state] = v
	return filetree.At(v.FD()), nil
}

// lost reports an input that turned out lost as such.
func (r *fileRun) lost(state int, err error) error {
	if state >= len(r.inputs) {
		return err
	}
	return lostInput(state, err)
}
