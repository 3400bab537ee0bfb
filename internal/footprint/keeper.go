// Package footprint keeps an idle daemon small: what a start or a build took and
// nothing uses any more goes back to the system.
//
// That is the heap's free memory, which the runtime would keep for the next
// build, and the pages of the program. The kernel maps those by sixteen around
// each one that is touched, and a start touches nearly all of a program; they
// stay in the page cache, and what runs next maps what it needs again, in about
// half a millisecond.
package footprint

import (
	"runtime/debug"
	"sync"
	"time"
)

// Keeper gives memory back once, some time after the last use. In between, and
// afterwards, nothing wakes up for it.
type Keeper struct {
	busy func() bool
	tell func(error)

	mu     sync.Mutex // guards the fields below, and is held while memory is given back
	timer  *time.Timer
	closed bool
}

// Keep returns a Keeper that gives memory back after the time first, unless busy
// says that something runs then. tell is told, once, why that isn't possible.
func Keep(first time.Duration, busy func() bool, tell func(error)) *Keeper {
	k := &Keeper{busy: busy, tell: tell}
	k.mu.Lock() // the timer may fire before it is assigned
	defer k.mu.Unlock()
	k.timer = time.AfterFunc(first, k.release)
	return k
}

// Used notes that something has ended: memory is given back after d, if nothing
// runs then. What is running notes its own end.
func (k *Keeper) Used(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.closed {
		k.timer.Reset(d)
	}
}

// Close ends the Keeper, after which nothing runs for it.
func (k *Keeper) Close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	k.timer.Stop()
}

func (k *Keeper) release() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.busy() {
		return
	}
	debug.FreeOSMemory()
	if err := dropProgram(); err != nil {
		tell := k.tell
		k.tell = func(error) {}
		tell(err)
	}
}
