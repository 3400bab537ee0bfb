package progress

import (
	"context"
	"io"
	"sync"
	"time"
)

// Stream is an append-only log of events with any number of independent
// readers, each of which sees every event from the first on. The zero value
// is ready to use.
type Stream struct {
	mu     sync.Mutex // guards the fields below; never held while waiting
	events []Event
	closed bool
	wake   chan struct{} // closed and replaced when something is appended
	done   chan struct{} // made on demand; closed with the stream
}

// Write appends e. Events written after Close are dropped.
func (s *Stream) Write(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.events = append(s.events, e)
	s.wakeLocked()
}

// Close ends the stream: readers get io.EOF after the last event. It may be
// called more than once.
func (s *Stream) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		if s.done != nil {
			close(s.done)
		}
	}
	s.wakeLocked()
}

func (s *Stream) wakeLocked() {
	if s.wake != nil {
		close(s.wake)
		s.wake = nil
	}
}

// Reader reads a stream from its beginning. It is for one goroutine.
type Reader struct {
	s    *Stream
	next int
}

// NewReader returns a reader that starts with the first event.
func (s *Stream) NewReader() *Reader { return &Reader{s: s} }

// Next returns all events since the last call, waiting until there is one. It
// returns io.EOF once the stream is closed and read to its end, or the cause
// of ctx's end. The returned slice must not be changed.
func (r *Reader) Next(ctx context.Context) ([]Event, error) {
	for {
		r.s.mu.Lock()
		if n := len(r.s.events); n > r.next {
			batch := r.s.events[r.next:n:n]
			r.next = n
			r.s.mu.Unlock()
			return batch, nil
		}
		if r.s.closed {
			r.s.mu.Unlock()
			return nil, io.EOF
		}
		if r.s.wake == nil {
			r.s.wake = make(chan struct{})
		}
		wake := r.s.wake
		r.s.mu.Unlock()

		select {
		case <-wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Linger waits until d has passed, the stream is closed or ctx ends, so that a
// reader can take many events at once.
func (r *Reader) Linger(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.s.Done():
	case <-ctx.Done():
	}
}

// Done is closed when the stream is.
func (s *Stream) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done == nil {
		s.done = make(chan struct{})
		if s.closed {
			close(s.done)
		}
	}
	return s.done
}
