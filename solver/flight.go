package solver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/internal/progress"
)

// flights are the executions that run, of all builds. The same op on the same
// inputs runs once: whoever asks joins, sees its log from the start, and gets a
// result of its own. It is cancelled when the last one leaves.
type flights struct {
	mu      sync.Mutex // guards table and what each flight says; never held across I/O
	table   map[string]*flight
	running sync.WaitGroup
}

type flight struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	log    progress.Stream
	done   chan struct{} // closed once outputs, cached and err are set

	waiters []*waiter // guarded by flights.mu
	left    int       // how many may still take their share; guarded by flights.mu
	landed  bool      // guarded by flights.mu
	leader  *Build    // who started it

	outputs map[int]Result // released when nobody is left
	cached  bool
	err     error
}

type waiter struct{ value any }

// Values are those of the builds that wait now.
func (f *flight) values(fs *flights) []any {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	out := make([]any, len(f.waiters))
	for i, w := range f.waiters {
		out[i] = w.value
	}
	return out
}

type flightAsker struct {
	f  *flight
	fs *flights
}

func (a flightAsker) Values() []any { return a.f.values(a.fs) }

// execute runs eff, or joins whoever runs the same.
func (b *Build) execute(ctx context.Context, eff *Execute) *Executed {
	v := eff.Vertex
	defer func() {
		for _, in := range eff.Inputs {
			in.Release()
		}
	}()
	ev := &Executed{Vertex: v}
	key, err := b.flightKey(ctx, eff)
	if err != nil {
		ev.Err = err
		b.report.complete(v, err)
		return ev
	}
	f, w := b.join(key, eff)
	follow, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	followed := make(chan struct{})
	go func() {
		defer close(followed)
		b.follow(follow, f, v)
	}()
	select {
	case <-f.done:
		<-followed
		ev.take(b, f, eff)
	case <-ctx.Done():
		if b.solver.flights.leave(f, w) {
			<-f.done // nothing of it is left when the build is over
		}
		stop()
		<-followed
		ev.Err = context.Cause(ctx)
	}
	b.solver.flights.settle(f)
	switch {
	case ev.Err == nil && ev.Cached:
		b.report.cached(v)
	case errors.Is(ev.Err, errClosed), errors.Is(ev.Err, errUnwanted), isLost(ev.Err):
	default:
		b.report.complete(v, ev.Err)
	}
	return ev
}

// take gets this waiter's share of the outcome.
func (ev *Executed) take(b *Build, f *flight, eff *Execute) {
	ev.Cached = f.cached
	if ev.Err = f.err; ev.Err != nil {
		return
	}
	ev.Outputs = map[int]Result{}
	for _, s := range eff.Saves {
		r := f.outputs[s.Output]
		if r == nil {
			for _, got := range ev.Outputs {
				got.Release()
			}
			ev.Err = fmt.Errorf("internal error: %s has no output %d", eff.Vertex.Name, s.Output)
			return
		}
		ev.Outputs[s.Output] = r.Clone()
		if f.leader != b { // whose keys are saved already
			s.Result = r
			b.warn(b.solver.opts.Keys.Save(s))
		}
	}
}

// follow copies the flight's log to this build, from the start.
func (b *Build) follow(ctx context.Context, f *flight, v *Vertex) {
	scope := b.report.scope(v)
	r := f.log.NewReader()
	for {
		events, err := r.Next(ctx) // ends with the flight
		if err != nil {
			return
		}
		for _, e := range events {
			if e.Vertex != nil { // the mark that it really runs
				b.report.start(v)
				continue
			}
			scope.Write(e)
		}
	}
}

// flightKey is what must agree for an execution to be shared.
func (b *Build) flightKey(ctx context.Context, eff *Execute) (string, error) {
	var s strings.Builder
	fmt.Fprintf(&s, "%s\x00%s\x00%v", eff.Op, b.opts.Domain, eff.Vertex.IgnoreCache)
	for _, in := range eff.Inputs {
		s.WriteByte(0)
		s.WriteString(in.ID())
	}
	for _, save := range eff.Saves {
		fmt.Fprintf(&s, "\x00%d", save.Output)
	}
	sharer, ok := eff.Vertex.Op.(Sharer)
	if !ok {
		return s.String(), nil
	}
	var own string
	err := protect(eff.Vertex, func() (err error) {
		own, err = sharer.SharingKey(progress.With(ctx, b.report.scope(eff.Vertex)), asker{b.opts.Value})
		return err
	})
	return s.String() + "\x00" + own, err
}

// join enters the flight named key, starting it if there is none.
func (b *Build) join(key string, eff *Execute) (*flight, *waiter) {
	fs := &b.solver.flights
	w := &waiter{value: b.opts.Value}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.table[key]
	if f != nil && f.ctx.Err() == nil {
		f.waiters = append(f.waiters, w)
		f.left++
		return f, w
	}
	f = &flight{done: make(chan struct{}), waiters: []*waiter{w}, left: 1, leader: b}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	fs.table[key] = f
	inputs := make([]Result, len(eff.Inputs))
	for i, in := range eff.Inputs {
		inputs[i] = in.Clone()
	}
	fs.running.Go(func() { b.solver.fly(key, f, eff, inputs) })
	return f, w
}

// leave takes w off the flight. The last one cancels it and is told so.
func (fs *flights) leave(f *flight, w *waiter) (last bool) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f.waiters = slices.DeleteFunc(f.waiters, func(other *waiter) bool { return other == w })
	if len(f.waiters) == 0 {
		f.cancel(errUnwanted)
		return true
	}
	return false
}

// settle counts a waiter that took its share or left. What nobody takes any
// more is released.
func (fs *flights) settle(f *flight) {
	fs.mu.Lock()
	f.left--
	over := f.landed && f.left == 0
	fs.mu.Unlock()
	if over {
		f.release()
	}
}

func (f *flight) release() {
	for _, r := range f.outputs {
		r.Release()
	}
}

// fly does the work of a flight.
func (s *Solver) fly(key string, f *flight, eff *Execute, inputs []Result) {
	f.err = protect(eff.Vertex, func() error { return s.run(f, eff, inputs) })
	if f.err == nil {
		s.save(f, eff)
	}
	for _, in := range inputs {
		in.Release()
	}
	s.flights.mu.Lock()
	if s.flights.table[key] == f {
		delete(s.flights.table, key)
	}
	f.landed = true
	over := f.left == 0
	s.flights.mu.Unlock()
	f.log.Close()
	f.cancel(nil)
	close(f.done)
	if over {
		f.release()
	}
}

// save makes the outputs findable before the flight leaves the table, so that
// who comes too late to join finds them.
func (s *Solver) save(f *flight, eff *Execute) {
	if f.cached {
		return
	}
	for _, save := range eff.Saves {
		if save.Result = f.outputs[save.Output]; save.Result != nil {
			if err := s.opts.Keys.Save(save); err != nil {
				f.log.Write(progress.Event{Log: &progress.Log{Stream: 2, Data: []byte("the result is not kept in the cache: " + err.Error() + "\n")}})
			}
		}
	}
}

// run looks whether the result has landed since it was last asked for, and
// executes otherwise.
func (s *Solver) run(f *flight, eff *Execute, inputs []Result) error {
	v := eff.Vertex
	ctx := progress.With(f.ctx, progress.NewScope(&f.log, v.Digest))
	who := flightAsker{f, &s.flights}
	if !v.IgnoreCache && s.landed(ctx, f, eff) {
		f.cached = true
		return nil
	}
	if l, ok := v.Op.(Limiter); ok {
		release, err := l.Acquire(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	f.log.Write(progress.Event{Vertex: &progress.Vertex{}})
	for i, dep := range eff.Deps {
		if dep.Prepare == nil {
			continue
		}
		if err := dep.Prepare(ctx, who, inputs[i]); err != nil {
			return lostInput(err, i)
		}
	}
	outputs, err := v.Op.Exec(ctx, who, inputs)
	if err != nil {
		if f.ctx.Err() != nil {
			return context.Cause(f.ctx)
		}
		return err
	}
	f.outputs = map[int]Result{}
	for i, r := range outputs {
		f.outputs[i] = r
	}
	return nil
}

func isLost(err error) bool {
	var lost *LostError
	return errors.As(err, &lost)
}

// lostInput says which input a loss is of: Prepare sees only one.
func lostInput(err error, i int) error {
	var lost *LostError
	if errors.As(err, &lost) {
		return &LostError{Inputs: []int{i}, Err: lost.Err}
	}
	return err
}

// landed loads every wanted output if all of them can be had.
func (s *Solver) landed(ctx context.Context, f *flight, eff *Execute) bool {
	got := map[int]Result{}
	for _, save := range eff.Saves {
		found, err := s.opts.Keys.Lookup(save.Lookup)
		if err == nil && len(found.Records) > 0 {
			if r, err := s.opts.Results.Load(ctx, found.Records[0].Result); err == nil {
				got[save.Output] = r
				continue
			}
		}
		for _, r := range got {
			r.Release()
		}
		return false
	}
	f.outputs = got
	return len(got) > 0
}
