package solver

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/internal/progress"
)

// ResultStore turns result ids back into results.
type ResultStore interface {
	// Load returns the result named id, or ErrNoResult if it is gone for good.
	Load(ctx context.Context, id string) (Result, error)
}

// Options are what a Solver works with.
type Options struct {
	Keys    KeyStore
	Results ResultStore
	// Warn is told of what harms no build: a key store that can't be read or
	// written. It may be nil.
	Warn func(msg string, args ...any)
}

// Solver holds what builds share: the key store and the flights.
type Solver struct {
	opts    Options
	flights flights
}

// New returns a solver without builds.
func New(opts Options) *Solver {
	if opts.Warn == nil {
		opts.Warn = func(string, ...any) {}
	}
	return &Solver{opts: opts, flights: flights{table: map[flightKey]*flight{}}}
}

// Close waits for executions that were cancelled to be over. Builds are closed
// first.
func (s *Solver) Close() { s.flights.running.Wait() }

// Import is a cache from elsewhere that a build may use, such as one in a
// registry. What a build uses of it becomes the daemon's own: the result with
// its keys, and those of the steps that it stands on.
type Import struct {
	Name string // what users know it by
	// Keys may wait for the import to be read, as long as the build goes on: other
	// lookups of the build wait with it.
	Keys KeyIndex
	// Results loads what Keys names, as a result that the solver's own
	// ResultStore knows by its ID from then on. It transfers no content: a
	// result whose content can't be had later is lost, as others are.
	Results ResultStore
}

// BuildOptions describe one build.
type BuildOptions struct {
	// Value is handed to ops through Asker.
	Value any
	// Domain must agree for two builds to share executions; it is never part
	// of a cache key.
	Domain string
	// Imports are asked beside the solver's own stores, after them. AddImport adds
	// more.
	Imports  []Import
	Progress progress.Writer
	// Trace, if set, gets every event with its effects before they are performed.
	// It is called from one goroutine. Package trace makes text of them.
	Trace func(Event, []Effect)
	// Observers are told what becomes of the vertices, in order.
	Observers []Observer
}

// Build is one request's graph. Its methods are safe for concurrent use.
//
// One goroutine owns the core and starts a performer for each effect, but for
// those of Small ops, which share a few; another performs what goes to the key
// store, in order. Close ends the owner first, so
// that nothing new starts, and then waits for performers.
type Build struct {
	solver *Solver
	opts   BuildOptions
	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	graph  *progress.Graph[*Vertex] // as watchers see it

	events  *queue[Event]
	storage *queue[func()] // what goes to the key store
	// Small ops are asked and executed by these, and their inputs digested, so that
	// who is asked needn't wait for who is executed.
	maps, digests, runs crew
	work                sync.WaitGroup
	owner               sync.WaitGroup

	mu      sync.Mutex // guards the fields below; never held across I/O
	imports []Import   // only ever added to: records name them by number
	calls   map[int]chan answer
	next    int
	remains []*Remains // of vertices that failed
	closed  bool
}

type answer struct {
	result Result
	err    error
}

// NewBuild starts a build without vertices. The caller closes it.
func (s *Solver) NewBuild(opts BuildOptions) *Build {
	if opts.Progress == nil {
		opts.Progress = progress.Discard
	}
	b := &Build{
		solver: s, opts: opts, graph: progress.NewGraph[*Vertex](opts.Progress),
		events: newQueue[Event](), storage: newQueue[func()](),
		imports: slices.Clip(opts.Imports), calls: map[int]chan answer{},
	}
	b.ctx, b.cancel = context.WithCancelCause(context.Background())
	b.owner.Go(b.own)
	return b
}

// AddImport lets the build ask im, too: for edges that are solved from now on.
func (b *Build) AddImport(im Import) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.imports = append(b.imports, im)
}

func (b *Build) importsNow() []Import {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.imports
}

var errClosed = errors.New("the build has ended")

// Solve returns the result of edge. The caller releases it. Several calls may
// run at once; vertices of the same digest are solved once. The error is a
// *VertexError unless ctx or the build ended.
func (b *Build) Solve(ctx context.Context, edge Edge) (Result, error) {
	if edge.Vertex == nil {
		return nil, errors.New("internal error: solve an edge without a vertex")
	}
	id, ch, err := b.call()
	if err != nil {
		return nil, err
	}
	b.events.put(&Requested{Call: id, Edge: edge})
	select {
	case a := <-ch:
		return a.result, a.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-b.ctx.Done():
		err = context.Cause(b.ctx)
	}
	if b.hangUp(id) {
		b.events.put(&Abandoned{Call: id})
	} else { // the answer was faster
		release((<-ch).result)
	}
	return nil, err
}

// Lost tells that r, which Solve returned for edge, turned out lost when it was
// used: its record is quarantined, and Solve returns another from then on. r
// stays the caller's.
func (b *Build) Lost(edge Edge, r Result, why error) {
	b.events.put(&FoundLost{Edge: edge, Record: r.ID(), Err: why})
}

// Load returns what a record that a key store or an import of the build has named
// stands for. The caller releases it.
func (b *Build) Load(ctx context.Context, r Record) (Result, error) {
	return b.results(r).Load(ctx, r.Result)
}

// call opens a request.
func (b *Build) call() (int, chan answer, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return 0, nil, errClosed
	}
	b.next++
	ch := make(chan answer, 1)
	b.calls[b.next] = ch
	return b.next, ch, nil
}

// hangUp reports whether the request was still open.
func (b *Build) hangUp(id int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, open := b.calls[id]
	delete(b.calls, id)
	return open
}

func (b *Build) answer(a *Answer) {
	b.mu.Lock()
	ch := b.calls[a.Call]
	delete(b.calls, a.Call)
	b.mu.Unlock()
	if ch == nil {
		release(a.Result)
		return
	}
	ch <- answer{result: a.Result, err: a.Err}
}

// Stats returns the counts as of now.
func (b *Build) Stats() progress.Counts { return b.graph.Counts() }

// Shown is what watchers were last told of v, which was announced. It may be
// asked for after Close, until Forget.
func (b *Build) Shown(v *Vertex) progress.Vertex { return b.graph.Shown(v) }

// Forget lets go of the vertices of a build that was closed, however long somebody
// keeps the build.
func (b *Build) Forget() { b.graph.Forget() }

// Close cancels what still runs for this build alone, waits for it, and
// releases everything the build holds but its vertices.
func (b *Build) Close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel(errClosed)
	b.events.close()
	b.owner.Wait()
	b.graph.Interrupt()
}

// own is the only goroutine that touches the core.
func (b *Build) own() {
	var store sync.WaitGroup
	store.Go(b.store)
	core := NewCore()
	for b.ctx.Err() == nil {
		for _, ev := range b.events.take() {
			b.step(core, ev)
		}
	}
	b.work.Wait()
	b.storage.close()
	store.Wait()
	for _, ev := range b.events.take() {
		unused(ev)
	}
	core.Release()
	b.mu.Lock()
	remains := b.remains
	b.remains = nil
	b.mu.Unlock()
	for _, r := range remains {
		r.Release()
	}
}

// step takes ev. Once the build ends, what comes is what its end caused, and
// must not be taken for news: a load that was cancelled isn't a lost record.
func (b *Build) step(core *Core, ev Event) {
	if b.ctx.Err() != nil {
		unused(ev)
		return
	}
	effects := core.Step(ev)
	if b.opts.Trace != nil {
		b.opts.Trace(ev, effects)
	}
	for _, eff := range effects {
		b.perform(eff)
	}
}

// store performs what goes to the key store, one after the other.
func (b *Build) store() {
	for work := b.storage.take(); len(work) > 0; work = b.storage.take() {
		for _, fn := range work {
			fn()
		}
	}
}
