package progress

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
)

// Every reader sees every event, in order, whenever it joins. compat: CTL-063, CTL-064
func TestStreamReadersSeeEverythingFromTheStart(t *testing.T) {
	var s Stream
	const n = 1000
	early := s.NewReader()
	var wg sync.WaitGroup
	read := func(r *Reader) {
		defer wg.Done()
		next := int64(0)
		for {
			batch, err := r.Next(context.Background())
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Error(err)
				return
			}
			for _, e := range batch {
				if e.Status.Current != next {
					t.Errorf("got event %d, want %d", e.Status.Current, next)
					return
				}
				next++
			}
		}
		if next != n {
			t.Errorf("read %d events, want %d", next, n)
		}
	}
	wg.Add(2)
	go read(early)
	for i := range n {
		s.Write(Event{Status: &Status{Current: int64(i)}})
		if i == n/2 {
			go read(s.NewReader())
		}
	}
	s.Close()
	s.Write(Event{Status: &Status{Current: n}}) // dropped
	wg.Wait()
}

func TestNextReturnsCauseOfContext(t *testing.T) {
	var s Stream
	cause := errors.New("client gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(cause)
	if _, err := s.NewReader().Next(ctx); err != cause {
		t.Fatalf("Next = %v, want %v", err, cause)
	}
}

func TestScopeRewritesVertexWithoutTouchingTheEvent(t *testing.T) {
	var got []Event
	w := WriterFunc(func(e Event) { got = append(got, e) })
	ctx := With(context.Background(), NewScope(w, digest.FromString("mine")))
	orig := &Status{ID: "x", Vertex: digest.FromString("theirs")}
	From(ctx).Write(Event{Status: orig})
	if got[0].Status.Vertex != digest.FromString("mine") || orig.Vertex != digest.FromString("theirs") {
		t.Fatalf("rewritten to %v, original now %v", got[0].Status.Vertex, orig.Vertex)
	}
	From(ctx).Stream(2).Write([]byte("err"))
	if l := got[1].Log; l.Stream != 2 || string(l.Data) != "err" || l.Vertex != digest.FromString("mine") {
		t.Fatalf("log event %+v", l)
	}
	From(context.Background()).Write(Event{Status: orig}) // discarded, not a panic
}

func TestLingerEndsWhenTheStreamCloses(t *testing.T) {
	var s Stream
	r := s.NewReader()
	s.Close()
	r.Linger(context.Background(), 1<<62)
}
