package ops

import (
	"context"
	"errors"
	"testing"

	"github.com/kilnbuild/kiln/solver"
)

// compat: LLB-035
func TestWhoTakesASlot(t *testing.T) {
	for _, c := range []struct {
		op   solver.Op
		want bool
	}{
		{&execOp{}, true}, {&sourceOp{}, true}, {&fileOp{}, true},
		{&mergeOp{}, false}, {&diffOp{}, false}, {&passthroughOp{}, false},
	} {
		if _, got := c.op.(solver.Limiter); got != c.want {
			t.Errorf("%T takes a slot: %v, want %v", c.op, got, c.want)
		}
	}
}

func TestSlots(t *testing.T) {
	s := newSlots(1)
	release, err := s.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(gone)
	if _, err := s.Acquire(ctx); !errors.Is(err, gone) {
		t.Errorf("a second slot of one, for a caller that is gone: %v", err)
	}
	release()
	release, err = s.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	release()

	free := newSlots(0)
	for range 100 {
		if _, err := free.Acquire(ctx); err != nil {
			t.Fatalf("without a bound: %v", err)
		}
	}
}
