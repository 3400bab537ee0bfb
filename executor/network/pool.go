//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// makeTimeout bounds how long the making of a namespace may take in the
	// background: plugins are other people's programs.
	makeTimeout = time.Minute
	// settleLast is how long the kernel may take to free the last sockets of a
	// namespace; some kinds wait for all processors to notice. It is looked whether
	// it has after settleFirst, and then after twice as long each time.
	settleFirst = 2 * time.Millisecond
	settleLast  = 64 * time.Millisecond
	// remembered bounds how many namespaces wait for as many steps as there once
	// were at the same time. One takes 210 kB of the kernel's memory, 320 on the
	// bridge: all of them 40 MB.
	remembered = 128
	// memory is for how long, and up to twice that, it is known how many were used
	// at once.
	memory = 5 * time.Minute
	// backlog is how many are to be removed at most while somebody waits for one to
	// be made, which takes the same lock of the kernel.
	backlog = 64
	// Others with the same directory don't say when they give back a namespace:
	// they are asked again and again, for a while.
	otherRetry = time.Second
	otherWait  = time.Minute
)

// errExhausted: everything by which namespaces could be connected is in use;
// errElsewhere: some of it by others with the same directory.
var (
	errExhausted = errors.New("exhausted")
	errElsewhere = fmt.Errorf("%w by others", errExhausted)
)

var errTooLong = errors.New("it takes too long")

// pool keeps namespaces ready: a few, and as many as were in use at once of late.
// So only the first steps that run side by side wait for theirs.
type pool struct {
	poolConfig
	stop    context.CancelFunc
	workers sync.WaitGroup
	told    sync.Once // somebody had to wait for others

	mu        sync.Mutex // guards the fields below; never held across I/O
	ready     []*Namespace
	unsettled []used       // in the order in which they came
	old       []*Namespace // to be removed
	inUse     int          // taken, or about to be
	held      int          // of them, those that are given back without further ones being taken
	most      [2]int       // in use at once: of late, and in the time before
	waiting   int          // callers of Take
	full      int          // of them, those for whom nothing is left to make one of
	making    int          // of them, those that make one
	filling   int          // made by fill now
	settling  int          // unsettled, or just looked at
	busy      int          // workers that make or remove one now
	finished  int          // how often one of them has done so
	failed    bool         // making ahead failed, and nobody has asked since
	closed    bool
	changed   chan struct{} // closed and replaced when one of these changes
}

type poolConfig struct {
	make   func(context.Context) (*Namespace, error)
	remove func([]*Namespace) error // nil: one by one
	first  *Namespace               // is there already; may be nil
	ahead  int                      // how many are made before they are needed
	keep   int                      // how many more are kept at most, as far as they were needed
	makers int                      // how many are made at once for those who wait
	log    *slog.Logger
}

// used is a namespace that may be used again if it is empty at last.
type used struct {
	*Namespace
	since time.Time
}

// newPool starts to make namespaces ahead.
func newPool(cfg poolConfig) *pool {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pool{poolConfig: cfg, stop: cancel, changed: make(chan struct{})}
	if p.remove == nil {
		p.remove = removeEach
	}
	if p.first != nil {
		p.ready = []*Namespace{p.first}
	}
	p.workers.Go(func() { p.fill(ctx) })
	p.workers.Go(p.clean)
	p.workers.Go(func() { p.settle(ctx) })
	p.workers.Go(func() { p.forget(ctx) })
	return p
}

func removeEach(all []*Namespace) error {
	var errs []error
	for _, n := range all {
		errs = append(errs, n.remove())
	}
	return errors.Join(errs...)
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

// wantedLocked is how many there are to be, with those in use.
func (p *pool) wantedLocked() int {
	return p.ahead + max(p.inUse, min(max(p.most[0], p.most[1]), p.keep))
}

// totalLocked is how many there are, but for those that are only to be removed.
func (p *pool) totalLocked() int {
	return p.inUse + len(p.ready) + p.filling + p.settling
}

// Take returns a namespace: one that is ready if there is any. If nothing is left
// to make one of, it waits for as long as somebody may give one back; asks says
// that the caller may take others before that, so that nobody can wait for it.
func (p *pool) Take(ctx context.Context, asks bool) (*Namespace, error) {
	p.do(func() {
		p.failed = false
		p.waiting++
		p.inUse++
		p.most[0] = max(p.most[0], p.inUse)
	})
	n, err := p.take(ctx)
	if err == nil {
		n.use()
	}
	p.do(func() {
		p.waiting--
		if err != nil {
			p.inUse--
		} else {
			p.lendLocked(n, asks)
		}
	})
	return n, err
}

// lend counts n, which p didn't make, as in use until it is given back.
func (p *pool) lend(n *Namespace, asks bool) {
	n.use()
	p.do(func() { p.inUse++; p.lendLocked(n, asks) })
}

func (p *pool) lendLocked(n *Namespace, asks bool) {
	n.pool, n.asks = p, asks
	if !asks {
		p.held++
	}
}

func (p *pool) take(ctx context.Context) (*Namespace, error) {
	var lost time.Time // when others were found to have all that this one could wait for
	for {
		n, finished, err := p.takeReady(ctx)
		if n != nil || err != nil {
			return n, err
		}
		n, err = p.make(ctx)
		p.do(func() { p.making-- })
		if !errors.Is(err, errExhausted) {
			return n, err
		}
		hope, werr := p.awaitAny(ctx, finished, errors.Is(err, errElsewhere))
		switch {
		case werr != nil:
			return nil, fmt.Errorf("%w: %w", err, werr)
		case hope:
			lost = time.Time{}
		case !errors.Is(err, errElsewhere):
			return nil, err
		case lost.IsZero():
			lost = time.Now()
		case time.Since(lost) > otherWait:
			return nil, err
		}
	}
}

// takeReady returns a namespace that is ready, or nil when it is the caller's
// turn to make one. finished is what it was then.
func (p *pool) takeReady(ctx context.Context) (n *Namespace, finished int, err error) {
	werr := p.await(ctx, func() bool {
		finished = p.finished
		switch last := len(p.ready) - 1; {
		case p.closed:
			err = errors.New("internal error: network is used after its end")
		case last >= 0:
			n = p.ready[last] // the one used last, if any
			p.ready = p.ready[:last]
		case p.making < p.makers:
			p.making++
		default:
			return false
		}
		return true
	})
	if werr != nil {
		return nil, 0, werr
	}
	return n, finished, err
}

// awaitAny waits, after everything was found in use, until that may have changed:
// since finished was read, or with others, who are asked again after a while. It
// reports whether anybody here has one that will be given back.
func (p *pool) awaitAny(ctx context.Context, finished int, others bool) (hope bool, err error) {
	p.told.Do(func() { p.log.Warn("steps wait for others to end: the network has room for no more of them at once") })
	p.do(func() { p.full++ })
	defer p.do(func() { p.full-- })
	if others {
		retry := errors.New("ask again")
		waiting, cancel := context.WithTimeoutCause(ctx, otherRetry, retry)
		defer cancel()
		defer func() {
			if errors.Is(err, retry) {
				err = nil
			}
		}()
		ctx = waiting
	}
	err = p.await(ctx, func() bool {
		// What is missing may be in the hands of a worker.
		hope = p.held > 0 || p.busy > 0 || len(p.old) > 0 || p.settling > 0
		changed := len(p.ready) > 0 || p.finished != finished
		hope = hope || changed
		return changed || !hope && !others
	})
	return hope, err
}

// put takes back a namespace that was in use.
func (p *pool) put(n *Namespace, again bool) {
	empty := n.empty() // first: what isn't may still send
	again = again && n.untouched()
	p.do(func() {
		p.inUse--
		if !n.asks {
			p.held--
		}
		switch {
		case again && !empty:
			p.settling++
			p.unsettled = append(p.unsettled, used{n, time.Now()})
		case again && p.totalLocked() < p.wantedLocked():
			p.ready = append(p.ready, n)
		default:
			p.old = append(p.old, n)
		}
		p.failed = false
	})
}

// fillsLocked reports whether there are fewer than there are to be, and fill makes
// them, or will.
func (p *pool) fillsLocked() bool {
	return p.ahead > 0 && !p.failed && p.totalLocked()-p.filling < p.wantedLocked()
}

// fill makes namespaces ahead, when nobody waits for one.
func (p *pool) fill(ctx context.Context) {
	for {
		if p.await(ctx, func() bool {
			return p.waiting == 0 && p.fillsLocked()
		}) != nil {
			return
		}
		p.do(func() { p.busy++; p.filling++ })
		n, err := p.makeAhead(ctx)
		p.do(func() {
			p.busy--
			p.filling--
			p.finished++
			if p.failed = err != nil; p.failed {
				return
			}
			if p.totalLocked() < p.wantedLocked() || p.full > 0 {
				p.ready = append(p.ready, n)
			} else {
				p.old = append(p.old, n)
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

// clean removes namespaces that aren't used any more, until p is closed: as many
// together as there are, which takes the kernel hardly longer than one. Those that
// are to be made come first, since both take the same lock of the kernel.
func (p *pool) clean() {
	for {
		var all []*Namespace
		_ = p.await(context.Background(), func() bool { //nolint:errcheck // it doesn't end
			making := p.waiting > 0 || p.fillsLocked()
			if len(p.old) > 0 && (!making || p.full > 0 || len(p.old) >= backlog || p.closed) {
				all, p.old = p.old, nil
				p.busy++
			}
			return all != nil || p.closed && p.settling == 0
		})
		if all == nil {
			return
		}
		if err := p.remove(all); err != nil {
			p.log.Warn("remove network namespaces", "error", err)
		}
		p.do(func() { p.busy--; p.finished++ })
	}
}

// settle makes those ready that are empty after a while, if they are needed, and
// has the others removed, until p is closed.
func (p *pool) settle(ctx context.Context) {
	for {
		var all []used
		_ = p.await(context.Background(), func() bool { //nolint:errcheck // it doesn't end
			all, p.unsettled = p.unsettled, nil
			return len(all) > 0 || p.closed
		})
		if len(all) == 0 {
			return
		}
		for _, u := range all {
			again := u.settled(ctx)
			p.do(func() {
				p.settling--
				if again && p.totalLocked() < p.wantedLocked() {
					p.ready = append(p.ready, u.Namespace)
				} else {
					p.old = append(p.old, u.Namespace)
				}
			})
		}
	}
}

// settled reports whether u is empty after a while, before ctx ends, and nothing
// was sent meanwhile.
func (u used) settled(ctx context.Context) bool {
	for wait := settleFirst; wait <= settleLast; wait *= 2 {
		timer := time.NewTimer(time.Until(u.since.Add(wait)))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false
		}
		if u.empty() {
			return u.untouched()
		}
	}
	return false
}

// forget has those removed that were needed once, and not for a while. Nothing
// wakes up for it while nothing is to be forgotten.
func (p *pool) forget(ctx context.Context) {
	for p.await(ctx, func() bool { return p.most != [2]int{} }) == nil {
		timer := time.NewTimer(memory)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		p.do(func() {
			p.most = [2]int{p.inUse, p.most[0]}
			for len(p.ready) > 0 && p.totalLocked() > p.wantedLocked() {
				p.old = append(p.old, p.ready[0]) // the one used least lately
				p.ready = p.ready[1:]
			}
		})
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
	err := p.remove(p.ready)
	p.ready = nil
	return err
}
