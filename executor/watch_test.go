package executor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// With a clock that is the test's own.
func TestTimeouts(t *testing.T) {
	for name, tc := range map[string]struct {
		total, quiet time.Duration
		prints       []time.Duration // pauses before each line
		ends         time.Duration   // after the last
		want         []string        // nil: not ended
	}{
		"none":                      {ends: 1000 * time.Hour},
		"within":                    {total: time.Hour, ends: 59 * time.Minute},
		"too long":                  {total: time.Hour, ends: 2 * time.Hour, want: []string{"1h0m0s", "kiln.step-timeout", "never printed"}},
		"too long though it prints": {total: time.Hour, quiet: time.Hour, prints: []time.Duration{50 * time.Minute, 9 * time.Minute}, ends: time.Hour, want: []string{"kiln.step-timeout", "1m0s before", `"line 1"`}},
		"silent":                    {quiet: time.Minute, ends: time.Hour, want: []string{"kiln.no-output-timeout", "never printed", "ran for 1m0s"}},
		"prints in time":            {quiet: time.Minute, prints: []time.Duration{59 * time.Second, 59 * time.Second, 59 * time.Second}, ends: 59 * time.Second},
		"silent after a while":      {quiet: time.Minute, prints: []time.Duration{50 * time.Second, 50 * time.Second}, ends: time.Hour, want: []string{"ran for 2m40s", "printed nothing for 1m0s", `"line 1"`}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				ctx, p, w := watched(context.Background(), Process{Timeout: tc.total, QuietTimeout: tc.quiet, Stdout: &out, Stderr: &out})
				for i, pause := range tc.prints {
					time.Sleep(pause) // of the test's clock
					if _, err := io.WriteString(p.Stdout, "line "+string(rune('0'+i))+"\n"); err != nil {
						t.Fatal(err)
					}
				}
				timer := time.NewTimer(tc.ends)
				defer timer.Stop()
				var cause error
				select {
				case <-ctx.Done():
					cause = context.Cause(ctx)
				case <-timer.C:
				}
				w.stop()
				var late *timeoutError
				if errors.As(cause, &late) != (tc.want != nil) {
					t.Fatalf("ended by %v", cause)
				}
				for _, want := range tc.want {
					if !strings.Contains(cause.Error(), want) {
						t.Errorf("%q lacks %q", cause, want)
					}
				}
			})
		})
	}
}

// Writers that are one stay one, and those that nobody gave are no obstacle.
func TestWatchedWriters(t *testing.T) {
	var both, out bytes.Buffer
	for _, limit := range []time.Duration{0, time.Hour} {
		_, p, w := watched(context.Background(), Process{Stdout: &both, Stderr: &both, Timeout: limit})
		if !sameWriter(p.Stdout, p.Stderr) {
			t.Error("one writer has become two")
		}
		w.stop()
		_, p, w = watched(context.Background(), Process{Stdout: &out, Timeout: limit})
		if sameWriter(p.Stdout, p.Stderr) {
			t.Error("two writers have become one")
		}
		if limit > 0 {
			if _, err := p.Stderr.Write([]byte("x\n")); err != nil || w.last() == "it never printed anything" {
				t.Errorf("nobody saw what was printed: %v, %s", err, w.last())
			}
		}
		w.stop()
	}
}
