package llb

import (
	"errors"
	"fmt"

	"github.com/moby/buildkit/solver/pb"
)

type merge struct {
	inputs      []*output
	constraints Constraints
}

// Merge lays file systems over each other; later ones win. Nothing is copied.
// The settings are those of the first that isn't scratch.
func Merge(inputs []State, opts ...ConstraintsOpt) State {
	v := &merge{constraints: newConstraints(opts)}
	first := Scratch()
	for _, in := range inputs {
		if in.out == nil {
			continue
		}
		if len(v.inputs) == 0 {
			first = in
		}
		v.inputs = append(v.inputs, in.out)
	}
	if len(v.inputs) < 2 {
		return first
	}
	v.constraints.need(pb.CapMergeOp)
	return first.withOutput(&output{vertex: v})
}

func (v *merge) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	op, body := &pb.Op{}, &pb.MergeOp{}
	for i, o := range v.inputs {
		in, err := m.input(o)
		if err != nil {
			return nil, Constraints{}, err
		}
		if in == nil {
			return nil, Constraints{}, fmt.Errorf("merge: input %d turned out to be scratch", i)
		}
		body.Inputs = append(body.Inputs, &pb.MergeInput{Input: int64(len(op.Inputs))})
		op.Inputs = append(op.Inputs, in)
	}
	op.Op = &pb.Op_Merge{Merge: body}
	return op, v.constraints, nil
}

type diff struct {
	lower, upper *output
	constraints  Constraints
}

// Diff is what upper changes on lower, for use with Merge. The settings are
// those of lower.
func Diff(lower, upper State, opts ...ConstraintsOpt) State {
	if lower.out == nil {
		return upper
	}
	v := &diff{lower: lower.out, upper: upper.out, constraints: newConstraints(opts)}
	v.constraints.need(pb.CapDiffOp)
	return lower.withOutput(&output{vertex: v})
}

func (v *diff) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	op := &pb.Op{}
	var index [2]int64
	for i, o := range []*output{v.lower, v.upper} {
		in, err := m.input(o)
		if err != nil {
			return nil, Constraints{}, err
		}
		index[i] = int64(pb.Empty)
		if in != nil {
			index[i] = int64(len(op.Inputs))
			op.Inputs = append(op.Inputs, in)
		}
	}
	op.Op = &pb.Op_Diff{Diff: &pb.DiffOp{
		Lower: &pb.LowerDiffInput{Input: index[0]},
		Upper: &pb.UpperDiffInput{Input: index[1]},
	}}
	return op, v.constraints, nil
}

type passthrough struct {
	id          string
	state       *output
	deps        []*output
	constraints Constraints
}

// Requires returns s, which now can't be had before deps are. The id keeps
// apart what otherwise is the same.
func (s State) Requires(id string, deps []State, opts ...ConstraintsOpt) State {
	v := &passthrough{id: id, state: s.out, constraints: newConstraints(opts)}
	for _, d := range deps {
		if d.out != nil {
			v.deps = append(v.deps, d.out)
		}
	}
	if len(v.deps) == 0 {
		return s
	}
	v.constraints.need(pb.CapPassthroughOp)
	return s.withOutput(&output{vertex: v})
}

func (v *passthrough) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	if v.id == "" {
		return nil, Constraints{}, errors.New("passthrough: an id is needed")
	}
	op := &pb.Op{}
	for i, o := range append([]*output{v.state}, v.deps...) {
		in, err := m.input(o)
		if err != nil {
			return nil, Constraints{}, err
		}
		if in == nil {
			return nil, Constraints{}, fmt.Errorf("passthrough: input %d is scratch", i)
		}
		op.Inputs = append(op.Inputs, in)
	}
	op.Op = &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: v.id, Outputs: []int64{0}}}
	return op, v.constraints, nil
}
