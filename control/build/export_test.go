package build

import (
	"context"
	"fmt"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/worker/export"
)

// fakeExporter makes an export of a function of how often it was called before.
type fakeExporter struct {
	name  string
	calls int
	fn    func(ctx context.Context, calls int) error
}

func (e *fakeExporter) Name() string { return e.name }

func (e *fakeExporter) Export(ctx context.Context, _ export.Source, _ export.Request) (export.Done, error) {
	err := e.fn(ctx, e.calls)
	e.calls++
	return export.Done{Response: map[string]string{e.name: fmt.Sprint(e.calls)}}, err
}

// What is lost for one exporter neither stops another, which may be in the midst
// of sending to the client, nor is sent to it twice.
func TestLossForOneExporter(t *testing.T) {
	d := newDaemon(t)
	def := d.definition("one", "")
	b, err := d.engine.register(t.Context(), Request{Ref: "build", Definition: def})
	d.must(err)
	defer d.engine.running.Done()
	defer b.finish(nil, nil)
	res, err := b.bridge.Solve(t.Context(), frontend.SolveRequest{Definition: def})
	d.must(err)

	lost := make(chan struct{})
	sends := &fakeExporter{name: "sends", fn: func(ctx context.Context, _ int) error {
		<-lost
		return context.Cause(ctx)
	}}
	loses := &fakeExporter{name: "loses", fn: func(_ context.Context, calls int) error {
		if calls > 0 {
			return nil
		}
		close(lost)
		return fmt.Errorf("layer: %w", cache.ErrLost)
	}}
	resp, err := b.deliver([]export.Exporter{sends, loses}, nil, res)
	if err != nil || resp["sends"] != "1" || resp["loses"] != "2" {
		t.Errorf("got %v, %v", resp, err)
	}
}
