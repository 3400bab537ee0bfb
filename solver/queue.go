package solver

import "sync"

// queue is unbounded: whoever puts never waits.
type queue[T any] struct {
	mu     sync.Mutex // guards the fields below
	more   *sync.Cond // there is something to take, or the queue is closed
	items  []T
	closed bool
}

func newQueue[T any]() *queue[T] {
	q := &queue[T]{}
	q.more = sync.NewCond(&q.mu)
	return q
}

// put appends item, also after close.
func (q *queue[T]) put(item T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.items = append(q.items, item)
	q.more.Signal()
}

// close lets take return nothing once everything is taken.
func (q *queue[T]) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.more.Signal()
}

// take returns everything that was put, waiting until there is something or the
// queue is closed. It is for one goroutine.
func (q *queue[T]) take() (items []T) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.items) == 0 && !q.closed {
		q.more.Wait()
	}
	items, q.items = q.items, nil
	return items
}
