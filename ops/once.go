package ops

import (
	"context"
	"sync"

	"github.com/moby/buildkit/session"
)

// Once returns what find says, or what it has said before about key in the build
// that asks through g: the steps of a build see one state of what changes
// outside, such as a branch, and it is asked for once (LLB-117). An error isn't
// remembered; who waited tries next. key is of a type of the caller's own, and
// holds all that the answer depends on.
func Once[T any](ctx context.Context, g session.Group, key any, find func() (T, error)) (T, error) {
	var b *Build
	if g, ok := g.(group); ok {
		b = firstBuild(g.asker)
	}
	if b == nil { // nobody's build: to nobody has anything been said
		return find()
	}
	said := b.said.about(key)
	select {
	case said.turn <- struct{}{}:
		defer func() { <-said.turn }()
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
	if v, ok := said.what.(T); ok {
		return v, nil
	}
	v, err := find()
	if err == nil {
		said.what = v
	}
	return v, err
}

// sayings are what a build was told of what is outside, by what it asked about.
// The zero value is empty.
type sayings struct {
	mu  sync.Mutex // guards all; never held across I/O
	all map[any]*saying
}

type saying struct {
	turn chan struct{} // held while asking, and while reading or setting what
	what any           // nil if nobody has said anything
}

func (s *sayings) about(key any) *saying {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.all[key]
	if one == nil {
		if s.all == nil {
			s.all = map[any]*saying{}
		}
		one = &saying{turn: make(chan struct{}, 1)}
		s.all[key] = one
	}
	return one
}
