package solver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
)

// perform does eff without waiting; outcomes come back as events.
func (b *Build) perform(eff Effect) {
	switch eff := eff.(type) {
	case *Announce:
		b.announce(eff)
		b.tell(func(o Observer) { o.Announced(eff) })
	case *Cached:
		b.graph.Cached(eff.Vertex)
	case *Release:
		eff.Result.Release()
	case *Answer:
		b.answer(eff)
	case *Cancel:
		eff.Execute.stop(ErrUnwanted)
	case *Query:
		b.storage.put(func() { b.query(eff) })
	case *Link:
		b.storage.put(func() { b.save("link cache keys", eff.Save) })
	case *Adopt:
		b.adopt(eff)
	case *Drop:
		b.tell(func(o Observer) { o.Dropped(eff) })
		b.storage.put(func() { b.drop(eff) })
	case *GetCacheMap:
		b.start(&b.maps, eff.Vertex, func() { b.events.put(b.cacheMap(eff)) })
	case *Load:
		b.tell(func(o Observer) { o.Loading(eff) })
		b.work.Go(func() { b.events.put(b.load(eff)) })
	case *Digest:
		b.start(&b.digests, eff.Vertex, func() { b.events.put(b.digest(eff)) })
	case *Execute:
		var ctx context.Context
		ctx, eff.stop = context.WithCancelCause(b.ctx)
		b.start(&b.runs, eff.Vertex, func() {
			defer eff.stop(nil)
			b.events.put(b.execute(ctx, eff))
		})
	default:
		panic(fmt.Sprintf("internal error: effect of unknown kind %T", eff))
	}
}

// start has what v's op is needed for done: at once, or, if it is a Small one, by
// small when its turn comes.
func (b *Build) start(small *crew, v *Vertex, fn func()) {
	if _, ok := v.Op.(Small); ok {
		small.do(&b.work, fn)
	} else {
		b.work.Go(fn)
	}
}

func (b *Build) announce(a *Announce) {
	inputs := make([]*Vertex, len(a.Inputs))
	for i, in := range a.Inputs {
		inputs[i] = in.Vertex
	}
	b.graph.Add(a.Vertex, a.Vertex.Digest, a.Vertex.Name, a.Vertex.Group, inputs)
}

// query asks all key stores. One that can't be read has nothing.
func (b *Build) query(eff *Query) {
	found, err := b.solver.opts.Keys.Lookup(eff.Lookup)
	if err != nil {
		b.solver.opts.Warn("look up cache keys", "vertex", eff.Edge.Vertex.Name, "error", err)
		found = Found{Keys: eff.Lookup.Roots, Matched: make([]bool, len(eff.Lookup.Inputs))}
	}
	for i, im := range b.importsNow() {
		more, ierr := im.Keys.Lookup(eff.Lookup)
		if ierr != nil {
			b.solver.opts.Warn("look up imported cache keys", "import", im.Name, "vertex", eff.Edge.Vertex.Name, "error", ierr)
			b.tell(func(o Observer) { o.ImportFailed(im.Name, ierr) })
			continue
		}
		found.add(more, i+1)
	}
	b.tell(func(o Observer) { o.Queried(eff, found) })
	b.events.put(&Queried{Query: eff, Found: found})
}

// adopt makes what an import has the daemon's own: the result if there is one
// and it can be had, at least the keys.
func (b *Build) adopt(eff *Adopt) {
	save := eff.Save
	if eff.Record.Import == 0 || save.Result != nil {
		b.storage.put(func() {
			b.save("keep an imported result", save)
			release(save.Result)
		})
		return
	}
	b.work.Go(func() {
		r, err := b.results(eff.Record).Load(b.ctx, eff.Record.Result)
		if err != nil && b.ctx.Err() == nil {
			b.solver.opts.Warn("load an imported result", "record", eff.Record.String(), "error", err)
		}
		save.Result = r
		b.storage.put(func() {
			b.save("keep an imported result", save)
			release(r)
		})
	})
}

// results is the store that has r.
func (b *Build) results(r Record) ResultStore {
	if r.Import == 0 {
		return b.solver.opts.Results
	}
	return b.importsNow()[r.Import-1].Results
}

// save warns if it can't: the result is good, it is only not found again.
func (b *Build) save(what string, s Save) {
	if err := b.solver.opts.Keys.Save(s); err != nil {
		b.solver.opts.Warn(what, "error", err)
	}
}

// drop quarantines records: nothing finds them any more.
func (b *Build) drop(eff *Drop) {
	b.solver.opts.Warn("cache records are lost", "records", eff.Records, "reason", eff.Reason)
	if err := b.solver.opts.Keys.Drop(eff.Records); err != nil {
		b.solver.opts.Warn("forget lost records", "records", eff.Records, "error", err)
	}
}

func (b *Build) load(eff *Load) *Loaded {
	ev := &Loaded{Load: eff}
	ev.Result, ev.Err = b.results(eff.Record).Load(b.ctx, eff.Record.Result)
	return ev
}

// asker is this build alone.
type asker struct{ value any }

func (a asker) Values() []any { return []any{a.value} }

func (b *Build) cacheMap(eff *GetCacheMap) *GotCacheMap {
	v := eff.Vertex
	ev := &GotCacheMap{GetCacheMap: eff}
	// Most cache maps cost nothing: the vertex is shown to run once its op has
	// something to tell.
	var start sync.Once
	started := false
	w := progress.WriterFunc(func(e progress.Event) {
		start.Do(func() {
			started = true
			b.graph.Start(v, time.Now())
		})
		b.opts.Progress.Write(e)
	})
	ctx := progress.With(b.ctx, progress.NewScope(w, b.graph.Digest(v)))
	ev.Err = protect(v, func() (err error) {
		ev.Map, ev.More, err = v.Op.CacheMap(ctx, asker{b.opts.Value}, eff.Index)
		return err
	})
	start.Do(func() {}) // what comes later doesn't start it again
	if started || ev.Err != nil && b.ctx.Err() == nil {
		b.graph.Complete(v, ev.Err)
	}
	return ev
}

func (b *Build) digest(eff *Digest) *Digested {
	v := eff.Vertex
	defer eff.Result.Release()
	ev := &Digested{Digest: eff}
	ctx := progress.With(b.ctx, b.graph.Scope(v))
	ev.Err = protect(v, func() (err error) {
		if eff.Dep.Prepare != nil {
			if err := eff.Dep.Prepare(ctx, asker{b.opts.Value}, eff.Result); err != nil {
				return err
			}
		}
		ev.Content, err = eff.Dep.Content(ctx, asker{b.opts.Value}, eff.Result)
		return err
	})
	if ev.Err != nil && asLost(ev.Err) == nil && b.ctx.Err() == nil {
		b.graph.Complete(v, ev.Err)
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

// asLost is the loss that err tells of; nil if it tells of none.
func asLost(err error) *LostError {
	if err == nil {
		return nil // most often, and at no cost
	}
	var lost *LostError
	errors.As(err, &lost)
	return lost
}
