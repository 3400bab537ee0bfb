package ops

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/steplog"
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

// inlineLog is how much of a step's output is told as it comes; a log that is
// longer is told of as a whole, too, so that nobody has to keep it in memory.
const inlineLog = 16 << 10

// logView shows what a step prints, as far as that stays within the limits, and
// says where it leaves something out. It reads the step's log, which has all.
type logView struct {
	scope   progress.Scope
	limits  logLimits
	echo    [3]io.Writer // by stream
	started time.Time

	mu      sync.Mutex // guards the fields below
	log     *steplog.Log
	next    int64 // where it goes on in the log
	streams [3]streamView
	told    bool   // of the whole log
	failed  string // why nothing more can be shown
}

// streamView is what is shown of a stream.
type streamView struct {
	passed   int // bytes so far that counted, shown or not
	clipping bool
	tail     []steplog.Chunk // from the first one on that was clipped, at most what covers clippedTail
	tailSize int
}

func newLogView(scope progress.Scope, limits logLimits, started time.Time) *logView {
	v := &logView{scope: scope, limits: limits, started: started, log: new(steplog.Log)}
	v.echo = [3]io.Writer{io.Discard, io.Discard, io.Discard}
	if limits.echo {
		v.echo[streamStdout], v.echo[streamStderr] = os.Stdout, os.Stderr
	}
	return v
}

// follow shows what the log has got since the last call. That it can't be read is
// shown: no step fails because nobody sees its output.
func (v *logView) follow(x steplog.Extent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failed != "" {
		return
	}
	err := v.log.Grow(x)
	for err == nil {
		var c steplog.Chunk
		if c, v.next, err = v.log.Next(v.next); err == nil {
			err = v.add(c)
		}
	}
	switch {
	case !errors.Is(err, io.EOF):
		v.failed = err.Error()
	case x.Lost != "":
		v.failed = x.Lost
	}
	if v.failed != "" {
		v.show(streamStderr, time.Now(), []byte("\n[output is missing here: "+v.failed+"]\n"))
	}
}

// add shows a chunk, or leaves it out.
func (v *logView) add(c steplog.Chunk) error {
	if c.Stream != streamStdout && c.Stream != streamStderr {
		return fmt.Errorf("internal error: stream %d in the log of a step", c.Stream)
	}
	s := &v.streams[c.Stream]
	room, limit := v.room(s, c)
	shown, err := v.log.Data(c, room)
	if err != nil {
		return err
	}
	if s.tail != nil || room < c.Size {
		s.keep(c)
	}
	if room < c.Size && !s.clipping {
		shown = fmt.Appendf(shown, "\n[output clipped, log limit %s reached]\n", limit)
	}
	s.clipping = room < c.Size
	if !v.told && (s.clipping || v.next > inlineLog) {
		v.told = true
		v.scope.Write(progress.Event{Stored: &progress.Stored{Log: v.log}})
	}
	v.show(c.Stream, c.Time, shown)
	return nil
}

// room returns how many bytes of the chunk may be shown, and which limit it is
// that says so.
func (v *logView) room(s *streamView, c steplog.Chunk) (room int, limit string) {
	before := s.passed
	s.passed += c.Size
	if v.limits.size == noLimit {
		return c.Size, ""
	}
	most, limit := v.limits.size, fmt.Sprintf("%#g", units.Bytes(v.limits.size))
	if v.limits.speed != noLimit {
		seconds := max(1, int(math.Ceil(c.Time.Sub(v.started).Seconds())))
		if bySpeed := seconds * v.limits.speed; bySpeed <= most {
			most, limit = bySpeed, fmt.Sprintf("%#g/s", units.Bytes(v.limits.speed))
		}
	}
	return max(0, min(c.Size, most-before)), limit
}

// keep adds a chunk to the tail, of which the beginning is given up.
func (s *streamView) keep(c steplog.Chunk) {
	s.tail = append(s.tail, c)
	s.tailSize += c.Size
	for s.tailSize-s.tail[0].Size >= clippedTail {
		s.tailSize -= s.tail[0].Size
		s.tail = s.tail[1:]
	}
}

// flush shows the last of what was clipped.
func (v *logView) flush() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for stream := range v.streams {
		s := &v.streams[stream]
		var tail []byte
		for _, c := range s.tail {
			data, err := v.log.Data(c, c.Size)
			if err != nil {
				data = []byte("\n[output is missing here: " + err.Error() + "]\n")
			}
			tail = append(tail, data...)
		}
		s.tail, s.tailSize = nil, 0
		v.show(stream, time.Now(), tail[max(0, len(tail)-clippedTail):])
	}
}

func (v *logView) show(stream int, at time.Time, p []byte) {
	if len(p) > 0 {
		_, _ = v.echo[stream].Write(p) // for who debugs the daemon; nothing depends on it
		v.scope.Write(progress.Event{Log: &progress.Log{Stream: stream, Data: p, Timestamp: at}})
	}
}

// close lets go of the log, unless others were told of it.
func (v *logView) close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.told {
		return nil
	}
	return v.log.Close()
}
