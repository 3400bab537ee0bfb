package solver_test

import (
	"errors"
	"testing"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
)

// What a failed step leaves is there for every build that it failed, until that
// build's end, though the builds shared the execution.
func TestRemains(t *testing.T) {
	w := newWorld()
	s := New(Options{Keys: keygraph.NewMemory(), Results: w})
	leaf := w.vertex("leaf", 1)
	fails := w.vertex("fail", 1, in{v: leaf})
	type outcome struct {
		b    *Build
		left *Remains
	}
	outcomes := make(chan outcome, 2)
	for range 2 {
		b := s.NewBuild(BuildOptions{})
		go func() {
			_, err := b.Solve(t.Context(), Edge{Vertex: fails})
			var left *Remains
			var ve *VertexError
			if !errors.As(err, &left) || !errors.As(err, &ve) || !errors.Is(err, errStep) {
				t.Errorf("error %v comes without remains", err)
			}
			outcomes <- outcome{b, left}
		}()
	}
	first, second := <-outcomes, <-outcomes
	if t.Failed() {
		t.FailNow()
	}
	for _, o := range []outcome{first, second} {
		if len(o.left.Inputs) != 1 || len(o.left.Left) != 2 || o.left.Left[0] != nil {
			t.Fatalf("remains are %+v", o.left)
		}
		for _, r := range []Result{o.left.Inputs[0], o.left.Left[1]} {
			if _, ok := w.use(r); !ok {
				t.Errorf("%s can't be used", r.ID())
			}
		}
		o.b.Close() // the other's stay
	}
	s.Close()
	w.check(t)
}
