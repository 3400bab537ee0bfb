package solver

import (
	"errors"

	"github.com/kilnbuild/kiln/internal/progress"
)

// Observer is told what becomes of a build's vertices, so that it can be
// explained afterwards. Vertices are those of Announced. Calls of one vertex
// come in order, those of several may come at once, and each holds up the
// build: they should be short. Effects and events must not be changed. Whoever
// is interested in some of it embeds Unobserved.
type Observer interface {
	// Announced comes first, for inputs before what consumes them.
	Announced(*Announce)
	// Queried says what the key stores were asked and what they found: whatever
	// a vertex may be answered from, also if nobody needs its result in the end.
	// It must not keep found's slices.
	Queried(eff *Query, found Found)
	// ImportFailed says that an import can't be asked: what it has isn't found.
	ImportFailed(name string, err error)
	// Loading says that a record was found.
	Loading(*Load)
	// Dropped says that records turned out to be lost.
	Dropped(*Drop)
	// Starts says that a vertex is really executed, by this build or one that
	// this one joined. What is written to scope comes before the vertex's own
	// log. The inputs are valid during the call and may be cloned.
	Starts(eff *Execute, scope progress.Scope)
	// Ended says how an execution ended, also one that turned out not to be
	// needed or was never started.
	Ended(*Execute, *Executed)
}

// Unobserved is an Observer that is told and does nothing.
type Unobserved struct{}

func (Unobserved) Announced(*Announce)             {}
func (Unobserved) Queried(*Query, Found)           {}
func (Unobserved) ImportFailed(string, error)      {}
func (Unobserved) Loading(*Load)                   {}
func (Unobserved) Dropped(*Drop)                   {}
func (Unobserved) Starts(*Execute, progress.Scope) {}
func (Unobserved) Ended(*Execute, *Executed)       {}

// Interrupted reports whether the execution ended for reasons that aren't its
// own: nobody wanted it any more, or an input was lost.
func (ev *Executed) Interrupted() bool {
	return errors.Is(ev.Err, errClosed) || errors.Is(ev.Err, ErrUnwanted) || asLost(ev.Err) != nil
}

// tell tells all observers, in order.
func (b *Build) tell(what func(Observer)) {
	for _, o := range b.opts.Observers {
		what(o)
	}
}
