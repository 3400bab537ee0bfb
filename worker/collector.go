package worker

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

const (
	// collectDelay is how long the collector waits for more of what woke it.
	collectDelay = time.Second
	// collectPause is the least time between the ends of two passes.
	collectPause = 10 * time.Second
	// collectShare bounds what the collector takes: a pass is followed by a
	// pause of this many times its duration.
	collectShare = 50
)

// collector collects garbage in the background, once what the cache holds may
// have grown or become unused. A pass takes and gives back the cache's locks
// for each small batch of records, so that builds go on.
type collector struct {
	collect func(ctx context.Context) error
	log     *slog.Logger
	wake    chan struct{} // of capacity 1

	cancel context.CancelCauseFunc
	done   sync.WaitGroup
}

func newCollector(log *slog.Logger) *collector {
	return &collector{log: log, wake: make(chan struct{}, 1)}
}

// errClosing ends a pass that is under way.
var errClosing = errors.New("the worker is closing")

// start begins to serve nudges, the first of which is its own: what an earlier
// run left may be too much.
func (c *collector) start(collect func(ctx context.Context) error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	c.collect, c.cancel = collect, cancel
	c.nudge()
	c.done.Go(func() { c.run(ctx) })
}

// close ends the collector and waits for it.
func (c *collector) close() {
	c.cancel(errClosing)
	c.done.Wait()
}

// nudge asks for a pass. It never waits.
func (c *collector) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *collector) run(ctx context.Context) {
	for {
		select {
		case <-c.wake:
		case <-ctx.Done():
			return
		}
		if !pause(ctx, collectDelay) {
			return
		}
		select {
		case <-c.wake: // seen by the pass that begins now
		default:
		}
		start := time.Now()
		if err := c.collect(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("collect garbage", "err", err)
		}
		if !pause(ctx, max(collectPause, collectShare*time.Since(start))) {
			return
		}
	}
}

// pause waits, and reports whether it did to the end.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
