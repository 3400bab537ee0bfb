package solver

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// Effect is something to be done, at once and in order with the others of its
// step; its outcome, if it has one, comes back as an Event.
type Effect interface{ String() string }

// Announce shows a vertex that entered the graph.
type Announce struct{ Vertex *Vertex }

func (e *Announce) String() string { return "announce " + e.Vertex.Name }

// GetCacheMap asks an op what it is.
type GetCacheMap struct {
	Vertex *Vertex
	Index  int
}

func (e *GetCacheMap) String() string {
	return fmt.Sprintf("get cachemap %d of %s", e.Index, e.Vertex.Name)
}

// Query asks the key stores.
type Query struct {
	Edge   EdgeRef
	Lookup Lookup
}

func (e *Query) String() string { return "start lookup of " + name(e.Edge) }

// Load turns a record into a result.
type Load struct {
	Edge   EdgeRef
	Record Record
	Reason string
}

func (e *Load) String() string {
	return fmt.Sprintf("start load %s: %s for %s", e.Record.Result, e.Reason, name(e.Edge))
}

// Digest computes the content digest of an input; it owns Result.
type Digest struct {
	Vertex *Vertex
	Input  int
	Dep    Dep
	Result Result
}

func (e *Digest) String() string {
	return fmt.Sprintf("start digest of input %d of %s", e.Input, e.Vertex.Name)
}

// Execute runs a vertex and saves its outputs; it owns Inputs.
type Execute struct {
	Vertex *Vertex
	Op     digest.Digest
	Deps   []Dep
	Inputs []Result
	Saves  []Save // one for each output that is wanted
	Reason string
}

func (e *Execute) String() string {
	return fmt.Sprintf("start execution of %s: %s", e.Vertex.Name, e.Reason)
}

// Cancel stops waiting for an execution that nobody wants any more.
type Cancel struct{ Vertex *Vertex }

func (e *Cancel) String() string { return "cancel " + e.Vertex.Name + ": no longer wanted" }

// Cached shows that a vertex was answered from the cache.
type Cached struct{ Vertex *Vertex }

func (e *Cached) String() string { return "cached " + e.Vertex.Name }

// Link saves further links to keys that exist.
type Link struct{ Save Save }

func (e *Link) String() string { return fmt.Sprintf("link %d keys", len(e.Save.Keys)) }

// Drop forgets records that are lost.
type Drop struct {
	Records []string
	Reason  string
}

func (e *Drop) String() string { return fmt.Sprintf("drop %v: %s", e.Records, e.Reason) }

// Release gives a result back.
type Release struct{ Result Result }

func (e *Release) String() string { return "release " + e.Result.ID() }

// Answer ends a request; the receiver owns Result.
type Answer struct {
	Call   int
	Result Result
	Err    error
}

func (e *Answer) String() string {
	if e.Err != nil {
		return fmt.Sprintf("answer %d error=%q", e.Call, e.Err)
	}
	return fmt.Sprintf("answer %d %s", e.Call, e.Result.ID())
}

// errUnwanted ends the wait for an execution that was cancelled.
var errUnwanted = errors.New("nobody wants the result any more")
