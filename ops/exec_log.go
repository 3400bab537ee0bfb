package ops

import (
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/tonistiigi/units"
)

const (
	streamStdout = 1
	streamStderr = 2

	// clippedTail is how much of clipped output is shown after all if the step
	// fails.
	clippedTail = 256 << 10

	noLimit = -1
)

// logLimits bound what a step may print to each of its streams (CTL-074).
type logLimits struct {
	size  int  // bytes, or noLimit, which lifts the limit of speed too
	speed int  // bytes a second, or noLimit
	echo  bool // print it on the daemon's own streams too (DMN-063)
}

// logLimitsFromEnv reads the limits as operators set them (DMN-060).
func logLimitsFromEnv() (l logLimits, err error) {
	if l.size, err = limitFromEnv("BUILDKIT_STEP_LOG_MAX_SIZE", 2<<20); err != nil {
		return l, err
	}
	l.echo = os.Getenv("BUILDKIT_DEBUG_EXEC_OUTPUT") == "1"
	l.speed, err = limitFromEnv("BUILDKIT_STEP_LOG_MAX_SPEED", 200<<10)
	return l, err
}

// KeptOutput is how much of each stream of a step the next daemon needs if the
// step outlives this one, beside the last of it; -1 is all.
func KeptOutput() int {
	limits, err := logLimitsFromEnv()
	if err != nil {
		return noLimit // NewLoader says why that can't be
	}
	return limits.size
}

func limitFromEnv(name string, value int) (int, error) {
	s, ok := os.LookupEnv(name)
	if !ok || s == "" {
		return value, nil
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n < noLimit {
		return 0, fmt.Errorf("environment variable %s is %q: it must be a number of bytes, or -1 for no limit", name, s)
	}
	return int(n), nil
}

// stepLog is where a step prints to.
type stepLog struct{ stdout, stderr *logStream }

func newStepLog(scope progress.Scope, limits logLimits, started time.Time) stepLog {
	stream := func(n int, echo io.Writer) *logStream {
		if !limits.echo {
			echo = io.Discard
		}
		return &logStream{scope: scope, stream: n, limits: limits, echo: echo, now: time.Now, started: started}
	}
	return stepLog{stdout: stream(streamStdout, os.Stdout), stderr: stream(streamStderr, os.Stderr)}
}

// flush shows the last of what was clipped.
func (l stepLog) flush() {
	l.stdout.flush()
	l.stderr.flush()
}

// logStream passes on what is written to it, as long as that stays within the
// limits, and says where it leaves something out.
type logStream struct {
	scope   progress.Scope
	stream  int
	limits  logLimits
	echo    io.Writer
	now     func() time.Time
	started time.Time

	mu       sync.Mutex // guards the fields below
	passed   int        // bytes written so far that counted, shown or not
	clipping bool
	tail     []byte // since the first byte that was clipped; nil before
}

// Write never fails: a step doesn't notice that nobody sees its output.
func (s *logStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	room, limit := s.room(len(p))
	if s.tail != nil || room < len(p) {
		s.keep(p)
	}
	shown := append([]byte(nil), p[:room]...)
	if room < len(p) && !s.clipping {
		shown = fmt.Appendf(shown, "\n[output clipped, log limit %s reached]\n", limit)
	}
	s.clipping = room < len(p)
	s.show(shown)
	return len(p), nil
}

// room returns how many of the next n bytes may be shown, and which limit it
// is that says so.
func (s *logStream) room(n int) (room int, limit string) {
	before := s.passed
	s.passed += n
	if s.limits.size == noLimit {
		return n, ""
	}
	most, limit := s.limits.size, fmt.Sprintf("%#g", units.Bytes(s.limits.size))
	if s.limits.speed != noLimit {
		seconds := max(1, int(math.Ceil(s.now().Sub(s.started).Seconds())))
		if bySpeed := seconds * s.limits.speed; bySpeed <= most {
			most, limit = bySpeed, fmt.Sprintf("%#g/s", units.Bytes(s.limits.speed))
		}
	}
	return max(0, min(n, most-before)), limit
}

// keep adds p to the tail, which may grow to twice its length before it is cut.
func (s *logStream) keep(p []byte) {
	s.tail = append(s.tail, p...)
	if len(s.tail) > 2*clippedTail {
		s.tail = append(s.tail[:0], s.tail[len(s.tail)-clippedTail:]...)
	}
}

func (s *logStream) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.show(s.tail[max(0, len(s.tail)-clippedTail):])
	s.tail = nil
}

func (s *logStream) show(p []byte) {
	if len(p) > 0 {
		_, _ = s.echo.Write(p) // for who debugs the daemon; nothing depends on it
		s.scope.Write(progress.Event{Log: &progress.Log{Stream: s.stream, Data: p, Timestamp: s.now()}})
	}
}
