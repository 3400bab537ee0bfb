// Package verify tests that the cache doesn't lie: it executes steps that were
// answered from the cache once more, when no build runs, and compares what they
// make with what the cache has.
//
// A Watch sees one build and collects its hits: vertices that a record was found
// for, whether it was loaded or only stood below one that was. When the build is
// over, the chosen share of those that can be executed without its client
// (ops.Repeat) are queued. The queue holds ops and names of records, no handles,
// so it keeps nothing from garbage collection: what is gone by the time its turn
// comes is skipped. One goroutine works on the queue. It stops at once, and
// gives back all that it holds, when a build begins, and starts over later.
//
// A step that makes something else than the record is executed a second time
// (check.go). If the two executions differ, the step isn't deterministic. If
// they agree, the record is wrong: it, and what was made of it, are forgotten.
//
// Lock: Verifier.mu and Watch.mu, never held across I/O, nor one in the other.
package verify

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
)

// Keys is what is asked of the key store.
type Keys interface {
	Lookup(solver.Lookup) (solver.Found, error)
	// MadeOf returns the result and all that was made of it.
	MadeOf(result string) []string
	Drop(results []string) error
}

// Config is what a Verifier is made from.
type Config struct {
	// Share of the hits are verified, from 0 to 1.
	Share float64
	Cache *cache.Manager
	Keys  Keys
	// Repeat returns the op that executes a vertex once more, or what keeps it
	// from being executed (ops.Repeat).
	Repeat func(*solver.Vertex) (op solver.Op, obstacle string)
	// Settle is how long no build must have run before the first step is
	// executed: builds often come one right after the other.
	Settle time.Duration
	// Apart is how long after the first execution of a step the second one
	// begins: more than a second, so that what depends on the clock shows.
	Apart time.Duration
	Log   *slog.Logger
}

const (
	// maxQueue bounds what waits. Hits that come when it is full aren't verified.
	maxQueue = 256
	// maxTries bounds how often a check that builds interrupt starts over.
	maxTries = 5
	// maxTime bounds one check, which keeps what it works with from being pruned.
	maxTime = time.Hour
)

var (
	errBuild  = errors.New("a build has begun")
	errClosed = errors.New("the daemon is shutting down")
	errTime   = errors.New("it took longer than " + maxTime.String())
)

// Verifier checks hits while no build runs. Its methods are safe for concurrent
// use.
type Verifier struct {
	cfg  Config
	done chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex // guards the fields below
	wake    sync.Cond  // of mu: something below has changed
	builds  int        // that run
	settled bool       // no build has run for Settle
	timer   *time.Timer
	closed  bool
	queue   []*task
	queued  map[string]bool         // records in queue or being checked
	stop    context.CancelCauseFunc // of the check that runs; nil for none
	results results
}

// New starts a verifier. Close ends it.
func New(cfg Config) *Verifier {
	v := &Verifier{cfg: cfg, done: make(chan struct{}), settled: true, queued: map[string]bool{}}
	v.wake.L = &v.mu
	v.timer = time.AfterFunc(time.Hour, v.settle)
	v.timer.Stop()
	go v.loop()
	return v
}

// Close stops the check that runs and forgets those that wait.
func (v *Verifier) Close() {
	v.mu.Lock()
	v.closed = true
	v.timer.Stop()
	v.interruptLocked(errClosed)
	v.wake.Broadcast()
	v.mu.Unlock()
	<-v.done
}

func (v *Verifier) interruptLocked(why error) {
	if v.stop != nil {
		v.stop(why)
	}
}

// begin says that a build runs.
func (v *Verifier) begin() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.builds++
	v.settled = false
	v.timer.Stop()
	v.interruptLocked(errBuild)
}

// end says that a build is over, and offers its hits.
func (v *Verifier) end(hits []*task) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, t := range hits {
		v.offerLocked(t)
	}
	if v.builds--; v.builds == 0 && !v.closed {
		v.timer.Reset(v.cfg.Settle)
	}
}

func (v *Verifier) settle() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settled = v.builds == 0
	v.wake.Broadcast()
}

// offerLocked queues t, or not.
func (v *Verifier) offerLocked(t *task) {
	switch {
	case rand.Float64() >= v.cfg.Share, v.queued[t.id()]:
	case len(v.queue) >= maxQueue:
		v.results.skip("the queue is full")
	default:
		v.queued[t.id()] = true
		v.queue = append(v.queue, t)
	}
}

// loop works on the queue until Close.
func (v *Verifier) loop() {
	defer close(v.done)
	for {
		t, ctx := v.next()
		if t == nil {
			return
		}
		f := v.check(ctx, t)
		v.finish(ctx, t, f)
	}
}

// next waits for a task and for the time to do it; nil is the end.
func (v *Verifier) next() (*task, context.Context) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for !v.closed && (len(v.queue) == 0 || !v.settled) {
		v.wake.Wait()
	}
	if v.closed {
		return nil, nil
	}
	t := v.queue[0]
	v.queue = v.queue[1:]
	ctx, stop := context.WithCancelCause(context.Background())
	v.stop = stop
	return t, ctx
}

// finish counts and reports f, unless the check was interrupted: then it starts
// over, before what else waits.
func (v *Verifier) finish(ctx context.Context, t *task, f Finding) {
	v.mu.Lock()
	v.stop(nil)
	v.stop = nil
	cause := context.Cause(ctx)
	t.tries++
	switch interrupted := f.Outcome != Wrong && (errors.Is(cause, errBuild) || errors.Is(cause, errClosed)); {
	case interrupted && t.tries < maxTries:
		v.queue = append([]*task{t}, v.queue...)
		v.mu.Unlock()
		return
	case interrupted:
		f.Outcome, f.Detail = Skipped, "builds came too often"
	}
	delete(v.queued, t.id())
	v.results.add(f)
	v.mu.Unlock()
	f.log(v.cfg.Log)
}
