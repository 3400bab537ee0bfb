// Package progress carries what a build tells its watchers: vertices, statuses,
// log bytes and warnings, as one append-only stream per build with any number
// of readers. It knows nothing of LLB or gRPC; package control translates.
package progress

import (
	"context"
	"io"
	"time"

	"github.com/kilnbuild/kiln/internal/steplog"
	"github.com/opencontainers/go-digest"
)

// Event is one thing that happened; exactly one field is set.
type Event struct {
	Vertex  *Vertex
	Status  *Status
	Log     *Log
	Stored  *Stored
	Warning *Warning
}

// Vertex announces a vertex or updates its times (CTL-065 to -070).
type Vertex struct {
	Digest    digest.Digest
	Inputs    []digest.Digest
	Name      string
	Started   *time.Time
	Completed *time.Time
	Cached    bool
	Error     string
	Group     *Group
}

// Group is the progress group of a vertex (CTL-071).
type Group struct {
	ID, Name string
	Weak     bool
}

// Status is a counter inside a vertex; ID is unique within it (CTL-072).
type Status struct {
	ID             string
	Vertex         digest.Digest
	Name           string
	Current, Total int64
	Timestamp      time.Time
	Started        *time.Time
	Completed      *time.Time
}

// Log is bytes that a vertex printed. Stream is 1 for stdout, 2 for stderr.
type Log struct {
	Vertex    digest.Digest
	Stream    int
	Data      []byte
	Timestamp time.Time
}

// Stored tells where all is that a vertex prints, if its Log events may leave
// something out. It is told once, before the vertex ends; the log may still grow.
// Its files are closed when nobody refers to it any more.
type Stored struct {
	Vertex digest.Digest
	Log    *steplog.Log
}

// Warning is a finding about the input, such as a lint rule that fired.
type Warning struct {
	Vertex digest.Digest
	Level  int
	Short  []byte
	Detail [][]byte
	URL    string
	// SourceInfo and Ranges locate the finding; they are the protocol's
	// messages, opaque here.
	SourceInfo any
	Ranges     any
}

// Writer takes events. Write must not block on readers and must be safe for
// concurrent use.
type Writer interface {
	Write(Event)
}

// WriterFunc makes a function a Writer.
type WriterFunc func(Event)

// Write calls f.
func (f WriterFunc) Write(e Event) { f(e) }

// Discard is a Writer that drops everything.
var Discard Writer = WriterFunc(func(Event) {})

type scopeKey struct{}

// Scope writes the events of one vertex: whatever Vertex digest an event
// carries is replaced by the scope's own.
type Scope struct {
	w      Writer
	vertex digest.Digest
}

// NewScope returns a scope that writes events of vertex to w.
func NewScope(w Writer, vertex digest.Digest) Scope { return Scope{w: w, vertex: vertex} }

// With returns a context from which From gives s.
func With(ctx context.Context, s Scope) context.Context {
	return context.WithValue(ctx, scopeKey{}, s)
}

// From returns the scope carried by ctx, or one that discards.
func From(ctx context.Context) Scope {
	if s, ok := ctx.Value(scopeKey{}).(Scope); ok {
		return s
	}
	return Scope{w: Discard}
}

// Vertex is the digest that the scope's events carry.
func (s Scope) Vertex() digest.Digest { return s.vertex }

// Write passes e on with the scope's vertex.
func (s Scope) Write(e Event) { s.w.Write(e.WithVertex(s.vertex)) }

// Stream returns a writer whose bytes become log events of the given stream.
// Each Write is copied.
func (s Scope) Stream(stream int) io.Writer { return &logWriter{s: s, stream: stream} }

type logWriter struct {
	s      Scope
	stream int
}

func (w *logWriter) Write(p []byte) (int, error) {
	if len(p) > 0 {
		w.s.Write(Event{Log: &Log{Stream: w.stream, Data: append([]byte(nil), p...), Timestamp: time.Now()}})
	}
	return len(p), nil
}

// Begin reports that the piece of work named id started and returns the
// function that reports its end.
func (s Scope) Begin(id string) (done func()) {
	start := time.Now()
	s.Write(Event{Status: &Status{ID: id, Timestamp: start, Started: &start}})
	return func() {
		end := time.Now()
		s.Write(Event{Status: &Status{ID: id, Timestamp: end, Started: &start, Completed: &end}})
	}
}

// WithVertex returns a copy of e whose vertex digest is v. The event that e
// points to is not changed, so that one event may be written to many streams.
func (e Event) WithVertex(v digest.Digest) Event {
	switch {
	case e.Vertex != nil:
		c := *e.Vertex
		c.Digest = v
		return Event{Vertex: &c}
	case e.Status != nil:
		c := *e.Status
		c.Vertex = v
		return Event{Status: &c}
	case e.Log != nil:
		c := *e.Log
		c.Vertex = v
		return Event{Log: &c}
	case e.Stored != nil:
		c := *e.Stored
		c.Vertex = v
		return Event{Stored: &c}
	case e.Warning != nil:
		c := *e.Warning
		c.Vertex = v
		return Event{Warning: &c}
	}
	return e
}
