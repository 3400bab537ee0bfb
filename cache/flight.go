package cache

import (
	"context"
	"sync"

	"github.com/kilnbuild/kiln/internal/progress"
)

// flights joins askers for the same work: it runs once, and all get its
// outcome and see its progress. The zero value is ready to use.
type flights[K comparable] struct {
	mu sync.Mutex // guards the map and the waiters of each flight
	m  map[K]*flight
}

type flight struct {
	done    chan struct{} // closed after err is set
	err     error
	waiters int
	cancel  context.CancelFunc
	watch   watchers
}

// do runs fn, or joins who runs it for key already. The work is cancelled when
// its last asker leaves, who waits for its end; an asker who leaves gets the
// cause of its own context's end and the others never see it.
func (g *flights[K]) do(ctx context.Context, key K, fn func(context.Context) error) error {
	for {
		f, joined := g.join(ctx, key, fn)
		if !joined {
			select { // abandoned by its askers: wait for its end, then start anew
			case <-f.done:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		select {
		case <-f.done:
			return f.err
		case <-ctx.Done():
		}
		g.mu.Lock()
		f.waiters--
		last := f.waiters == 0
		g.mu.Unlock()
		if last {
			f.cancel()
			<-f.done
		}
		return context.Cause(ctx)
	}
}

// join enters the flight for key, starting it if there is none. A flight that
// all askers have left can't be entered.
func (g *flights[K]) join(ctx context.Context, key K, fn func(context.Context) error) (*flight, bool) {
	g.mu.Lock()
	f := g.m[key]
	if f != nil {
		ok := f.waiters > 0
		if ok {
			f.waiters++
		}
		g.mu.Unlock()
		if ok {
			f.watch.add(progress.From(ctx))
		}
		return f, ok
	}
	f = &flight{done: make(chan struct{}), waiters: 1}
	if g.m == nil {
		g.m = map[K]*flight{}
	}
	g.m[key] = f
	g.mu.Unlock()

	f.watch.add(progress.From(ctx))
	var fctx context.Context
	fctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	fctx = progress.With(fctx, progress.NewScope(&f.watch, ""))
	go func() {
		f.err = fn(fctx)
		f.cancel()
		g.mu.Lock()
		delete(g.m, key)
		g.mu.Unlock()
		close(f.done)
	}()
	return f, true
}

// watchers passes events on to any number of scopes. One that comes late
// first gets the last state of each status.
type watchers struct {
	mu     sync.Mutex // guards the fields below
	scopes []progress.Scope
	order  []string
	last   map[string]progress.Event
}

func (w *watchers) add(s progress.Scope) {
	w.mu.Lock()
	w.scopes = append(w.scopes, s)
	var missed []progress.Event
	for _, id := range w.order {
		missed = append(missed, w.last[id])
	}
	w.mu.Unlock()
	for _, e := range missed {
		s.Write(e)
	}
}

// Write implements progress.Writer.
func (w *watchers) Write(e progress.Event) {
	w.mu.Lock()
	if e.Status != nil {
		if w.last == nil {
			w.last = map[string]progress.Event{}
		}
		if _, ok := w.last[e.Status.ID]; !ok {
			w.order = append(w.order, e.Status.ID)
		}
		w.last[e.Status.ID] = e
	}
	scopes := w.scopes
	w.mu.Unlock()
	for _, s := range scopes {
		s.Write(e)
	}
}

// slots bounds how much runs at once and lets in the lowest rank first.
type slots struct {
	mu      sync.Mutex // guards the fields below
	free    int
	waiting []*slotWaiter
}

type slotWaiter struct {
	rank  int
	ready chan struct{}
}

// acquire waits for a slot; release gives it back.
func (s *slots) acquire(ctx context.Context, rank int) (release func(), err error) {
	s.mu.Lock()
	if s.free > 0 {
		s.free--
		s.mu.Unlock()
		return s.release, nil
	}
	w := &slotWaiter{rank, make(chan struct{})}
	at := len(s.waiting)
	for at > 0 && s.waiting[at-1].rank > rank {
		at--
	}
	s.waiting = append(s.waiting[:at], append([]*slotWaiter{w}, s.waiting[at:]...)...)
	s.mu.Unlock()
	select {
	case <-w.ready:
		return s.release, nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for i, o := range s.waiting {
		if o == w {
			s.waiting = append(s.waiting[:i], s.waiting[i+1:]...)
			s.mu.Unlock()
			return nil, context.Cause(ctx)
		}
	}
	s.mu.Unlock()
	s.release() // it was given at the same moment
	return nil, context.Cause(ctx)
}

func (s *slots) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) == 0 {
		s.free++
		return
	}
	close(s.waiting[0].ready)
	s.waiting = s.waiting[1:]
}
