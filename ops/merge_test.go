package ops

import (
	"context"
	"errors"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// opOn makes the op whose body is given, with n inputs.
func (b *execBench) opOn(op *pb.Op, n int) solver.Op {
	b.t.Helper()
	d := newDef(b.t)
	src := d.add(sourceOf("test://base"))
	for range n {
		op.Inputs = append(op.Inputs, input(src, 0))
	}
	edge, err := b.Load(d.done(d.add(op), 0), LoadOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	return edge.Vertex.Op
}

// compat: LLB-080, LLB-014
func TestMerge(t *testing.T) {
	b := newExecBench(t, nil)
	one, two := b.ref(nil, fileSet{"a": "1", "b": "1"}), b.ref(nil, fileSet{"b": "2", "c": "2"})
	for _, c := range []struct {
		name string
		in   []*cache.Ref
		want fileSet // nil is scratch
		same *cache.Ref
	}{
		{name: "none"},
		{name: "only scratch", in: []*cache.Ref{nil, nil}},
		{name: "one", in: []*cache.Ref{nil, one, nil}, want: fileSet{"a": "1", "b": "1"}, same: one},
		{name: "later wins", in: []*cache.Ref{one, two}, want: fileSet{"a": "1", "b": "2", "c": "2"}},
		{name: "in order", in: []*cache.Ref{two, nil, one}, want: fileSet{"a": "1", "b": "1", "c": "2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := &pb.MergeOp{}
			for i := range c.in {
				m.Inputs = append(m.Inputs, &pb.MergeInput{Input: int64(i)})
			}
			out, err := b.opOn(&pb.Op{Op: &pb.Op_Merge{Merge: m}}, len(c.in)).Exec(context.Background(), asker{}, results(c.in...))
			if err != nil {
				t.Fatal(err)
			}
			defer out[0].Release()
			switch {
			case c.want == nil:
				if out[0].ID() != scratchID {
					t.Errorf("got %s, want scratch", out[0].ID())
				}
			default:
				wantFiles(t, "the merge", out[0], c.want)
			}
			if c.same != nil && out[0].ID() != c.same.ID() {
				t.Errorf("got %s, want the one input %s", out[0].ID(), c.same.ID())
			}
		})
	}
}

// Ops that look at no files say which of their inputs is out of use, or stands on
// what is.
func TestInputsOutOfUse(t *testing.T) {
	for name, c := range map[string]struct {
		op   *pb.Op
		lost int
	}{
		"merge":       {&pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}}}}}, 1},
		"diff":        {&pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: 0}, Upper: &pb.UpperDiffInput{Input: 1}}}}, 1},
		"passthrough": {&pb.Op{Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "p", Outputs: []int64{1, 0}}}}, 1},
	} {
		b := newExecBench(t, nil)
		base := b.ref(nil, fileSet{"a": "1"})
		child := b.ref(base, fileSet{"b": "2"})
		top := b.ref(child, fileSet{"c": "3"})
		b.cache.Distrust([]string{child.ID()}, errors.New("damaged"))
		_, err := b.opOn(c.op, 2).Exec(context.Background(), asker{}, results(base, top))
		if lost := (*solver.LostError)(nil); !errors.As(err, &lost) || len(lost.Inputs) != 1 || lost.Inputs[0] != c.lost || !errors.Is(err, cache.ErrLost) {
			t.Errorf("%s: %v, want input %d to be lost", name, err, c.lost)
		}
	}
}

func TestResultsLoad(t *testing.T) {
	b := newExecBench(t, nil)
	ref := b.ref(nil, fileSet{"a": "1"})
	store := Results{b.cache}
	got, err := store.Load(context.Background(), ref.ID())
	if err != nil {
		t.Fatal(err)
	}
	wantFiles(t, "the record", got, fileSet{"a": "1"})
	got.Release()
	if got, err := store.Load(context.Background(), scratchID); err != nil || got.ID() != scratchID {
		t.Errorf("scratch is %v, %v", got, err)
	}
	if _, err := store.Load(context.Background(), "gone"); !errors.Is(err, solver.ErrNoResult) {
		t.Errorf("a record that isn't there is %v", err)
	}
}
