package ops

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
)

// logTo returns a stream whose clock is *now, and what it shows.
func logTo(limits logLimits, now *time.Time) (*logStream, *bytes.Buffer) {
	var out bytes.Buffer
	scope := progress.NewScope(progress.WriterFunc(func(e progress.Event) { out.Write(e.Log.Data) }), "sha256:v")
	return &logStream{scope: scope, stream: streamStdout, limits: limits, echo: io.Discard, started: *now, now: func() time.Time { return *now }}, &out
}

// compat: CTL-074
func TestLogClipsBySize(t *testing.T) {
	now := time.Unix(0, 0)
	s, out := logTo(logLimits{size: 10, speed: noLimit}, &now)
	fmt.Fprint(s, "12345")
	fmt.Fprint(s, "6789012345")
	fmt.Fprint(s, "lost")
	want := "1234567890\n[output clipped, log limit 10B reached]\n"
	if out.String() != want {
		t.Errorf("shown: %q, want %q", out, want)
	}
	s.flush()
	if tail := strings.TrimPrefix(out.String(), want); tail != "6789012345lost" {
		t.Errorf("a failing step shows %q of what was clipped", tail)
	}
}

// compat: CTL-074
func TestLogClipsBySpeed(t *testing.T) {
	now := time.Unix(0, 0)
	s, out := logTo(logLimits{size: 2 << 20, speed: 200 << 10}, &now)
	s.Write(make([]byte, 300<<10))
	if !strings.HasSuffix(out.String(), "\n[output clipped, log limit 200KiB/s reached]\n") || out.Len() < 200<<10 || out.Len() > 201<<10 {
		t.Errorf("%d bytes shown, ending in %q", out.Len(), out.String()[max(0, out.Len()-60):])
	}
	out.Reset()
	now = now.Add(5 * time.Second) // 1,000 KiB may have been shown by now
	fmt.Fprint(s, "again")
	if out.String() != "again" {
		t.Errorf("after a pause: %q", out)
	}
	s.Write(make([]byte, 3<<20))
	if !strings.Contains(out.String(), "200KiB/s reached") {
		t.Error("no second notice")
	}
}

// compat: CTL-074, DMN-060
func TestLogWithoutLimits(t *testing.T) {
	t.Setenv("BUILDKIT_STEP_LOG_MAX_SIZE", "-1")
	t.Setenv("BUILDKIT_STEP_LOG_MAX_SPEED", "-1")
	limits, err := logLimitsFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(0, 0)
	s, out := logTo(limits, &now)
	s.Write(make([]byte, 8<<20))
	if out.Len() != 8<<20 {
		t.Errorf("%d bytes shown", out.Len())
	}
}

func TestLogLimitsFromEnv(t *testing.T) {
	if l, err := logLimitsFromEnv(); err != nil || l != (logLimits{size: 2 << 20, speed: 200 << 10}) {
		t.Errorf("defaults are %v, %v", l, err)
	}
	t.Setenv("BUILDKIT_STEP_LOG_MAX_SIZE", "2MB")
	if _, err := NewLoader(Config{}); err == nil || !strings.Contains(err.Error(), "BUILDKIT_STEP_LOG_MAX_SIZE") {
		t.Errorf("error is %v", err)
	}
}

// What is kept of clipped output is bounded, and its end is kept.
func TestLogTail(t *testing.T) {
	now := time.Unix(0, 0)
	s, out := logTo(logLimits{size: 0, speed: noLimit}, &now)
	for i := range 100_000 {
		fmt.Fprintf(s, "%09d\n", i)
		if cap(s.tail) > 5*clippedTail {
			t.Fatalf("%d bytes kept", cap(s.tail))
		}
	}
	out.Reset()
	s.flush()
	if out.Len() != clippedTail || !strings.HasSuffix(out.String(), "000099999\n") {
		t.Errorf("%d bytes flushed, ending in %q", out.Len(), out.String()[max(0, out.Len()-20):])
	}
}
