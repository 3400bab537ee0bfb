package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/kilnbuild/kiln/internal/progress"
)

func TestFlightIsJoined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights[string]
		var runs atomic.Int32
		gate := make(chan struct{})
		boom := errors.New("boom")
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				err := g.do(t.Context(), "k", func(context.Context) error { runs.Add(1); <-gate; return boom })
				if err != boom {
					t.Errorf("got %v", err)
				}
			})
		}
		synctest.Wait()
		close(gate)
		wg.Wait()
		if runs.Load() != 1 {
			t.Fatalf("ran %d times", runs.Load())
		}
		if err := g.do(t.Context(), "k", func(context.Context) error { return nil }); err != nil {
			t.Fatalf("an old outcome came back: %v", err)
		}
	})
}

// The error of an asker who was cancelled stays that asker's.
func TestFlightOutlivesItsFirstAsker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights[string]
		gate := make(chan struct{})
		work := func(ctx context.Context) error {
			select {
			case <-gate:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		enough := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- g.do(ctx, "k", work) }()
		synctest.Wait()
		go func() { second <- g.do(t.Context(), "k", work) }()
		synctest.Wait()
		cancel(enough)
		if err := <-first; err != enough {
			t.Errorf("first: %v", err)
		}
		close(gate)
		if err := <-second; err != nil {
			t.Errorf("second: %v", err)
		}
	})
}

// The last asker who leaves cancels the work; a new one starts anew after it.
func TestFlightEndsWithItsLastAsker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights[string]
		var running, runs, worst int
		slow := make(chan struct{})
		work := func(ctx context.Context) error {
			runs++
			running++
			worst = max(worst, running)
			<-ctx.Done()
			<-slow
			running--
			return context.Cause(ctx)
		}
		ctx, cancel := context.WithCancel(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- g.do(ctx, "k", work) }()
		synctest.Wait()
		cancel()
		synctest.Wait()
		go func() {
			second <- g.do(t.Context(), "k", func(context.Context) error {
				worst = max(worst, running+1)
				return nil
			})
		}()
		synctest.Wait()
		close(slow)
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("first: %v", err)
		}
		if err := <-second; err != nil {
			t.Errorf("second: %v", err)
		}
		if runs != 1 || worst != 1 {
			t.Errorf("%d runs, %d at once", runs, worst)
		}
	})
}

func TestFlightShowsProgressToAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g flights[string]
		gate := make(chan struct{})
		var mu sync.Mutex
		seen := map[string][]string{}
		asker := func(name string) context.Context {
			w := progress.WriterFunc(func(e progress.Event) {
				mu.Lock()
				defer mu.Unlock()
				seen[name] = append(seen[name], fmt.Sprintf("%s %s %d", e.Status.Vertex, e.Status.ID, e.Status.Current))
			})
			return progress.With(t.Context(), progress.NewScope(w, "vertex of "+"x"))
		}
		work := func(ctx context.Context) error {
			s := progress.From(ctx)
			s.Write(progress.Event{Status: &progress.Status{ID: "a", Current: 1}})
			s.Write(progress.Event{Status: &progress.Status{ID: "a", Current: 2}})
			<-gate
			s.Write(progress.Event{Status: &progress.Status{ID: "a", Current: 3}})
			return nil
		}
		var wg sync.WaitGroup
		wg.Go(func() { g.do(asker("early"), "k", work) })
		synctest.Wait()
		wg.Go(func() { g.do(asker("late"), "k", work) })
		synctest.Wait()
		close(gate)
		wg.Wait()
		v := "vertex of x a "
		if want := []string{v + "1", v + "2", v + "3"}; !slices.Equal(seen["early"], want) {
			t.Errorf("early saw %q", seen["early"])
		}
		if want := []string{v + "2", v + "3"}; !slices.Equal(seen["late"], want) {
			t.Errorf("late saw %q", seen["late"])
		}
	})
}

func TestSlotsLetTheLowestIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slots{free: 1}
		release, err := s.acquire(t.Context(), 9)
		if err != nil {
			t.Fatal(err)
		}
		var order []int
		var wg sync.WaitGroup
		for _, rank := range []int{3, 1, 2} {
			wg.Go(func() {
				release, err := s.acquire(t.Context(), rank)
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, rank)
				release()
			})
			synctest.Wait()
		}
		ctx, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := s.acquire(ctx, 0); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled waiter: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		release()
		wg.Wait()
		if !slices.Equal(order, []int{1, 2, 3}) {
			t.Errorf("order %v", order)
		}
		if s.free != 1 || len(s.waiting) != 0 {
			t.Errorf("left %d free and %d waiting", s.free, len(s.waiting))
		}
	})
}
