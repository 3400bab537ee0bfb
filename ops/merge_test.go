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
	one, two := b.ref(nil, files{"a": "1", "b": "1"}), b.ref(nil, files{"b": "2", "c": "2"})
	for _, c := range []struct {
		name string
		in   []*cache.Ref
		want files // nil is scratch
		same *cache.Ref
	}{
		{name: "none"},
		{name: "only scratch", in: []*cache.Ref{nil, nil}},
		{name: "one", in: []*cache.Ref{nil, one, nil}, want: files{"a": "1", "b": "1"}, same: one},
		{name: "later wins", in: []*cache.Ref{one, two}, want: files{"a": "1", "b": "2", "c": "2"}},
		{name: "in order", in: []*cache.Ref{two, nil, one}, want: files{"a": "1", "b": "1", "c": "2"}},
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

func TestResultsLoad(t *testing.T) {
	b := newExecBench(t, nil)
	ref := b.ref(nil, files{"a": "1"})
	store := Results{b.cache}
	got, err := store.Load(context.Background(), ref.ID())
	if err != nil {
		t.Fatal(err)
	}
	wantFiles(t, "the record", got, files{"a": "1"})
	got.Release()
	if got, err := store.Load(context.Background(), scratchID); err != nil || got.ID() != scratchID {
		t.Errorf("scratch is %v, %v", got, err)
	}
	if _, err := store.Load(context.Background(), "gone"); !errors.Is(err, solver.ErrNoResult) {
		t.Errorf("a record that isn't there is %v", err)
	}
}
