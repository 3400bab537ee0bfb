package solver

import (
	"slices"

	"github.com/opencontainers/go-digest"
)

// Core is all state of one build's graph. It decides and does nothing else: no
// I/O, no clock, no locks. Step turns one event into the effects that follow;
// whoever performs them sends their outcomes back as events. One goroutine owns
// a Core.
type Core struct {
	nodes   map[nodeID]*node
	effects []Effect
	dirty   []*edge // to be decided before Step returns
}

// NewCore returns a core without vertices.
func NewCore() *Core { return &Core{nodes: map[nodeID]*node{}} }

// nodeID tells vertices apart within a build.
type nodeID struct {
	digest      digest.Digest
	ignoreCache bool
}

// node is a vertex in the graph.
type node struct {
	vertex *Vertex
	inputs []*input
	edges  map[int]*edge // outputs that somebody asked for

	maps    []*CacheMap // what the op said it is, cheapest first
	more    bool        // there are further ones
	asking  bool        // for the next cache map
	running bool
	lost    int // executions that found an input lost
	err     *VertexError
}

// maxLost bounds how often a vertex is tried again because inputs were lost.
const maxLost = 5

// input is an edge that a node consumes.
type input struct {
	edge    *edge
	digest  digestState
	content Key // valid once digest is digested
}

type digestState int

const (
	undigested digestState = iota
	digesting
	digested
)

// edge is one output of a node.
type edge struct {
	node   *node
	index  int
	status status

	// told is up to which level keys are known: they may only grow within a
	// level, and nothing new comes once it is allKeys.
	told level
	keys []Key

	found  Found
	asked  int // candidates in the last lookup; -1 if it must be repeated
	result Result

	wants map[*edge]level // by the edges that consume this one
	calls []*call         // requests from outside
}

// call is a request for an edge's result.
type call struct {
	id   int
	edge *edge
}

func (e *edge) want() level {
	l := nothing
	if len(e.calls) > 0 {
		l = theResult
	}
	for _, w := range e.wants {
		l = max(l, w)
	}
	return l
}

// Step takes one event and returns what has to be done next.
func (c *Core) Step(ev Event) []Effect {
	ev.apply(c)
	for len(c.dirty) > 0 {
		e := c.dirty[0]
		c.dirty = c.dirty[1:]
		c.decide(e)
	}
	out := c.effects
	c.effects = nil
	return out
}

func (c *Core) do(e Effect)   { c.effects = append(c.effects, e) }
func (c *Core) touch(e *edge) { c.dirty = append(c.dirty, e) }
func (c *Core) touchAll(n *node) {
	for _, e := range n.edges {
		c.touch(e)
	}
}

// told wakes everyone who consumes e.
func (c *Core) wake(e *edge) {
	for consumer := range e.wants {
		c.touch(consumer)
	}
}

// add brings v and everything below it into the graph, inputs first.
func (c *Core) add(root *Vertex) *node {
	type frame struct {
		v    *Vertex
		next int
	}
	if n := c.lookup(root); n != nil {
		return n
	}
	stack := []frame{{v: root}}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		if f.next < len(f.v.Inputs) {
			in := f.v.Inputs[f.next].Vertex
			f.next++
			if c.lookup(in) == nil {
				stack = append(stack, frame{v: in})
			}
			continue
		}
		if c.lookup(f.v) == nil {
			c.insert(f.v)
		}
		stack = stack[:len(stack)-1]
	}
	return c.lookup(root)
}

// lookup finds v's node; a plain vertex joins its ignore-cache twin, not the
// reverse (LLB-007).
func (c *Core) lookup(v *Vertex) *node {
	if n := c.nodes[nodeID{v.Digest, true}]; n != nil {
		return n
	}
	if v.IgnoreCache {
		return nil
	}
	return c.nodes[nodeID{v.Digest, false}]
}

func (c *Core) insert(v *Vertex) {
	n := &node{vertex: v, edges: map[int]*edge{}, more: true}
	for _, in := range v.Inputs {
		n.inputs = append(n.inputs, &input{edge: c.lookup(in.Vertex).edge(in.Index)})
	}
	c.nodes[nodeID{v.Digest, v.IgnoreCache}] = n
	c.do(&Announce{Vertex: v})
}

func (n *node) edge(index int) *edge {
	e := n.edges[index]
	if e == nil {
		e = &edge{node: n, index: index, asked: -1, wants: map[*edge]level{}}
		n.edges[index] = e
	}
	return e
}

// ask makes e want at least l of input in.
func (c *Core) ask(e *edge, in *input, l level) {
	if in.edge.wants[e] >= l {
		return
	}
	in.edge.wants[e] = l
	c.touch(in.edge)
}

// drop takes back what e wants of its inputs, and what they want of theirs.
func (c *Core) drop(e *edge) {
	for _, in := range e.node.inputs {
		if _, ok := in.edge.wants[e]; !ok {
			continue
		}
		delete(in.edge.wants, e)
		c.unwanted(in.edge)
	}
}

// unwanted is called when e is wanted less than before.
func (c *Core) unwanted(e *edge) {
	if e.want() == nothing && e.status < done {
		c.drop(e)
	}
	if e.node.running && !slices.ContainsFunc(edgesOf(e.node), func(e *edge) bool { return e.want() == theResult }) {
		c.do(&Cancel{Vertex: e.node.vertex})
	}
}

func edgesOf(n *node) []*edge {
	out := make([]*edge, 0, len(n.edges))
	for _, e := range n.edges {
		out = append(out, e)
	}
	return out
}

// succeed gives e its result, which e owns.
func (c *Core) succeed(e *edge, r Result) {
	e.status, e.result, e.told = done, r, allKeys
	c.drop(e)
	for _, call := range e.calls {
		c.do(&Answer{Call: call.id, Result: r.Clone()})
	}
	e.calls = nil
	c.wake(e)
}

// fail gives every edge of n, and everything that needs one, the error.
func (c *Core) fail(n *node, err *VertexError) {
	if n.err != nil {
		return
	}
	n.err = err
	for _, e := range n.edges {
		if e.status == done {
			continue
		}
		e.status = failed
		for _, call := range e.calls {
			c.do(&Answer{Call: call.id, Err: err})
		}
		e.calls = nil
		c.wake(e)
		c.drop(e)
	}
}
