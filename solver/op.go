// Package solver decides which vertices of a graph run, in what order, and
// what is shared. It knows no LLB, files or containers.
//
// A Build is one request's graph. It feeds a Core, which decides and does
// nothing else, with events, performs the effects that follow, and puts their
// outcomes back as events. A Solver holds what builds share: the key store and
// the flights, executions that whoever asks for the same joins.
//
// What key stores have in common is in keygraph, the text format of events and
// effects in trace.
package solver

import (
	"context"
	"errors"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/opencontainers/go-digest"
)

// Vertex is an op with its inputs. Vertices with the same Digest and
// IgnoreCache are one vertex within a build, whichever request brought them.
// Vertices don't change after they are handed to a Build.
type Vertex struct {
	Digest      digest.Digest // of the op's bytes
	Name        string
	Inputs      []Edge
	Op          Op
	IgnoreCache bool
	Group       *progress.Group
	// ExportCache overrides whether the vertex's records are exported; nil is
	// the default.
	ExportCache *bool
}

// Edge is one output of a vertex.
type Edge struct {
	Vertex *Vertex
	Index  int
}

// Result is an opaque value an op returns. The solver only clones and releases
// it. The holder of a Result calls Release once.
type Result interface {
	// ID names the result in a ResultStore, across restarts.
	ID() string
	Clone() Result
	Release()
}

// Asker tells an op who waits for its answer.
type Asker interface {
	// Values returns the Value of every build that now waits, the first asker
	// first. It changes while a shared execution runs. Afterwards it is those that
	// got the result: what it fetches later, it may ask them for.
	Values() []any
}

// Op is the behaviour behind a vertex. Its methods may be called from several
// goroutines; ctx carries the vertex's progress.Scope.
type Op interface {
	// CacheMap returns the index-th identity of the op, cheapest first, and
	// whether there are more. Only ops without inputs may have several.
	CacheMap(ctx context.Context, asker Asker, index int) (m *CacheMap, more bool, err error)

	// Exec runs the op on its inputs, in the order of the vertex's inputs, and
	// returns one Result per output. The inputs stay the caller's. A Result
	// found to be gone, corrupt or unreachable is reported as a *LostError.
	Exec(ctx context.Context, asker Asker, inputs []Result) ([]Result, error)
}

// Limiter is an Op whose executions take a slot of a shared limit (LLB-035).
type Limiter interface {
	Op
	// Acquire waits for a slot; release gives it back.
	Acquire(ctx context.Context) (release func(), err error)
}

// Small is an Op that runs no process and waits for no other op. There may be
// thousands that are possible at once, so a build asks and executes only a few of
// them at a time, and digests few of their inputs.
type Small interface {
	Op
	Small()
}

// Sharer is an Op that may read something of its asker's own, such as secrets.
type Sharer interface {
	Op
	// SharingKey says what beside the cache key must agree for an execution to
	// be joined by another build, such as a keyed hash of the secrets that the
	// step reads, its resource limits, or a value unique to the asker if
	// nothing may be shared. It is never part of a cache key and never stored.
	SharingKey(ctx context.Context, asker Asker) (string, error)
}

// CacheMap is an op's answer to "what identifies you".
type CacheMap struct {
	Digest digest.Digest
	Deps   []Dep // one per input
	// Transient says that Digest tells who is asked, not what is there: no
	// record is saved under it, and consumers are matched by content only. It
	// is for ops without inputs.
	Transient bool
}

// Dep says how an input enters the key.
type Dep struct {
	// Selector narrows what of the input matters; it qualifies the input's
	// definition keys. "" is everything.
	Selector digest.Digest
	// Content digests what of the input matters, for keys by content; nil if
	// the input is matched by definition only.
	Content func(ctx context.Context, asker Asker, input Result) (digest.Digest, error)
	// Prepare is called with the input before Exec and before Content, for
	// example to fetch lazy content; may be nil.
	Prepare func(ctx context.Context, asker Asker, input Result) error
}

// ErrNoResult is returned by a ResultStore for a record that doesn't exist.
var ErrNoResult = errors.New("result not found")

// LostError reports inputs that turned out missing, corrupt or unreachable
// when they were used. The solver quarantines their records and solves the
// inputs again; it is never a build's error.
type LostError struct {
	Inputs []int // indexes into the inputs of Exec or, for Content and Prepare, the one input
	Err    error
}

func (e *LostError) Error() string { return "input lost: " + e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// VertexError says which vertex failed a build.
type VertexError struct {
	Vertex *Vertex
	Err    error
}

func (e *VertexError) Error() string { return e.Err.Error() }
func (e *VertexError) Unwrap() error { return e.Err }
