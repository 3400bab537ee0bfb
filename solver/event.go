package solver

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// EdgeRef names an edge outside the core.
type EdgeRef struct {
	Vertex *Vertex
	Index  int
}

func (e *edge) ref() EdgeRef { return EdgeRef{Vertex: e.node.vertex, Index: e.index} }

func (c *Core) edgeOf(r EdgeRef) *edge { return c.lookup(r.Vertex).edge(r.Index) }

// Event is something that happened.
type Event interface {
	apply(*Core)
	String() string
}

// Requested asks for an edge's result; the answer is an Answer with the id.
type Requested struct {
	Call int
	Edge Edge
}

func (ev *Requested) String() string {
	return fmt.Sprintf("request %d %s", ev.Call, name(EdgeRef(ev.Edge)))
}

func (ev *Requested) apply(c *Core) {
	n := c.add(ev.Edge.Vertex)
	e := n.edge(ev.Edge.Index)
	if e.status == done {
		c.do(&Answer{Call: ev.Call, Result: e.result.Clone()})
		return
	}
	e.calls = append(e.calls, &call{id: ev.Call, edge: e})
	c.touch(e)
}

// Abandoned takes a request back.
type Abandoned struct{ Call int }

func (ev *Abandoned) String() string { return fmt.Sprintf("abandon %d", ev.Call) }

func (ev *Abandoned) apply(c *Core) {
	for _, n := range c.nodes {
		for _, e := range n.edges {
			for i, call := range e.calls {
				if call.id == ev.Call {
					e.calls = append(e.calls[:i:i], e.calls[i+1:]...)
					c.unwanted(e)
					return
				}
			}
		}
	}
}

// GotCacheMap is the outcome of GetCacheMap.
type GotCacheMap struct {
	Vertex *Vertex
	Map    *CacheMap
	More   bool
	Err    error
}

func (ev *GotCacheMap) String() string {
	if ev.Err != nil {
		return fmt.Sprintf("cachemap %s error=%q", ev.Vertex.Name, ev.Err)
	}
	return fmt.Sprintf("cachemap %s key=%s more=%v", ev.Vertex.Name, short(ev.Map.Digest), ev.More)
}

func (ev *GotCacheMap) apply(c *Core) {
	n := c.lookup(ev.Vertex)
	n.asking = false
	switch {
	case ev.Err != nil:
		c.fail(n, vertexError(n.vertex, ev.Err))
	case len(ev.Map.Deps) != len(n.inputs):
		c.fail(n, vertexError(n.vertex, fmt.Errorf("internal error: cache map of %s describes %d inputs, there are %d", n.vertex.Name, len(ev.Map.Deps), len(n.inputs))))
	default:
		n.maps = append(n.maps, ev.Map)
		n.more = ev.More
	}
	c.touchAll(n)
}

// Queried is the outcome of Query.
type Queried struct {
	Edge  EdgeRef
	Found Found
	Err   error
}

func (ev *Queried) String() string {
	if ev.Err != nil {
		return fmt.Sprintf("lookup %s error=%q", name(ev.Edge), ev.Err)
	}
	s := fmt.Sprintf("lookup %s keys=%d", name(ev.Edge), len(ev.Found.Keys))
	for _, r := range ev.Found.Records {
		s += " record=" + r.Result
	}
	return s
}

func (ev *Queried) apply(c *Core) {
	e := c.edgeOf(ev.Edge)
	if e.status != matching {
		return
	}
	e.status = unresolved
	if ev.Err != nil {
		c.fail(e.node, vertexError(e.node.vertex, fmt.Errorf("look up the cache: %w", ev.Err)))
		return
	}
	e.found = ev.Found
	c.touch(e)
}

// Loaded is the outcome of Load.
type Loaded struct {
	Edge   EdgeRef
	Record Record
	Result Result
	Err    error
}

func (ev *Loaded) String() string {
	if ev.Err != nil {
		return fmt.Sprintf("load %s record=%s error=%q", name(ev.Edge), ev.Record.Result, ev.Err)
	}
	return fmt.Sprintf("load %s record=%s", name(ev.Edge), ev.Record.Result)
}

func (ev *Loaded) apply(c *Core) {
	e := c.edgeOf(ev.Edge)
	if ev.Err != nil {
		// A record that can't be had is a miss: the next one, or an execution.
		c.do(&Drop{Records: []string{ev.Record.Result}, Reason: ev.Err.Error()})
		if len(e.found.Records) > 0 {
			e.found.Records = e.found.Records[1:]
		}
		e.status = unresolved
		c.touch(e)
		return
	}
	c.do(&Cached{Vertex: e.node.vertex})
	if len(e.node.inputs) > 0 {
		// What led here by content leads here by definition from now on.
		c.do(&Link{Save: Save{Lookup: e.lookup(), Keys: e.found.Keys}})
	}
	c.succeed(e, ev.Result)
}

// Digested is the outcome of Digest.
type Digested struct {
	Vertex *Vertex
	Input  int
	Digest digest.Digest
	Err    error
}

func (ev *Digested) String() string {
	if ev.Err != nil {
		return fmt.Sprintf("digest %s input=%d error=%q", ev.Vertex.Name, ev.Input, ev.Err)
	}
	return fmt.Sprintf("digest %s input=%d content=%s", ev.Vertex.Name, ev.Input, short(ev.Digest))
}

func (ev *Digested) apply(c *Core) {
	n := c.lookup(ev.Vertex)
	in := n.inputs[ev.Input]
	if ev.Err != nil {
		in.digest = undigested
		if lost := (*LostError)(nil); errors.As(ev.Err, &lost) {
			c.lose(n, []int{ev.Input}, lost)
			return
		}
		c.fail(n, vertexError(n.vertex, ev.Err))
		return
	}
	in.digest, in.content = digested, ContentKey(ev.Digest)
	c.touchAll(n)
}

// Executed is the outcome of Execute: a result for every edge in Saves.
type Executed struct {
	Vertex  *Vertex
	Outputs map[int]Result
	Cached  bool // another build's result had landed meanwhile
	Err     error
}

func (ev *Executed) String() string {
	switch {
	case ev.Err != nil:
		return fmt.Sprintf("execute %s error=%q", ev.Vertex.Name, ev.Err)
	case ev.Cached:
		return fmt.Sprintf("execute %s cached", ev.Vertex.Name)
	}
	return fmt.Sprintf("execute %s", ev.Vertex.Name)
}

func (ev *Executed) apply(c *Core) {
	n := c.lookup(ev.Vertex)
	n.running = false
	for _, e := range n.edges {
		if e.status == executing {
			e.status = unresolved
		}
	}
	if ev.Err != nil {
		var lost *LostError
		switch {
		case errors.As(ev.Err, &lost):
			c.lose(n, lost.Inputs, lost)
		case errors.Is(ev.Err, errUnwanted):
			c.touchAll(n)
		default:
			c.fail(n, vertexError(n.vertex, ev.Err))
		}
		return
	}
	for i, r := range ev.Outputs {
		e := n.edge(i)
		if e.status == done {
			c.do(&Release{Result: r})
			continue
		}
		e.keys = e.save().Keys
		c.succeed(e, r)
	}
	c.touchAll(n)
}

// lose sends inputs of n back to be made again.
func (c *Core) lose(n *node, inputs []int, cause *LostError) {
	if n.lost++; n.lost > maxLost {
		c.fail(n, vertexError(n.vertex, fmt.Errorf("internal error: inputs of %s were lost %d times in a row: %w", n.vertex.Name, n.lost, cause)))
		return
	}
	for _, i := range inputs {
		in := n.inputs[i]
		e := in.edge
		in.digest = undigested
		if e.status != done {
			continue
		}
		c.do(&Drop{Records: []string{e.result.ID()}, Reason: cause.Error()})
		c.do(&Release{Result: e.result})
		e.result, e.status, e.asked = nil, unresolved, -1
		e.found = Found{Keys: e.found.Keys, Matched: e.found.Matched}
		c.touch(e)
	}
	c.touchAll(n)
}

// vertexError blames v, unless err already blames another vertex.
func vertexError(v *Vertex, err error) *VertexError {
	var ve *VertexError
	if errors.As(err, &ve) {
		return ve
	}
	return &VertexError{Vertex: v, Err: err}
}

func name(e EdgeRef) string {
	if e.Index == 0 {
		return e.Vertex.Name
	}
	return fmt.Sprintf("%s/%d", e.Vertex.Name, e.Index)
}

func short(d digest.Digest) string {
	s := d.Encoded()
	return s[:min(len(s), 12)]
}
