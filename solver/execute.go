package solver

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/progress"
)

// execute runs eff, or joins whoever runs the same.
func (b *Build) execute(ctx context.Context, eff *Execute) *Executed {
	defer func() {
		for _, in := range eff.Inputs {
			in.Release()
		}
	}()
	ev := &Executed{Execute: eff}
	// When its turn comes nobody may want it any more.
	ev.Err = cmp.Or(context.Cause(b.ctx), context.Cause(ctx))
	var key flightKey
	if ev.Err == nil {
		key, ev.Err = b.flightKey(ctx, eff)
	}
	for again := ev.Err == nil; again; {
		again = b.board(ctx, key, eff, ev)
	}
	if ctx.Err() != nil && ev.Err != nil {
		ev.Err = context.Cause(ctx) // and no failure of the vertex
	}
	b.tell(func(o Observer) { o.Ended(eff, ev) })
	switch {
	case ev.Err == nil && ev.Cached:
		b.graph.Cached(eff.Vertex)
	case ev.Interrupted():
	default:
		b.graph.Complete(eff.Vertex, ev.Err)
	}
	return ev
}

// board joins a flight, waits for it and sets ev to its outcome. It reports
// whether that isn't an answer to eff.
func (b *Build) board(ctx context.Context, key flightKey, eff *Execute, ev *Executed) (again bool) {
	fs := &b.solver.flights
	f, w := b.solver.join(key, eff, b.opts.Value)
	defer fs.settle(f)

	followCtx, unfollow := context.WithCancel(context.WithoutCancel(ctx))
	defer unfollow()
	left := make(chan struct{})
	stay := context.AfterFunc(ctx, func() {
		defer close(left)
		if fs.leave(f, w) {
			<-f.done // nothing of it is left when the build is over
		}
		unfollow()
	})
	b.follow(followCtx, f, eff)
	if stay() {
		<-f.done
		return b.share(ctx, f, eff, ev)
	}
	<-left
	ev.Err = context.Cause(ctx)
	return false
}

// share takes this waiter's part of what f, which is done, brought. It reports
// whether it has to be tried again: who asked for other outputs may have found
// only those in the cache, and a failure may be due to somebody who has left or
// to a record that only others brought, which must not become that of those who
// stayed.
func (b *Build) share(ctx context.Context, f *flight, eff *Execute, ev *Executed) (again bool) {
	if f.err != nil {
		ev.Err = f.err
		if lost := asLost(f.err); lost != nil {
			return ctx.Err() == nil && !f.flewWith(eff, lost.Inputs)
		}
		fs := &b.solver.flights
		fs.mu.Lock()
		again = f.deserted && ctx.Err() == nil
		fs.mu.Unlock()
		if !again {
			ev.Err = b.remain(f)
		}
		return again
	}
	for _, w := range eff.Wanted {
		if f.output(w.Save.Output) == nil {
			ev.Err = fmt.Errorf("internal error: %s has no output %d", eff.Vertex.Name, w.Save.Output)
			return f.cached
		}
	}
	ev.Err, ev.Cached, ev.Outputs = nil, f.cached, slices.Clone(f.outputs)
	for i := range ev.Outputs {
		ev.Outputs[i].Result = ev.Outputs[i].Result.Clone()
	}
	if (f.cached || f.leader != eff) && !eff.Transient {
		for _, w := range eff.Wanted {
			b.save("link cache keys", f.known(w.Save))
		}
	}
	return false
}

// flewWith reports whether the given inputs of the flight are eff's: those that
// agree in content may be other records.
func (f *flight) flewWith(eff *Execute, inputs []int) bool {
	return !slices.ContainsFunc(inputs, func(i int) bool {
		return i >= 0 && i < len(eff.Inputs) && eff.Inputs[i].ID() != f.leader.Inputs[i].ID()
	})
}

// known is how what f brought is found, beside the keys that it is found by
// already, by what somebody else knows of the inputs.
func (f *flight) known(s Save) Save {
	out := f.output(s.Output)
	if len(s.Inputs) == 0 {
		s.Result = out.Result
	} else {
		s.Keys = out.Keys
	}
	return s
}

// output is what f made of output i; nil if nothing.
func (f *flight) output(i int) *Output {
	for n := range f.outputs {
		if f.outputs[n].Index == i {
			return &f.outputs[n]
		}
	}
	return nil
}

// follow copies the flight's log to this build, from the start.
func (b *Build) follow(ctx context.Context, f *flight, eff *Execute) {
	v := eff.Vertex
	scope := b.graph.Scope(v)
	r := f.log.NewReader()
	for {
		events, err := r.Next(ctx)
		if err != nil {
			return // the flight, or the wait for it, is over
		}
		for _, e := range events {
			if e.Vertex != nil { // the mark that it really runs
				b.graph.Start(v, *e.Vertex.Started)
				b.tell(func(o Observer) { o.Starts(eff, scope) })
				continue
			}
			scope.Write(e)
		}
	}
}

// flightKey makes the key of eff's execution.
func (b *Build) flightKey(ctx context.Context, eff *Execute) (key flightKey, err error) {
	var s strings.Builder
	fmt.Fprintf(&s, "%s %q %v", eff.Ops[len(eff.Ops)-1], b.opts.Domain, eff.Vertex.IgnoreCache)
	for i, in := range eff.Inputs {
		if eff.Contents != nil && eff.Contents[i] != (Key{}) {
			fmt.Fprintf(&s, " content %s", eff.Contents[i])
		} else {
			fmt.Fprintf(&s, " result %q %q", in.ID(), eff.Deps[i].Selector)
		}
	}
	key.what = s.String()
	sharer, ok := eff.Vertex.Op.(Sharer)
	if !ok {
		return key, nil
	}
	err = protect(eff.Vertex, func() (err error) {
		key.own, err = sharer.SharingKey(progress.With(ctx, b.graph.Scope(eff.Vertex)), asker{b.opts.Value})
		return err
	})
	return key, err
}

// lostInput says which input a loss is of: Prepare sees only one.
func lostInput(err error, i int) error {
	if lost := asLost(err); lost != nil {
		return &LostError{Inputs: []int{i}, Err: lost.Err}
	}
	return err
}
