package ops

import (
	"context"

	"golang.org/x/sync/semaphore"
)

// slots bounds how many ops run at once, over all builds (LLB-035). An op that
// embeds it is a solver.Limiter. The zero value has no bound.
type slots struct{ sem *semaphore.Weighted }

func newSlots(n int) slots {
	if n <= 0 {
		return slots{}
	}
	return slots{semaphore.NewWeighted(int64(n))}
}

// Acquire waits for a slot; release gives it back.
func (s slots) Acquire(ctx context.Context) (release func(), err error) {
	if s.sem == nil {
		return func() {}, nil
	}
	if err := s.sem.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	return func() { s.sem.Release(1) }, nil
}
