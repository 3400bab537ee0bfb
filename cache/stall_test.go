package cache

import (
	"context"
	"io"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/opencontainers/go-digest"
)

// hanging gives what is in the reader, and then nothing until it is closed.
type hanging struct {
	io.Reader
	once   sync.Once
	closed chan struct{}
}

func (h *hanging) Read(p []byte) (int, error) {
	if n, err := h.Reader.Read(p); err == nil {
		return n, nil
	}
	<-h.closed
	return 0, context.Canceled // as transports say it
}

func (h *hanging) Close() error {
	h.once.Do(func() { close(h.closed) })
	return nil
}

// A source that sends nothing any more is unreachable: the layer comes from
// another one, or is lost.
func TestSourceThatHangs(t *testing.T) {
	e := newEnv(t)
	e.m.stall = 20 * time.Millisecond
	good, bad := newSource(), newSource()
	bad.body = func(_ digest.Digest, r io.Reader) io.Reader {
		return &hanging{Reader: io.LimitReader(r, 20), closed: make(chan struct{})}
	}
	l := bad.add(t, "gzip", tarOf(t, "a=1"))
	r := e.pull(bad, l)
	wantErr(t, r.Extract(t.Context()), ErrLost, "nothing came for 20ms", l.Blob.Digest.String())

	good.blobs = bad.blobs
	e.pull(good, l).Release()
	again := e.pull(bad, l) // asked first
	good.body = func(_ digest.Digest, r io.Reader) io.Reader {
		e.m.stall = time.Hour // of the good one, on a busy machine
		return r
	}
	e.wantFiles(again, "a=1")
	if good.count() != 1 {
		t.Errorf("the other source was asked %d times", good.count())
	}
	again.Release()
	r.Release()
	e.empty()
}

// One that is slow is waited for.
func TestSourceThatIsSlow(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	src.body = func(_ digest.Digest, r io.Reader) io.Reader { return iotest.OneByteReader(r) }
	r := e.pull(src, src.add(t, "gzip", tarOf(t, "a=1")), src.add(t, "zstd", tarOf(t, "b=2")))
	e.wantFiles(r, "a=1", "b=2")
	r.Release()
	e.empty()
}
