package cache

import (
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// stallBound is how long a source may send nothing in the middle of a blob
// before it counts as unreachable. However slowly, one that sends is waited
// for: how long a transfer may take is for whoever wants it to say. Until the
// first byte a source has bounds of its own.
const stallBound = 2 * time.Minute

// ErrStalled: a source sent nothing for too long.
var ErrStalled = errors.New("nothing came")

// lively is a reader that ends when nothing comes for longer than bound.
type lively struct {
	src   io.Reader
	bound time.Duration
	stop  func() // makes a read of src return
}

func (l *lively) Read(p []byte) (int, error) {
	var stalled atomic.Bool
	timer := time.AfterFunc(l.bound, func() {
		stalled.Store(true)
		l.stop()
	})
	n, err := l.src.Read(p)
	timer.Stop()
	if err != nil && err != io.EOF && stalled.Load() {
		// Not the error that the stop caused, which looks like a cancellation.
		err = fmt.Errorf("%w for %s", ErrStalled, l.bound)
	}
	return n, err
}
