// Package footprint keeps the daemon small. While it builds, the heap grows by no
// more than is of use (pace.go). When it is idle, what a start or a build took and
// nothing uses any more goes back to the system.
//
// That is what the daemon can read again, the heap's free memory, which the
// runtime would keep for the next build, and the pages of files: the program and
// the database. The kernel maps those by sixteen around each one that is touched,
// and a start touches nearly all of a program; they stay in the page cache, and
// what runs next maps what it needs again, in about half a millisecond.
//
// When it ends, time is worth more than memory, which goes with it.
package footprint

import (
	"runtime/debug"
	"sync"
	"time"
)

// Keeper gives memory back once, some time after the last use. In between, and
// afterwards, nothing wakes up for it.
type Keeper struct {
	Config

	mu     sync.Mutex // guards the fields below, and is held while memory is given back
	timer  *time.Timer
	closed bool
}

// Config is what a Keeper works with.
type Config struct {
	// Busy says that something runs, so that memory isn't given back.
	Busy func() bool
	// Rest lets go of what can be read again. It may wait for what began with a
	// build.
	Rest func()
	// Tell is told, once, why memory can't be given back.
	Tell func(error)
}

// Keep returns a Keeper that gives memory back after the time first.
func Keep(first time.Duration, cfg Config) *Keeper {
	k := &Keeper{Config: cfg}
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
	if k.closed || k.Busy() {
		return
	}
	k.Rest()
	debug.FreeOSMemory()
	if err := dropFiles(); err != nil {
		tell := k.Tell
		k.Tell = func(error) {}
		tell(err)
	}
}
