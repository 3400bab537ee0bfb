// Package progress draws a build's status messages on a terminal or as text.
package progress

import (
	"context"
	"io"

	control "github.com/moby/buildkit/api/services/control"
	upstream "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
)

// Display draws what it is shown until Wait.
type Display struct {
	ch   chan *upstream.SolveStatus
	done chan struct{} // closed when nothing is drawn any more
	err  error         // valid then
}

// Start begins to draw on w. mode is auto, plain, tty, quiet or rawjson; other
// words are an error.
func Start(ctx context.Context, w io.Writer, mode string) (*Display, error) {
	ui, err := progressui.NewDisplay(w, progressui.DisplayMode(mode))
	if err != nil {
		return nil, err
	}
	d := &Display{ch: make(chan *upstream.SolveStatus), done: make(chan struct{})}
	go func() {
		defer close(d.done)
		_, d.err = ui.UpdateFrom(context.WithoutCancel(ctx), d.ch)
	}()
	return d, nil
}

// Message is the form of msg that clients print as JSON (BCL-022).
func Message(msg *control.StatusResponse) any { return upstream.NewSolveStatus(msg) }

// Show draws one message, unless drawing has failed: that must not hold up the
// build.
func (d *Display) Show(msg *control.StatusResponse) {
	select {
	case d.ch <- upstream.NewSolveStatus(msg):
	case <-d.done:
	}
}

// Wait draws the rest. Nothing may be shown afterwards.
func (d *Display) Wait() error {
	close(d.ch)
	<-d.done
	return d.err
}
