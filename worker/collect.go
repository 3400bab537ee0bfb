package worker

import (
	"context"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/cache"
)

// CollectSoon has garbage collected in the background. It is called when a
// build has ended and what it held is unused; the cache itself asks for it when
// it grows.
func (w *Worker) CollectSoon() { w.collector.nudge() }

// StopCollecting ends the collection of garbage for good, and a pass that is
// under way with it. It is called when no build comes any more.
func (w *Worker) StopCollecting() { w.collector.close() }

// GCRules are the rules of the garbage collector, in their order; none if it is
// off.
func (w *Worker) GCRules() []cache.PruneOptions { return w.rules }

// collect applies the rules once.
func (w *Worker) collect(ctx context.Context) error {
	if len(w.rules) == 0 {
		return nil
	}
	start := time.Now()
	records, bytes := 0, int64(0)
	err := w.cache.Collect(ctx, w.rules, func(u cache.Usage) error {
		records++
		bytes += u.Size
		return nil
	})
	if records > 0 {
		w.cfg.Log.Info("collected garbage", "records", records, "bytes", bytes, "took", time.Since(start))
	}
	if err != nil {
		return fmt.Errorf("after %d records: %w", records, err)
	}
	return nil
}
