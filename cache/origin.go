package cache

import "time"

// Origin says when and how a layer came to be.
type Origin struct {
	ID          string // of the layer's record
	CreatedAt   time.Time
	Description string
}

// Origins returns those of the stack of layers, lowest first.
func (r *Ref) Origins() []Origin {
	if r == nil {
		return nil
	}
	stack := r.r.stack()
	out := make([]Origin, len(stack))
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	for i, l := range stack {
		out[i] = Origin{ID: l.id, CreatedAt: l.opts.CreatedAt, Description: l.opts.Description}
	}
	return out
}
