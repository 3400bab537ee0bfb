package solver

import "sync"

// queue is unbounded: whoever puts never waits. The zero value is ready.
type queue[T any] struct {
	mu     sync.Mutex // guards the fields below
	items  []T
	closed bool
	wake   chan struct{} // closed when there is something to take; nil if nobody waits
}

// put appends item; what is put after close waits for rest.
func (q *queue[T]) put(item T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = append(q.items, item)
	q.signalLocked()
}

// close lets take return false once everything is taken.
func (q *queue[T]) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.signalLocked()
}

func (q *queue[T]) signalLocked() {
	if q.wake != nil {
		close(q.wake)
		q.wake = nil
	}
}

// take returns everything that was put, waiting until there is something. It is
// for one goroutine.
func (q *queue[T]) take() (items []T, ok bool) {
	for {
		q.mu.Lock()
		items, q.items = q.items, nil
		if len(items) > 0 || q.closed {
			q.mu.Unlock()
			return items, len(items) > 0
		}
		wake := make(chan struct{})
		q.wake = wake
		q.mu.Unlock()
		<-wake
	}
}

// rest returns what was put and never taken.
func (q *queue[T]) rest() (items []T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	items, q.items = q.items, nil
	return items
}
