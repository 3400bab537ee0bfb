package ops

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/cleanup"
)

// interruptedSteps are the steps of earlier daemons that go on, or have ended,
// and that nobody has asked for yet. What they use and write to is held.
type interruptedSteps struct {
	mu     sync.Mutex // guards the fields below
	steps  map[string]*interruptedStep
	leave  bool // what is left at the end is left again
	ending sync.WaitGroup
}

// interruptedStep is one of them. Who takes it off the table owns it.
type interruptedStep struct {
	supervisor.Step
	from   *supervisor.Earlier
	note   stepNote
	layers []mountLayer
	undo   cleanup.Stack // gives cache mounts back
	lapse  *time.Timer
}

// Written lists what the steps of earlier daemons write to, for cache.Config.
func Written(earlier []*supervisor.Earlier) (out []cache.Interrupted) {
	for _, e := range earlier {
		for _, s := range e.Steps {
			var n stepNote
			if json.Unmarshal(s.Note, &n) != nil {
				continue // TakeUp says so
			}
			for _, l := range n.Layers {
				if l.Written != nil {
					out = append(out, *l.Written)
				}
			}
		}
	}
	return out
}

// TakeUp holds the steps of earlier daemons until they are asked for, or
// unclaimed has passed. The cache was opened with what they write to. A step for
// which something is missing is ended.
func (l *Loader) TakeUp(ctx context.Context, earlier []*supervisor.Earlier, unclaimed time.Duration) {
	for _, e := range earlier {
		for _, s := range e.Steps {
			i := &interruptedStep{Step: s, from: e}
			err := i.take(ctx, l)
			if err == nil {
				err = l.interrupted.add(ctx, l, i, unclaimed)
			}
			if err != nil {
				l.cfg.Log.Warn("a step of an earlier daemon can't go on and is ended", "step", s.ID, "error", errors.Join(err, i.end(ctx)))
				continue
			}
			l.cfg.Log.Info("a step of an earlier daemon goes on", "step", s.ID, "started", s.Started, "ends unless asked for in", unclaimed)
		}
	}
}

// take gets what the step uses. What it got before an error is end's to give
// back.
func (i *interruptedStep) take(ctx context.Context, l *Loader) error {
	if err := json.Unmarshal(i.Note, &i.note); err != nil {
		return fmt.Errorf("read what is known of it: %w", err)
	}
	var errs []error // and go on: what the cache has adopted must be taken
	for _, n := range i.note.Layers {
		layer := mountLayer{index: n.Mount}
		var err error
		switch {
		case n.Written != nil:
			layer.mutable, err = l.cfg.Cache.Adopted(*n.Written)
		case n.Ref != "":
			layer.ref, err = l.cfg.Cache.Get(ctx, n.Ref)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		i.layers = append(i.layers, layer)
	}
	for _, n := range i.note.Caches {
		dir, err := l.caches.takeUp(ctx, n)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		i.undo.Add(func() error { return l.caches.release(ctx, dir) })
	}
	return errors.Join(errs...)
}

// end ends the step, if it still runs, and gives back what it held.
func (i *interruptedStep) end(ctx context.Context) error {
	err := i.from.End(ctx, i.ID)
	s := mountSet{layers: i.layers, undo: i.undo}
	return errors.Join(err, s.close(context.WithoutCancel(ctx)))
}

func (t *interruptedSteps) add(ctx context.Context, l *Loader, i *interruptedStep, unclaimed time.Duration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.steps[i.note.Identity] != nil {
		return errors.New("there is another one that does the same")
	}
	if t.steps == nil {
		t.steps = map[string]*interruptedStep{}
	}
	t.steps[i.note.Identity] = i
	i.lapse = time.AfterFunc(unclaimed, func() {
		if !t.drop(i) {
			return
		}
		defer t.ending.Done()
		l.cfg.Log.Warn("ending a step of an earlier daemon that nobody has asked for", "step", i.ID)
		if err := i.end(ctx); err != nil {
			l.cfg.Log.Warn("end a step of an earlier daemon", "step", i.ID, "error", err)
		}
	})
	return nil
}

// drop takes i off the table, if it is there, for somebody who calls ending.Done.
func (t *interruptedSteps) drop(i *interruptedStep) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.steps[i.note.Identity] != i {
		return false
	}
	delete(t.steps, i.note.Identity)
	t.ending.Add(1)
	return true
}

// claim takes the step named identity, which is the caller's from now on; nil if
// there is none.
func (t *interruptedSteps) claim(identity string) *interruptedStep {
	t.mu.Lock()
	defer t.mu.Unlock()
	i := t.steps[identity]
	if i == nil || identity == "" {
		return nil
	}
	i.lapse.Stop()
	delete(t.steps, identity)
	return i
}

// has reports whether claim would find a step.
func (t *interruptedSteps) has(identity string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.steps[identity] != nil
}

// Leave has Close leave the steps of earlier daemons to the next one, again.
func (l *Loader) Leave() {
	l.interrupted.mu.Lock()
	defer l.interrupted.mu.Unlock()
	l.interrupted.leave = true
}

// Close ends the steps of earlier daemons that nobody has asked for.
func (l *Loader) Close() error {
	t := &l.interrupted
	t.mu.Lock()
	left, leave := t.steps, t.leave
	t.steps = nil
	t.mu.Unlock()
	var errs []error
	for _, i := range left {
		i.lapse.Stop()
		if leave {
			s := mountSet{layers: i.layers, undo: i.undo}
			errs = append(errs, s.leave(context.Background()), s.close(context.Background()))
			continue
		}
		errs = append(errs, i.end(context.Background()))
	}
	t.ending.Wait()
	return errors.Join(errs...)
}

// takeUp holds the cache mount of a step that an earlier daemon has left.
func (c *cacheMounts) takeUp(ctx context.Context, n noteCache) (_ *cacheDir, err error) {
	k := c.enter(n.Key, n.ID)
	defer func() {
		if err != nil {
			c.leave(k)
		}
	}()
	if err := k.turn.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	defer k.turn.Release(1)
	for _, d := range k.dirs {
		if d.mutable.ID() == n.Record && d.shared && n.Shared {
			d.users++
			return d, nil
		}
	}
	mutable, err := c.cache.GetMutable(ctx, n.Record)
	if err != nil {
		return nil, fmt.Errorf("cache mount %q: %w", n.ID, err)
	}
	mounts, err := mutable.Mounts(ctx, false)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cache mount %q: %w", n.ID, err), release(ctx, mutable))
	}
	d := newCacheDir(k, mutable, mounts, n.Shared)
	k.dirs = append(k.dirs, d)
	return d, nil
}
