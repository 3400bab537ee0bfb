package solver

import (
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Event is something that happened. The outcome of an effect has the effect in
// it.
type Event interface{ apply(*Core) }

// bringer is an Event that brings results.
type bringer interface {
	// unused gives them back, if no core takes the event.
	unused()
}

func unused(ev Event) {
	if b, ok := ev.(bringer); ok {
		b.unused()
	}
}

// ErrUnwanted ends the wait for an execution that was cancelled.
var ErrUnwanted = errors.New("nobody wants the result any more")

// Requested asks for an edge's result; the answer is an Answer with the id.
type Requested struct {
	Call int
	Edge Edge
}

func (ev *Requested) apply(c *Core) {
	e := c.add(ev.Edge.Vertex).edge(ev.Edge.Index)
	if e.status == done {
		c.do(&Answer{Call: ev.Call, Result: e.result.Clone()})
		return
	}
	e.wanted[theResult]++
	c.calls[ev.Call], c.ids[e] = e, append(c.ids[e], ev.Call)
	c.touch(e.node)
}

// Abandoned takes a request back.
type Abandoned struct {
	Call int
}

func (ev *Abandoned) apply(c *Core) {
	e := c.calls[ev.Call]
	if e == nil {
		return // answered already
	}
	delete(c.calls, ev.Call)
	c.ids[e] = slices.DeleteFunc(c.ids[e], func(id int) bool { return id == ev.Call })
	e.wanted[theResult]--
	c.touch(e.node)
}

// FoundLost says that a result that answered a request turned out lost when it
// was used.
type FoundLost struct {
	Edge   Edge
	Record string // the result's ID
	Err    error
}

func (ev *FoundLost) apply(c *Core) {
	n := c.lookup(ev.Edge.Vertex)
	if n == nil {
		return // the request hasn't been heard of
	}
	if e := n.edge(ev.Edge.Index); e.status == done && e.result.ID() == ev.Record {
		c.lose(e, ev.Err)
	}
}

// GotCacheMap is the outcome of GetCacheMap.
type GotCacheMap struct {
	*GetCacheMap
	Map  *CacheMap
	More bool
	Err  error
}

func (ev *GotCacheMap) apply(c *Core) {
	n := ev.node
	n.asking = false
	c.closeOne(n)
	if ev.Err == nil {
		ev.Err = n.check(ev.Map, ev.More)
	}
	if ev.Err != nil {
		c.fail(n, vertexError(n.vertex, ev.Err))
		return
	}
	if len(n.ops) == 0 {
		n.deps, n.transient = ev.Map.Deps, ev.Map.Transient
		for _, e := range n.edges {
			e.byContentOnly = n.transient
		}
		for i := range n.inputs {
			if n.deps[i].Content == nil {
				n.inputs[i].digest = neverDigested
			}
		}
	}
	n.ops = append(n.ops, ev.Map.Digest)
	n.more = ev.More
}

// check verifies what an op says of itself.
func (n *node) check(m *CacheMap, more bool) error {
	switch {
	case m == nil:
		return fmt.Errorf("internal error: %s has no cache map", n.vertex.Name)
	case len(m.Deps) != len(n.inputs):
		return fmt.Errorf("internal error: cache map of %s describes %d inputs, there are %d", n.vertex.Name, len(m.Deps), len(n.inputs))
	case m.Transient && (len(n.inputs) > 0 || len(n.ops) > 0 || more):
		return fmt.Errorf("internal error: the key of %s is transient, though it has inputs or several cache maps", n.vertex.Name)
	case more && len(n.inputs) > 0:
		return fmt.Errorf("internal error: %s has inputs and several cache maps", n.vertex.Name)
	}
	return nil
}

// Queried is the outcome of Query.
type Queried struct {
	*Query
	Found Found
}

func (ev *Queried) apply(c *Core) {
	e := ev.edge
	if e.status != matching || e.query != ev.Query {
		return // an execution for another output has made it meanwhile
	}
	e.status = unresolved
	e.found = &ev.Found
	if len(c.avoid) > 0 {
		e.found.Records = slices.DeleteFunc(e.found.Records, func(r Record) bool { return c.avoid[r.String()] })
	}
	c.touch(e.node)
}

// Loaded is the outcome of Load.
type Loaded struct {
	*Load
	Result Result
	Err    error
}

func (ev *Loaded) unused() { release(ev.Result) }

func (ev *Loaded) apply(c *Core) {
	e := ev.edge
	if ev.Err != nil {
		c.avoid[ev.Record.String()], e.lost = true, true
		if ev.Record.Import == 0 && errors.Is(ev.Err, ErrNoResult) {
			c.do(&Drop{Edge: e.ref(), Records: []string{ev.Record.Result}, Reason: ev.Err.Error()})
		}
	}
	switch awaited := e.status == loading && e.found.Records[0] == ev.Record; {
	case awaited && ev.Err != nil:
		e.found.Records = e.found.Records[1:]
		e.status = unresolved
		c.touch(e.node)
	case awaited:
		c.hitBy(ev)
	case ev.Err == nil: // an execution for another output has made it meanwhile
		c.do(&Release{Result: ev.Result})
	}
}

// hitBy gives an edge the record that was loaded for it.
func (c *Core) hitBy(ev *Loaded) {
	e := ev.edge
	c.do(&Cached{Vertex: e.node.vertex})
	c.loaded[e] = ev.Record.String()
	if l := e.lookup(); ev.Record.Import > 0 {
		c.do(&Adopt{Save: Save{Lookup: l, Keys: e.found.Keys, Result: ev.Result.Clone()}, Record: ev.Record})
		c.adoptBelow(e.node)
	} else if l.alternatives() {
		// What led here by content leads here by definition from now on.
		c.do(&Link{Save: Save{Lookup: l, Keys: e.found.Keys}})
	}
	e.byContentOnly = false
	c.succeed(e, ev.Result)
}

// adoptBelow makes what n stands on the daemon's own, as far as only an import
// has it: otherwise the way of keys to n would end with the import.
func (c *Core) adoptBelow(n *node) {
	stack := []*node{n}
	for len(stack) > 0 {
		n := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for i := range n.inputs {
			e := n.inputs[i].edge
			if e.adopted || e.status == done || e.byContentOnly || len(e.found.Keys) == 0 {
				continue
			}
			e.adopted = true
			var r Record
			if len(e.found.Records) > 0 {
				r = e.found.Records[0]
			}
			if r.Import > 0 || r.Result == "" && len(e.node.inputs) > 0 {
				c.do(&Adopt{Save: Save{Lookup: e.lookup(), Keys: e.found.Keys}, Record: r})
				stack = append(stack, e.node)
			}
		}
	}
}

// alternatives reports whether there is a candidate that may not lead to what
// was found.
func (l Lookup) alternatives() bool {
	return slices.ContainsFunc(l.Inputs, func(keys []InputKey) bool { return len(keys) > 1 })
}

// Digested is the outcome of Digest.
type Digested struct {
	*Digest
	Content digest.Digest
	Err     error
}

func (ev *Digested) apply(c *Core) {
	in := ev.input
	n := in.node
	in.digest = undigested
	c.closeOne(n)
	switch lost := asLost(ev.Err); {
	case in.outdated:
		in.outdated = false
	case lost != nil:
		c.loseInputs(n, []int{ev.Input}, lost)
	case ev.Err != nil:
		c.fail(n, vertexError(n.vertex, ev.Err))
	default:
		in.digest, in.content = digested, ContentKey(ev.Content)
	}
	c.settle(in)
}

// Executed is the outcome of Execute: a result for every wanted edge, and maybe
// for others; all are saved.
type Executed struct {
	*Execute
	Outputs []Output
	Cached  bool // another build's result had landed meanwhile
	Err     error
}

// Output is a result of an execution.
type Output struct {
	Index  int
	Result Result
	Keys   []Key // by which it is found
	// Apart is set if somebody else's result is found by the keys, too, who ran
	// the step meanwhile and couldn't share it.
	Apart bool
}

func (ev *Executed) unused() {
	for _, out := range ev.Outputs {
		out.Result.Release()
	}
}

func (ev *Executed) apply(c *Core) {
	n := ev.node
	n.running, n.cancelled = nil, false
	c.closeOne(n)
	switch lost := asLost(ev.Err); {
	case errors.Is(ev.Err, ErrUnwanted):
	case lost != nil:
		c.loseInputs(n, lost.Inputs, lost)
	case ev.Err != nil:
		c.fail(n, vertexError(n.vertex, ev.Err))
	default:
		for _, out := range ev.Outputs {
			c.land(n.edge(out.Index), out, ev.Cached)
		}
	}
	for _, e := range n.edges {
		if e.status == executing {
			e.status = unresolved
		}
	}
	for i := range n.inputs {
		in := &n.inputs[i]
		in.outdated = false
		if ev.Err != nil {
			c.settle(in) // it may have been made again meanwhile
		}
	}
}

// land gives e what an execution, or whoever did the same before, made of it.
func (c *Core) land(e *edge, out Output, cached bool) {
	if len(e.node.inputs) == 0 {
		out.Keys = rootKeys(e.node.ops, int(e.index)) // whatever others know it by
	}
	switch {
	case e.status == done:
		c.do(&Release{Result: out.Result})
	case cached:
		e.keys, e.byContentOnly = out.Keys, false
		c.succeed(e, out.Result)
	default:
		c.made(e, out)
	}
}

// loseInputs sends inputs of n back to be made again.
func (c *Core) loseInputs(n *node, inputs []int, cause *LostError) {
	n.losses++
	for _, i := range inputs {
		if i < 0 || i >= len(n.inputs) {
			c.fail(n, vertexError(n.vertex, fmt.Errorf("internal error: %s lost input %d of %d: %w", n.vertex.Name, i, len(n.inputs), cause)))
			return
		}
	}
	if n.losses > maxLosses || len(inputs) == 0 {
		c.fail(n, vertexError(n.vertex, fmt.Errorf("%s lost inputs %d times: %w", n.vertex.Name, n.losses, cause)))
		return
	}
	for _, i := range inputs {
		// One that is outdated has been lost, and maybe made again, meanwhile.
		if in := &n.inputs[i]; !in.outdated && in.edge.status == done {
			c.lose(in.edge, cause)
		}
	}
	c.touch(n)
}

// vertexError blames v, unless err already blames another vertex.
func vertexError(v *Vertex, err error) *VertexError {
	var ve *VertexError
	if errors.As(err, &ve) {
		return ve
	}
	return &VertexError{Vertex: v, Err: err}
}

func release(r Result) {
	if r != nil {
		r.Release()
	}
}
