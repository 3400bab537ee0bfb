package solver

import (
	"context"

	"github.com/opencontainers/go-digest"
)

// Effect is something to be done, at once and in order with the others of its
// step; its outcome, if it has one, comes back as an Event that has the effect
// in it, by which the core knows what it is of.
type Effect any

// Announce shows a vertex that entered the graph.
type Announce struct {
	Vertex *Vertex
	Inputs []Edge // the vertices that its inputs joined
}

// GetCacheMap asks an op what it is.
type GetCacheMap struct {
	Vertex *Vertex
	Index  int
	node   *node
}

// Query asks the key stores.
type Query struct {
	Edge   Edge
	Lookup Lookup
	edge   *edge
}

// Load turns a record into a result.
type Load struct {
	Edge   Edge
	Lookup Lookup // by which Record was found
	Record Record
	Reason string
	edge   *edge
}

// Digest computes the content digest of an input; it owns Result.
type Digest struct {
	Vertex *Vertex
	Input  int
	Dep    Dep
	Result Result
	input  *input
}

// Execute runs a vertex and saves its wanted outputs; it owns Inputs.
type Execute struct {
	Vertex *Vertex
	Ops    []digest.Digest // of its cache maps
	Deps   []Dep
	Inputs []Result
	// Contents identify what matters of each input, whichever result it is; the
	// zero Key if it was not digested. It is nil if none was.
	Contents  []Key
	Transient bool // the outputs are findable by nothing
	Wanted    []Wanted
	Reason    string
	node      *node
	stop      context.CancelCauseFunc // set when it is performed
}

// Wanted is an output that an execution is for.
type Wanted struct {
	Lookup Lookup // by which it may have become findable since it was looked up
	Save   Save
}

// Save is how output i, which was made, is found: as it is wanted, or, so that
// who asks for it later need not execute again, like the first that is wanted.
func (e *Execute) Save(i int) Save {
	for _, w := range e.Wanted {
		if w.Save.Output == i {
			return w.Save
		}
	}
	s := Save{Lookup: e.Wanted[0].Save.Lookup}
	s.Output = i
	if len(s.Inputs) == 0 {
		s.Roots = rootKeys(e.Ops, i)
	}
	s.Keys = s.newKeys()
	return s
}

// Cancel stops waiting for an execution that nobody wants any more.
type Cancel struct{ Execute *Execute }

// Cached shows that a vertex was answered from the cache.
type Cached struct{ Vertex *Vertex }

// Link saves further links to keys that exist.
type Link struct{ Save Save }

// Adopt saves what an import has: Save with its Result, which it owns, or, of a
// step that this one stands on, with Record if there is one.
type Adopt struct {
	Save   Save
	Record Record
}

// Drop forgets records that are lost.
type Drop struct {
	Edge    Edge // of which they were
	Records []string
	Reason  string
}

// Release gives a result back.
type Release struct{ Result Result }

// Answer ends a request; the receiver owns Result.
type Answer struct {
	Call   int
	Result Result
	Err    error
}
