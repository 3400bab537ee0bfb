// Package turns lets one at a time use what has a name.
package turns

import (
	"context"
	"sync"
)

// Turns are those of any number of names. The zero value is ready to use. All
// methods are safe for concurrent use.
type Turns struct {
	mu    sync.Mutex // guards the fields below; never held across I/O
	named map[string]*turn
}

type turn struct {
	taken chan struct{}
	users int // who has it or waits for it
}

// Take waits for name's turn and returns what gives it up, to be called once.
func (t *Turns) Take(ctx context.Context, name string) (done func(), err error) {
	t.mu.Lock()
	if t.named == nil {
		t.named = map[string]*turn{}
	}
	one := t.named[name]
	if one == nil {
		one = &turn{taken: make(chan struct{}, 1)}
		t.named[name] = one
	}
	one.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if one.users--; one.users == 0 {
			delete(t.named, name)
		}
	}
	select {
	case one.taken <- struct{}{}:
		return func() { <-one.taken; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, context.Cause(ctx)
	}
}
