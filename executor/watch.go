package executor

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

// watcher sees what a process prints, and ends its run when that takes too long.
type watcher struct {
	p       Process
	started time.Time
	cancel  context.CancelCauseFunc
	total   *time.Timer // of p.Timeout; nil for none
	silence *time.Timer // of p.QuietTimeout; nil for none
	stderr  tail
	output  tail // of both streams; only of a run that has a limit

	mu      sync.Mutex // guards printed
	printed time.Time  // when the process last printed; zero for never
}

// watched starts to watch a run of p. It returns the context of the run, and p
// with writers that are watched. The caller calls stop.
func watched(ctx context.Context, p Process) (context.Context, Process, *watcher) {
	w := &watcher{p: p, started: time.Now()}
	limited := p.Timeout > 0 || p.QuietTimeout > 0
	note := w.stderr.note
	if limited {
		note = w.noteErr
	}
	switch {
	case sameWriter(p.Stdout, p.Stderr):
		p.Stderr = &noting{p.Stderr, note}
		p.Stdout = p.Stderr
	case limited:
		p.Stdout, p.Stderr = &noting{orDiscard(p.Stdout), w.note}, &noting{orDiscard(p.Stderr), note}
	case p.Stderr != nil:
		p.Stderr = &noting{p.Stderr, note}
	}
	if !limited {
		return ctx, p, w
	}
	ctx, w.cancel = context.WithCancelCause(ctx)
	if p.Timeout > 0 {
		w.total = time.AfterFunc(p.Timeout, func() { w.cancel(w.late()) })
	}
	if p.QuietTimeout > 0 {
		w.silence = time.AfterFunc(p.QuietTimeout, func() { w.cancel(w.silent()) })
	}
	return ctx, p, w
}

// orDiscard is w, or a writer of what nobody wants but the watcher.
func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

func (w *watcher) noteErr(p []byte) {
	w.stderr.note(p)
	w.note(p)
}

func (w *watcher) note(p []byte) {
	w.output.note(p)
	w.mu.Lock()
	w.printed = time.Now()
	w.mu.Unlock()
	if w.silence != nil {
		w.silence.Reset(w.p.QuietTimeout)
	}
}

// stop ends the limits.
func (w *watcher) stop() {
	for _, t := range []*time.Timer{w.total, w.silence} {
		if t != nil {
			t.Stop()
		}
	}
	if w.cancel != nil {
		w.cancel(nil)
	}
}

// timeoutError is the cause by which a watcher ends a run.
type timeoutError struct{ text string }

func (e *timeoutError) Error() string { return string(CauseTimeout) + ": " + e.text }

func (w *watcher) late() error {
	return &timeoutError{fmt.Sprintf("it ran for %s, and the limit of a step is %s (kiln.step-timeout); %s; raise the limit, or see what it waits for",
		since(w.started), w.p.Timeout, w.last())}
}

func (w *watcher) silent() error {
	return &timeoutError{fmt.Sprintf("it ran for %s and printed nothing for %s, as long as a step may be silent (kiln.no-output-timeout); %s; raise the limit, or see what it waits for",
		since(w.started), w.p.QuietTimeout, w.last())}
}

// last says what was printed last, and when.
func (w *watcher) last() string {
	w.mu.Lock()
	printed := w.printed
	w.mu.Unlock()
	lines := w.output.lines()
	if len(lines) == 0 {
		return "it never printed anything"
	}
	return fmt.Sprintf("the last it printed, %s before its end, was %q", since(printed), clip(lines[len(lines)-1]))
}

func since(t time.Time) time.Duration { return time.Since(t).Round(100 * time.Millisecond) }

// clip shortens a line for a message.
func clip(line string) string {
	const most = 200
	if len(line) <= most {
		return line
	}
	return line[:most] + "..."
}
