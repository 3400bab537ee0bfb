package solver

import "sync"

// crew does work with a bounded number of goroutines, which it has only while
// there is some. What waits costs a queue's entry and no stack. The zero value is
// ready to use.
type crew struct {
	mu      sync.Mutex // guards the fields below
	waiting []func()
	next    int // in waiting
	size    int // how many work
}

// crewSize is more than what keeps a disk and all processors busy, and few enough
// to hold no memory worth speaking of.
const crewSize = 32

// do has fn called, after what was handed in before has begun. group waits for it.
func (c *crew) do(group *sync.WaitGroup, fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = append(c.waiting, fn)
	if c.size < crewSize {
		c.size++
		group.Go(c.work)
	}
}

func (c *crew) work() {
	for fn := c.take(); fn != nil; fn = c.take() {
		fn()
	}
}

// take returns what is to be done next; nil ends who asks.
func (c *crew) take() (fn func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == len(c.waiting) {
		c.waiting, c.next = nil, 0
		c.size--
		return nil
	}
	fn, c.waiting[c.next] = c.waiting[c.next], nil
	c.next++
	return fn
}
