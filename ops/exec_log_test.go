package ops

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/steplog"
)

// shownLog is a view of a log that a test prints to.
type shownLog struct {
	*logView
	io.Writer              // the log's standard output
	out       bytes.Buffer // what is shown
	whole     *steplog.Log // what watchers were told of
}

func newShownLog(t *testing.T, limits logLimits) *shownLog {
	s := &shownLog{}
	scope := progress.NewScope(progress.WriterFunc(func(e progress.Event) {
		if e.Stored != nil {
			s.whole = e.Stored.Log
		} else {
			s.out.Write(e.Log.Data)
		}
	}), "sha256:v")
	s.logView = newLogView(scope, limits, time.Now())
	var w *steplog.Writer
	w = steplog.NewWriter(t.TempDir(), func() { s.follow(w.Extent()) })
	s.Writer = w.Stream(streamStdout)
	t.Cleanup(func() {
		if err := errors.Join(w.Close(), s.log.Close()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// compat: CTL-074
func TestLogClipsBySize(t *testing.T) {
	s := newShownLog(t, logLimits{size: 10, speed: noLimit})
	fmt.Fprint(s, "12345")
	if s.whole != nil {
		t.Error("a log that is shown as it is, is told of as a whole")
	}
	fmt.Fprint(s, "6789012345")
	fmt.Fprint(s, "lost")
	want := "1234567890\n[output clipped, log limit 10B reached]\n"
	if s.out.String() != want {
		t.Errorf("shown: %q, want %q", s.out.String(), want)
	}
	s.flush()
	if tail := strings.TrimPrefix(s.out.String(), want); tail != "6789012345lost" {
		t.Errorf("a failing step shows %q of what was clipped", tail)
	}
	if got := wholeOf(t, s.whole); got != "123456789012345lost" {
		t.Errorf("stored is %q", got)
	}
}

// wholeOf is all that was printed to a log.
func wholeOf(t *testing.T, l *steplog.Log) string {
	t.Helper()
	if l == nil {
		t.Fatal("nobody was told of the log")
	}
	saved := filepath.Join(t.TempDir(), "saved")
	if err := l.Save(saved); err != nil {
		t.Fatal(err)
	}
	l, err := steplog.Open(saved)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var all bytes.Buffer
	for off := int64(0); ; {
		c, next, err := l.Next(off)
		if errors.Is(err, io.EOF) {
			return all.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := l.Data(c, c.Size)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(data)
		off = next
	}
}

// compat: CTL-074
func TestLogClipsBySpeed(t *testing.T) {
	s := newShownLog(t, logLimits{size: 2 << 20, speed: 200 << 10})
	s.started = time.Now().Add(time.Hour) // it is in its first second as long as the test takes
	s.Write(make([]byte, 300<<10))
	shown := &s.out
	if !strings.HasSuffix(shown.String(), "\n[output clipped, log limit 200KiB/s reached]\n") || shown.Len() < 200<<10 || shown.Len() > 201<<10 {
		t.Errorf("%d bytes shown, ending in %q", shown.Len(), shown.String()[max(0, shown.Len()-60):])
	}
	shown.Reset()
	s.started = time.Now().Add(-5 * time.Second) // 1,000 KiB may have been shown by now
	fmt.Fprint(s, "again")
	if shown.String() != "again" {
		t.Errorf("after a pause: %q", shown)
	}
	s.started = time.Now().Add(time.Hour)
	s.Write(make([]byte, 3<<20))
	if !strings.Contains(shown.String(), "200KiB/s reached") {
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
	s := newShownLog(t, limits)
	s.Write(make([]byte, 8<<20))
	if s.out.Len() != 8<<20 {
		t.Errorf("%d bytes shown", s.out.Len())
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

// Of clipped output the end is shown when the step fails, however much it is and
// in whatever pieces, and none of it is kept in memory.
func TestLogTail(t *testing.T) {
	s := newShownLog(t, logLimits{size: 0, speed: noLimit})
	const line = 10
	for i := range 100_000 {
		fmt.Fprintf(s, "%0*d\n", line-1, i)
		if n := len(s.streams[streamStdout].tail); n > clippedTail/line+2 {
			t.Fatalf("%d pieces of the tail are remembered", n)
		}
	}
	s.out.Reset()
	s.flush()
	if s.out.Len() != clippedTail || !strings.HasSuffix(s.out.String(), "000099999\n") {
		t.Errorf("%d bytes flushed, ending in %q", s.out.Len(), s.out.String()[max(0, s.out.Len()-20):])
	}
}

// What can't be shown is told in the place of the output, once.
func TestLogThatIsLost(t *testing.T) {
	s := newShownLog(t, logLimits{size: noLimit})
	for range 2 {
		s.follow(steplog.Extent{Parts: []steplog.Part{{}}, Size: 1})
	}
	if got := s.out.String(); strings.Count(got, "[output is missing here: ") != 1 || !strings.Contains(got, "without its file") {
		t.Errorf("shown: %q", got)
	}
}
