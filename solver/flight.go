package solver

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
)

// flights are the executions that run, of all builds. The same op on the same
// inputs runs once: whoever asks joins, sees its log from the start, and gets
// results of its own. It is cancelled when the last one leaves.
//
// Who may join: whoever's flightKey is the same, and that has all in it that an
// execution can see.
//   - The op's digest, and whether the cache is ignored.
//   - Each input: by what the op sees of it, if that was digested, or else the
//     very record.
//   - The build's Domain: what it was granted.
//   - The SharingKey of an op that may read from a session. It has, in place of
//     each secret, a keyed hash of what the asker's own session says it is,
//     asked before joining; for what can't be compared, such as an SSH agent or a
//     client's files, the sessions themselves. So a step runs with the secrets
//     of any one that waits, for they are the same, and never with those of
//     somebody who gets a result that his own would not have made.
//
// Nothing of it enters a cache key, and the hashes die with the process.
type flights struct {
	mu      sync.Mutex // guards table and what each flight says; never held across I/O
	table   map[flightKey]*flight
	running sync.WaitGroup
}

// flightKey is what must agree for an execution to be shared.
type flightKey struct {
	what string // the op, what it sees of its inputs, and who may share with whom
	own  string // SharingKey of a Sharer
}

// flight is one execution.
//
//	in the table --> landed: outputs and err are set, its keys are saved, the
//	     |           log is closed, and it is out of the table
//	     `---------> cancelled by the last who left; nobody joins any more
type flight struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	log    progress.Stream
	done   chan struct{} // closed when the fields at the end are set
	leader *Execute      // whose keys are saved when it lands
	key    flightKey

	waiters  []*waiter // who hasn't left; guarded by flights.mu
	shares   int       // how many may still take their share; guarded by flights.mu
	deserted bool      // somebody left before it landed; guarded by flights.mu
	landed   bool      // guarded by flights.mu

	outputs []Output // released when no share is left
	cached  bool     // outputs are the wanted ones of the leader, loaded
	err     error
	left    *Remains // of err, if that has some; released with outputs
}

type waiter struct{ value any }

// flightAsker is whoever waits for the flight now.
type flightAsker struct {
	f  *flight
	fs *flights
}

func (a flightAsker) Values() []any {
	a.fs.mu.Lock()
	defer a.fs.mu.Unlock()
	out := make([]any, len(a.f.waiters))
	for i, w := range a.f.waiters {
		out[i] = w.value
	}
	return out
}

// Identity names the execution, in every process that has the same cache: what
// runs on what, and who may share it. What Sharer adds is not in it.
func (a flightAsker) Identity() string { return a.f.key.what }

// join enters the flight named key for a build whose value is given, and starts
// it if there is none.
func (s *Solver) join(key flightKey, eff *Execute, value any) (*flight, *waiter) {
	fs := &s.flights
	w := &waiter{value: value}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.table[key]
	if f == nil || f.ctx.Err() != nil {
		f = &flight{done: make(chan struct{}), leader: eff, key: key}
		f.ctx, f.cancel = context.WithCancelCause(context.Background())
		fs.table[key] = f
		inputs := make([]Result, len(eff.Inputs))
		for i, in := range eff.Inputs {
			inputs[i] = in.Clone()
		}
		fs.running.Go(func() { s.fly(f, inputs) })
	}
	f.waiters = append(f.waiters, w)
	f.shares++
	return f, w
}

// leave takes w off the flight. The last one cancels it and is told so.
func (fs *flights) leave(f *flight, w *waiter) (last bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.deserted = f.deserted || !f.landed
	f.waiters = slices.DeleteFunc(f.waiters, func(other *waiter) bool { return other == w })
	if len(f.waiters) > 0 {
		return false
	}
	f.cancel(ErrUnwanted)
	return true
}

// settle counts a waiter that took its share or left. What nobody takes any
// more is released.
func (fs *flights) settle(f *flight) {
	fs.mu.Lock()
	f.shares--
	over := f.landed && f.shares == 0
	fs.mu.Unlock()
	if over {
		f.release()
	}
}

func (f *flight) release() {
	for _, out := range f.outputs {
		out.Result.Release()
	}
	f.left.Release()
}

// fly does the work of a flight; it owns inputs.
func (s *Solver) fly(f *flight, inputs []Result) {
	f.err = protect(f.leader.Vertex, func() error { return s.run(f, inputs) })
	errors.As(f.err, &f.left)
	if f.err == nil && !f.cached {
		// Before the flight leaves the table, so that who comes too late to
		// join finds the result.
		s.keep(f)
	}
	for _, in := range inputs {
		in.Release()
	}
	s.flights.mu.Lock()
	if s.flights.table[f.key] == f {
		delete(s.flights.table, f.key)
	}
	f.landed = true
	over := f.shares == 0
	s.flights.mu.Unlock()
	f.log.Close()
	f.cancel(nil)
	close(f.done)
	if over {
		f.release()
	}
}

// run looks whether the results have landed since they were last asked for, and
// executes otherwise.
func (s *Solver) run(f *flight, inputs []Result) error {
	v := f.leader.Vertex
	ctx := progress.With(f.ctx, progress.NewScope(&f.log, v.Digest))
	who := flightAsker{f, &s.flights}
	if !v.IgnoreCache && !f.leader.Transient {
		if f.cached = s.landed(ctx, f); f.cached {
			return nil
		}
	}
	if l, ok := v.Op.(Limiter); ok {
		release, err := l.Acquire(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	now := time.Now()
	f.log.Write(progress.Event{Vertex: &progress.Vertex{Started: &now}}) // the mark that it really runs
	for i, dep := range f.leader.Deps {
		if dep.Prepare == nil {
			continue
		}
		if err := dep.Prepare(ctx, who, inputs[i]); err != nil {
			return lostInput(err, i)
		}
	}
	outputs, err := v.Op.Exec(ctx, who, inputs)
	if err != nil {
		return err
	}
	for i, r := range outputs {
		if r != nil {
			f.outputs = append(f.outputs, Output{Index: i, Result: r})
		}
	}
	return nil
}

// landed loads every output that the leader wants. It reports false, and has
// loaded none, if not all can be had.
func (s *Solver) landed(ctx context.Context, f *flight) bool {
	for _, w := range f.leader.Wanted {
		r, keys := s.find(ctx, w.Lookup)
		if r == nil {
			f.release()
			f.outputs = nil
			return false
		}
		f.outputs = append(f.outputs, Output{Index: w.Save.Output, Result: r, Keys: keys})
	}
	return true
}

// find loads the newest record that can be had, or returns nil.
func (s *Solver) find(ctx context.Context, l Lookup) (Result, []Key) {
	found, err := s.opts.Keys.Lookup(l)
	if err != nil {
		return nil, nil // the build's own lookup has warned
	}
	for _, record := range found.Records {
		if r, err := s.opts.Results.Load(ctx, record.Result); err == nil {
			return r, found.Keys
		}
	}
	return nil, nil
}

// ranMeanwhile says whether somebody has run the same step as f since f began, who
// had other secrets, say, and has output i of it, for all to find from then on. What
// was made of that one wasn't made of f's.
func (s *Solver) ranMeanwhile(f *flight, i int) bool {
	if _, ok := f.leader.Vertex.Op.(Sharer); !ok || f.leader.Vertex.IgnoreCache {
		return false
	}
	lookup := f.leader.Save(i).Lookup
	for _, w := range f.leader.Wanted {
		if w.Save.Output == i {
			lookup = w.Lookup
		}
	}
	r, _ := s.find(f.ctx, lookup)
	if r == nil {
		return false
	}
	r.Release()
	return true
}

// keep makes what f made findable.
func (s *Solver) keep(f *flight) {
	if f.leader.Transient {
		return
	}
	for i := range f.outputs {
		out := &f.outputs[i]
		save := f.leader.Save(out.Index)
		out.Apart = s.ranMeanwhile(f, out.Index)
		save.Result, out.Keys = out.Result, save.Keys
		if err := s.opts.Keys.Save(save); err != nil {
			s.opts.Warn("keep a result", "vertex", f.leader.Vertex.Name, "error", err)
			f.log.Write(progress.Event{Log: &progress.Log{
				Stream: 2, Data: []byte("the result is not kept in the cache: " + err.Error() + "\n"), Timestamp: time.Now(),
			}})
		}
	}
}
