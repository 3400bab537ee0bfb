//go:build linux

package network

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

const (
	// makeTimeout bounds how long the making of a namespace may take in the
	// background: plugins are other people's programs.
	makeTimeout = time.Minute
	// settle is how long the kernel may take to free the last sockets of a
	// namespace; some kinds wait for all processors to notice.
	settle = 50 * time.Millisecond
	// usedKept is how many used namespaces wait to be used again, so that steps
	// find one each that ran side by side before.
	usedKept = 16
)

// errExhausted: everything by which namespaces could be connected is in use.
var errExhausted = errors.New("exhausted")

var errTooLong = errors.New("it takes too long")

// pool keeps namespaces ready.
type pool struct {
	make  func(context.Context) (*Namespace, error)
	ahead int // how many are made before they are needed
	keep  int // how many there are at most, with used ones
	log   *slog.Logger

	stop    context.CancelFunc
	workers sync.WaitGroup

	mu       sync.Mutex // guards the fields below; never held across I/O
	ready    []*Namespace
	old      []used // in the order in which they came
	busy     int    // workers that make or remove one now
	finished int    // how often one of them has done so
	failed   bool   // making ahead failed, and nobody has asked since
	closed   bool
	changed  chan struct{} // closed and replaced when one of these changes
}

// used is a namespace that isn't ready: it is to be removed, unless it is empty
// at last and may be used again.
type used struct {
	*Namespace
	again bool
	since time.Time
}

// newPool starts to make namespaces ahead, of which at most keep wait for use.
func newPool(ahead, keep int, log *slog.Logger, create func(context.Context) (*Namespace, error)) *pool {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pool{make: create, ahead: ahead, keep: max(ahead, keep), log: log, stop: cancel, changed: make(chan struct{})}
	p.workers.Go(func() { p.fill(ctx) })
	p.workers.Go(func() { p.clean(ctx) })
	return p
}

// do changes p's state and lets everybody know who waits for a change.
func (p *pool) do(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.changed)
	p.changed = make(chan struct{})
}

// await waits until ok, which is called with p locked, or until ctx ends.
func (p *pool) await(ctx context.Context, ok func() bool) error {
	for {
		p.mu.Lock()
		good, changed := ok(), p.changed
		p.mu.Unlock()
		if good {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Take returns a namespace: one that is ready if there is any.
func (p *pool) Take(ctx context.Context) (*Namespace, error) {
	p.do(func() { p.failed = false })
	for {
		n, finished, err := p.takeReady()
		if n != nil || err != nil {
			return n, err
		}
		n, err = p.make(ctx)
		if err == nil {
			n.pool = p
			return n, nil
		}
		if !errors.Is(err, errExhausted) {
			return nil, err
		}
		// What is missing may be in the hands of a worker.
		var more bool
		if werr := p.await(ctx, func() bool {
			more = len(p.ready) > 0 || p.finished != finished
			return more || p.busy == 0 && len(p.old) == 0
		}); werr != nil {
			return nil, werr
		}
		if !more {
			return nil, err
		}
	}
}

// takeReady returns nil if none is ready.
func (p *pool) takeReady() (n *Namespace, finished int, err error) {
	p.do(func() {
		switch last := len(p.ready) - 1; {
		case p.closed:
			err = errors.New("internal error: network is used after its end")
		case last >= 0:
			n = p.ready[last] // the one used last, if any
			p.ready = p.ready[:last]
		}
		finished = p.finished
	})
	return n, finished, err
}

// put takes back a namespace that was in use.
func (p *pool) put(n *Namespace, again bool) {
	empty := again && n.empty()
	p.do(func() {
		if empty && len(p.ready) < p.keep {
			p.ready = append(p.ready, n)
		} else {
			p.old = append(p.old, used{n, again && !empty, time.Now()})
		}
		p.failed = false
	})
}

// fill makes namespaces ahead.
func (p *pool) fill(ctx context.Context) {
	for {
		if p.await(ctx, func() bool { return len(p.ready) < p.ahead && !p.failed }) != nil {
			return
		}
		p.do(func() { p.busy++ })
		n, err := p.makeAhead(ctx)
		p.do(func() {
			p.busy--
			p.finished++
			if p.failed = err != nil; p.failed {
				return
			}
			n.pool = p
			if len(p.ready) < p.keep {
				p.ready = append(p.ready, n)
			} else { // so many have come back meanwhile
				p.old = append(p.old, used{Namespace: n})
			}
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, errExhausted) {
			// Take will meet the same error and return it.
			p.log.Warn("make network namespace ahead", "error", err)
		}
	}
}

func (p *pool) makeAhead(ctx context.Context) (*Namespace, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, makeTimeout, errTooLong)
	defer cancel()
	return p.make(ctx)
}

// clean removes namespaces that aren't used any more, until p is closed.
func (p *pool) clean(ctx context.Context) {
	for {
		var u used
		_ = p.await(context.Background(), func() bool { //nolint:errcheck // it doesn't end
			if len(p.old) > 0 {
				u, p.old = p.old[0], p.old[1:]
				p.busy++
			}
			return u.Namespace != nil || p.closed
		})
		if u.Namespace == nil {
			return
		}
		again := u.again && u.settled(ctx)
		p.do(func() {
			if again = again && len(p.ready) < p.keep; again {
				p.ready = append(p.ready, u.Namespace)
			}
		})
		if !again {
			if err := u.remove(); err != nil {
				p.log.Warn("remove network namespace", "error", err)
			}
		}
		p.do(func() { p.busy--; p.finished++ })
	}
}

// settled reports whether u is empty after a while, before ctx ends.
func (u used) settled(ctx context.Context) bool {
	timer := time.NewTimer(time.Until(u.since.Add(settle)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return u.empty()
	case <-ctx.Done():
		return false
	}
}

// Close removes all namespaces. None may be in use.
func (p *pool) Close() error {
	p.halt()
	return p.drop()
}

// halt ends the work in the background.
func (p *pool) halt() {
	p.stop()
	p.do(func() { p.closed = true })
	p.workers.Wait()
}

// drop removes the namespaces of a pool that was halted.
func (p *pool) drop() error {
	var errs []error
	for _, n := range p.ready {
		errs = append(errs, n.remove())
	}
	p.ready = nil
	return errors.Join(errs...)
}
