package solver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/opencontainers/go-digest"
)

// ResultStore turns result ids back into results.
type ResultStore interface {
	// Load returns the result named id, or ErrNoResult.
	Load(ctx context.Context, id string) (Result, error)
}

// Options are what a Solver works with.
type Options struct {
	Keys    KeyStore
	Results ResultStore
}

// Solver holds what builds share: the key store and the flights.
type Solver struct {
	opts    Options
	flights flights
}

// Close waits for executions that were cancelled to be over.
func (s *Solver) Close() { s.flights.running.Wait() }

// New returns a solver without builds.
func New(opts Options) *Solver {
	return &Solver{opts: opts, flights: flights{table: map[string]*flight{}}}
}

// BuildOptions describe one build.
type BuildOptions struct {
	ID string
	// Value is handed to ops through Asker.
	Value any
	// Domain must agree for two builds to share executions; it is never part
	// of a cache key.
	Domain   string
	Progress progress.Writer
	// Trace, if set, gets every event and effect in the scenario text format.
	Trace func(line string)
}

// Build is one request's graph. Its methods are safe for concurrent use.
type Build struct {
	solver *Solver
	opts   BuildOptions
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	report reporter

	events  queue[Event]
	storage queue[func()] // what goes to the key store, in order
	work    sync.WaitGroup
	owner   sync.WaitGroup

	mu      sync.Mutex // guards the fields below; never held across I/O
	calls   map[int]chan answer
	next    int
	running map[*Vertex]context.CancelCauseFunc
	reasons map[digest.Digest]string
	closed  bool
}

type answer struct {
	result Result
	err    error
}

// NewBuild starts a build without vertices.
func (s *Solver) NewBuild(opts BuildOptions) *Build {
	if opts.Progress == nil {
		opts.Progress = progress.Discard
	}
	b := &Build{
		solver: s, opts: opts, report: reporter{w: opts.Progress, seen: map[digest.Digest]*shown{}},
		calls: map[int]chan answer{}, running: map[*Vertex]context.CancelCauseFunc{}, reasons: map[digest.Digest]string{},
	}
	b.ctx, b.cancel = context.WithCancelCause(context.Background())
	b.owner.Go(b.own)
	b.owner.Go(b.store)
	return b
}

// own is the only goroutine that touches the core.
func (b *Build) own() {
	core := NewCore()
	for {
		ev, ok := b.events.take()
		if !ok {
			break
		}
		b.trace("", ev)
		for _, eff := range core.Step(ev) {
			b.trace("  ", eff)
			b.perform(eff)
		}
	}
	for _, n := range core.nodes {
		for _, e := range n.edges {
			if e.result != nil {
				e.result.Release()
			}
		}
	}
}

func (b *Build) trace(indent string, what fmt.Stringer) {
	if b.opts.Trace != nil {
		b.opts.Trace(indent + what.String())
	}
}

// store performs what goes to the key store, one after the other.
func (b *Build) store() {
	for {
		fn, ok := b.storage.take()
		if !ok {
			return
		}
		fn()
	}
}

// Solve returns the result of edge. The caller releases it. Several calls may
// run at once; vertices of the same digest are solved once. The error is a
// *VertexError unless ctx ended.
func (b *Build) Solve(ctx context.Context, edge Edge) (Result, error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil, errClosed
	}
	b.next++
	id, ch := b.next, make(chan answer, 1)
	b.calls[id] = ch
	b.mu.Unlock()
	b.events.put(&Requested{Call: id, Edge: edge})

	select {
	case a := <-ch:
		return a.result, a.err
	case <-ctx.Done():
	case <-b.ctx.Done():
	}
	b.mu.Lock()
	_, open := b.calls[id]
	delete(b.calls, id)
	b.mu.Unlock()
	if !open { // the answer was faster
		if a := <-ch; a.result != nil {
			a.result.Release()
		}
	} else {
		b.events.put(&Abandoned{Call: id})
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, context.Cause(b.ctx)
}

var errClosed = errors.New("the build has ended")

// Stats are counts of vertices.
type Stats struct {
	Total, Completed, Cached int
}

// Stats returns the counts as of now.
func (b *Build) Stats() Stats { return b.report.stats() }

// Reason says why the vertex ran or was answered from the cache; "" if neither
// was decided.
func (b *Build) Reason(vertex digest.Digest) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.reasons[vertex]
}

// Close cancels what still runs for this build alone, waits for it, and
// releases everything the build holds.
func (b *Build) Close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel(errClosed)
	b.work.Wait()
	b.events.close()
	b.storage.close()
	b.owner.Wait()
	b.report.interrupted()
}

// perform does eff without waiting; outcomes come back as events.
func (b *Build) perform(eff Effect) {
	switch eff := eff.(type) {
	case *Announce:
		b.report.announce(eff.Vertex)
	case *Cached:
		b.report.cached(eff.Vertex)
	case *Release:
		eff.Result.Release()
	case *Answer:
		b.answer(eff)
	case *Cancel:
		b.mu.Lock()
		stop := b.running[eff.Vertex]
		b.mu.Unlock()
		if stop != nil {
			stop(errUnwanted)
		}
	case *Query:
		b.storage.put(func() {
			found, err := b.solver.opts.Keys.Lookup(eff.Lookup)
			b.events.put(&Queried{Edge: eff.Edge, Found: found, Err: err})
		})
	case *Link:
		b.storage.put(func() { b.warn(b.solver.opts.Keys.Save(eff.Save)) })
	case *Drop:
		b.storage.put(func() { b.warn(b.solver.opts.Keys.Drop(eff.Records)) })
	case *GetCacheMap:
		b.goDo(func() { b.events.put(b.cacheMap(eff)) })
	case *Load:
		b.reason(eff.Edge.Vertex, eff.Reason)
		b.goDo(func() {
			r, err := b.solver.opts.Results.Load(b.ctx, eff.Record.Result)
			b.events.put(&Loaded{Edge: eff.Edge, Record: eff.Record, Result: r, Err: err})
		})
	case *Digest:
		b.goDo(func() { b.events.put(b.digest(eff)) })
	case *Execute:
		b.reason(eff.Vertex, eff.Reason)
		ctx, stop := context.WithCancelCause(b.ctx)
		b.mu.Lock()
		b.running[eff.Vertex] = stop
		b.mu.Unlock()
		b.goDo(func() {
			ev := b.execute(ctx, eff)
			stop(nil)
			b.mu.Lock()
			delete(b.running, eff.Vertex)
			b.mu.Unlock()
			b.events.put(ev)
		})
	default:
		panic(fmt.Sprintf("effect of unknown kind %T", eff))
	}
}

func (b *Build) goDo(fn func()) { b.work.Go(fn) }

func (b *Build) reason(v *Vertex, why string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reasons[v.Digest] = why
}

// warn traces a failure of the key store to save: the result is good, it is
// only not found again.
func (b *Build) warn(err error) {
	if err != nil && b.opts.Trace != nil {
		b.opts.Trace("! " + err.Error())
	}
}

func (b *Build) answer(a *Answer) {
	b.mu.Lock()
	ch := b.calls[a.Call]
	delete(b.calls, a.Call)
	b.mu.Unlock()
	if ch != nil {
		ch <- answer{result: a.Result, err: a.Err}
	} else if a.Result != nil {
		a.Result.Release()
	}
}

// asker is this build alone.
type asker struct{ value any }

func (a asker) Values() []any { return []any{a.value} }

func (b *Build) cacheMap(eff *GetCacheMap) (ev *GotCacheMap) {
	v := eff.Vertex
	ev = &GotCacheMap{Vertex: v}
	// Most cache maps cost nothing: the vertex is shown to run once its op has
	// something to tell.
	var start sync.Once
	var started atomic.Bool
	w := progress.WriterFunc(func(e progress.Event) {
		start.Do(func() { b.report.start(v); started.Store(true) })
		b.opts.Progress.Write(e)
	})
	defer func() {
		if started.Load() || ev.Err != nil {
			b.report.complete(v, ev.Err)
		}
	}()
	ctx := progress.With(b.ctx, progress.NewScope(w, v.Digest))
	ev.Err = protect(v, func() (err error) {
		ev.Map, ev.More, err = v.Op.CacheMap(ctx, asker{b.opts.Value}, eff.Index)
		return err
	})
	return ev
}

func (b *Build) digest(eff *Digest) *Digested {
	v := eff.Vertex
	defer eff.Result.Release()
	ev := &Digested{Vertex: v, Input: eff.Input}
	ctx := progress.With(b.ctx, b.report.scope(v))
	ev.Err = protect(v, func() (err error) {
		if eff.Dep.Prepare != nil {
			if err := eff.Dep.Prepare(ctx, asker{b.opts.Value}, eff.Result); err != nil {
				return err
			}
		}
		ev.Digest, err = eff.Dep.Content(ctx, asker{b.opts.Value}, eff.Result)
		return err
	})
	if lost := (*LostError)(nil); ev.Err != nil && !errors.As(ev.Err, &lost) {
		b.report.complete(v, ev.Err)
	}
	return ev
}

// protect makes a panic of v's op an error.
func protect(v *Vertex, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("internal error: %s panicked: %v\n%s", v.Name, p, debug.Stack())
		}
	}()
	return fn()
}

// queue is unbounded: whoever puts never waits.
type queue[T any] struct {
	mu     sync.Mutex // guards the fields below
	items  []T
	closed bool
	wake   chan struct{}
}

func (q *queue[T]) put(item T) {
	q.mu.Lock()
	q.items = append(q.items, item)
	q.signalLocked()
	q.mu.Unlock()
}

// close lets take return false once everything is taken.
func (q *queue[T]) close() {
	q.mu.Lock()
	q.closed = true
	q.signalLocked()
	q.mu.Unlock()
}

func (q *queue[T]) signalLocked() {
	if q.wake != nil {
		close(q.wake)
		q.wake = nil
	}
}

func (q *queue[T]) take() (item T, ok bool) {
	for {
		q.mu.Lock()
		if len(q.items) > 0 {
			item = q.items[0]
			q.items = q.items[1:]
			q.mu.Unlock()
			return item, true
		}
		if q.closed {
			q.mu.Unlock()
			return item, false
		}
		wake := make(chan struct{})
		q.wake = wake
		q.mu.Unlock()
		<-wake
	}
}
