package solver

import (
	"slices"

	"github.com/kilnbuild/kiln/internal/progress"
)

// LookupObserver is an Observer that is also told what the key stores were
// asked and what they found: whatever a vertex may be answered from, also if
// nobody needs its result in the end.
type LookupObserver interface {
	Observer
	// Queried must not keep found's slices.
	Queried(eff *Query, found Found)
}

// ImportObserver is an Observer that is also told of imports that can't be
// asked: what they have isn't found.
type ImportObserver interface {
	Observer
	ImportFailed(name string, err error)
}

// Observers are several that are told the same, in order. Those that are nil
// are left out; without any other the result is nil.
func Observers(list ...Observer) Observer {
	list = slices.DeleteFunc(list, func(o Observer) bool { return o == nil })
	if len(list) == 0 {
		return nil
	}
	return observers(list)
}

type observers []Observer

func (list observers) Announced(eff *Announce) {
	for _, o := range list {
		o.Announced(eff)
	}
}

func (list observers) Loading(eff *Load) {
	for _, o := range list {
		o.Loading(eff)
	}
}

func (list observers) Dropped(eff *Drop) {
	for _, o := range list {
		o.Dropped(eff)
	}
}

func (list observers) Starts(eff *Execute, scope progress.Scope) {
	for _, o := range list {
		o.Starts(eff, scope)
	}
}

func (list observers) Ended(eff *Execute, ev *Executed) {
	for _, o := range list {
		o.Ended(eff, ev)
	}
}

func (list observers) ImportFailed(name string, err error) {
	for _, o := range list {
		if o, ok := o.(ImportObserver); ok {
			o.ImportFailed(name, err)
		}
	}
}

func (list observers) Queried(eff *Query, found Found) {
	for _, o := range list {
		if o, ok := o.(LookupObserver); ok {
			o.Queried(eff, found)
		}
	}
}
