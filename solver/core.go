package solver

import (
	"slices"

	"github.com/opencontainers/go-digest"
)

// Core is all state of one build's graph. It decides and does nothing else: no
// I/O, no clock, no locks. Step turns one event into the effects that follow;
// whoever performs them sends their outcomes back as events. One goroutine owns
// a Core. The same events give the same effects.
type Core struct {
	nodes nodesByDigest
	fresh nodesByDigest   // those that ignore the cache
	order []*node         // every node, inputs first
	calls map[int]*edge   // the open requests, by their ids
	ids   map[*edge][]int // the same, in order of arrival
	avoid map[string]bool // records that turned out lost in this build

	loaded map[*edge]string // the records that results were loaded from

	effects []Effect
	dirty   []*node // to be decided before Step returns

	freeNodes  slab[node]
	freeInputs slab[input]
}

// NewCore returns a core without vertices.
func NewCore() *Core {
	return &Core{nodes: nodesByDigest{}, fresh: nodesByDigest{}, calls: map[int]*edge{}, ids: map[*edge][]int{}, avoid: map[string]bool{}, loaded: map[*edge]string{}}
}

type nodesByDigest map[digest.Digest]*node

// node is a vertex in the graph. Large graphs are mostly nodes and inputs, which
// are met in any order: they fill cache lines, and what is looked at together is
// in one. A node begins with its first edge, of which that is true in turn.
type node struct {
	first  edge
	vertex *Vertex

	// open counts the outcomes that must come before anything else is decided:
	// a cache map, the inputs that are waited for, digests, an execution.
	open        int32
	asked       level // of every input, at least; nothing if nothing is asked of any
	losses      uint8 // executions and digests that found an input lost
	ignoreCache bool
	transient   bool // as the cache map says
	more        bool // there are further cache maps
	asking      bool // for the next cache map
	cancelled   bool // what runs
	queued      bool // in Core.dirty
	running     *Execute
	inputs      []input
	err         *VertexError

	edges []*edge         // outputs that somebody asked for, by index
	ops   []digest.Digest // of the cache maps, cheapest first
	deps  []Dep
	one   [1]*edge // where edges is as long as there is one
}

// maxLosses bounds how often a vertex is tried again because inputs were lost.
const maxLosses = 5

// input is an edge that a node consumes. It fills a cache line: large graphs are
// mostly these.
type input struct {
	node  *node // the consumer
	edge  *edge
	next  *input // the next user of edge
	index int32

	want   level // what node wants of edge
	waits  bool  // edge doesn't have it yet; counted in node.open
	digest digestState
	// outdated is set if the result was lost while node worked with it.
	outdated bool
	content  Key // valid once digest is digested
}

type digestState uint8

const (
	undigested digestState = iota
	digesting
	digested
	neverDigested // it is matched by definition only
)

// edge is one output of a node. What its consumers look at comes first.
type edge struct {
	node   *node
	keys   []Key
	wanted [theResult + 1]int32 // users and requests, by what they want
	index  int32
	asked  int32 // candidates in the last lookup; -1 if it must be repeated
	status status
	told   level // up to which keys are known. Keys only grow
	// byContentOnly is set if what is saved under the keys may not be what the
	// edge is now: its vertex is transient, ignores the cache, ran on such an
	// input, or ran apart from others. Consumers match it by content only.
	byContentOnly bool
	lost          bool // a record of it was
	adopted       bool // what an import knows of the edge has been saved

	result      Result
	users, last *input // whoever consumes the edge, in order of arrival
	query       *Query // the last lookup
	found       *Found // what it found
}

// nothingFound is what is found before a lookup.
var nothingFound Found

// ref names e outside the core.
func (e *edge) ref() Edge { return Edge{Vertex: e.node.vertex, Index: int(e.index)} }

func (e *edge) want() level {
	for l := theResult; l > nothing; l-- {
		if e.wanted[l] > 0 {
			return l
		}
	}
	return nothing
}

// has reports whether somebody who wants l of e need not wait.
func (e *edge) has(l level) bool {
	return e.status == done || l < theResult && e.told >= l
}

// Step takes one event and returns what has to be done next, in a slice that is
// valid until the next call.
func (c *Core) Step(ev Event) []Effect {
	clear(c.effects)
	c.effects = c.effects[:0]
	ev.apply(c)
	for i := 0; i < len(c.dirty); i++ {
		n := c.dirty[i]
		n.queued = false
		c.decide(n)
	}
	c.dirty = c.dirty[:0]
	return c.effects
}

func (c *Core) do(e Effect) { c.effects = append(c.effects, e) }

func (c *Core) touch(n *node) {
	if !n.queued {
		n.queued = true
		c.dirty = append(c.dirty, n)
	}
}

// Release gives every result back that the core owns. It is the end of the core.
func (c *Core) Release() {
	for _, n := range c.order {
		for _, e := range n.edges {
			release(e.result)
		}
	}
}

// add brings root and everything below it into the graph, inputs first.
func (c *Core) add(root *Vertex) *node {
	type frame struct {
		node      *node
		connected int // so many of its inputs
	}
	var stack []frame
	n := c.lookup(root)
	if n == nil {
		n = c.newNode(root)
		stack = append(stack, frame{node: n})
	}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		if f.connected == len(f.node.inputs) {
			c.announce(f.node)
			stack = stack[:len(stack)-1]
			continue
		}
		in := f.node.vertex.Inputs[f.connected]
		if from := c.lookup(in.Vertex); from != nil {
			f.node.inputs[f.connected].connect(from.edge(in.Index))
			f.connected++
		} else {
			stack = append(stack, frame{node: c.newNode(in.Vertex)})
		}
	}
	return n
}

// lookup finds the node that v joins: a plain vertex that of its ignore-cache
// twin, not the reverse (LLB-007).
func (c *Core) lookup(v *Vertex) *node {
	if len(c.fresh) > 0 || v.IgnoreCache {
		if n := c.fresh[v.Digest]; n != nil || v.IgnoreCache {
			return n
		}
	}
	return c.nodes[v.Digest]
}

func (c *Core) newNode(v *Vertex) *node {
	n := &c.freeNodes.take(1)[0]
	n.vertex, n.ignoreCache, n.more = v, v.IgnoreCache, true
	n.inputs, n.edges = c.freeInputs.take(len(v.Inputs)), n.one[:0]
	for i := range n.inputs {
		n.inputs[i].node, n.inputs[i].index = n, int32(i)
	}
	return n
}

// announce makes n, whose inputs are connected, known.
func (c *Core) announce(n *node) {
	if n.ignoreCache {
		c.fresh[n.vertex.Digest] = n
	} else {
		c.nodes[n.vertex.Digest] = n
	}
	c.order = append(c.order, n)
	inputs := n.vertex.Inputs
	for i := range n.inputs {
		if joined := n.inputs[i].edge.ref(); joined != n.vertex.Inputs[i] {
			if &inputs[0] == &n.vertex.Inputs[0] {
				inputs = slices.Clone(inputs)
			}
			inputs[i] = joined
		}
	}
	c.do(&Announce{Vertex: n.vertex, Inputs: inputs})
}

func (n *node) edge(index int) *edge {
	i, ok := slices.BinarySearchFunc(n.edges, index, func(e *edge, index int) int { return int(e.index) - index })
	if !ok {
		e := &n.first
		if e.node != nil {
			e = &edge{}
		}
		*e = edge{node: n, index: int32(index), asked: -1, found: &nothingFound, byContentOnly: n.transient}
		n.edges = slices.Insert(n.edges, i, e)
	}
	return n.edges[i]
}

// slab hands out values that live as long as the core, many to an allocation: to
// the garbage collector a large graph is a few large objects.
type slab[T any] struct {
	free []T
	size int // of the last allocation
}

func (s *slab[T]) take(n int) []T {
	if n > len(s.free) {
		s.size = max(n, min(2*s.size, 1024), 8)
		s.free = make([]T, s.size)
	}
	out := s.free[:n:n]
	s.free = s.free[n:]
	return out
}

// connect makes in a user of e.
func (in *input) connect(e *edge) {
	in.edge = e
	if e.last == nil {
		e.users = in
	} else {
		e.last.next = in
	}
	e.last = in
}

// ask makes in's node want at least l of it.
func (c *Core) ask(in *input, l level) {
	if in.want < l {
		c.want(in, l)
	}
}

// drop takes back what n wants of its inputs.
func (c *Core) drop(n *node) {
	if n.asked == nothing {
		return
	}
	n.asked = nothing
	for i := range n.inputs {
		c.want(&n.inputs[i], nothing)
	}
}

func (c *Core) want(in *input, l level) {
	if in.want == l {
		return
	}
	e := in.edge
	before := e.want()
	e.wanted[in.want]--
	e.wanted[l]++
	in.want = l
	if e.want() != before {
		c.touch(e.node)
	}
	c.settle(in)
}

// wake lets those who wait for e see what it has now.
func (c *Core) wake(e *edge) {
	for in := e.users; in != nil; in = in.next {
		c.settle(in)
	}
}

// settle compares what in's node wants with what the edge has.
func (c *Core) settle(in *input) {
	if in.want == nothing && !in.waits {
		return
	}
	n := in.node
	if waits := !in.edge.has(in.want) && in.want > nothing; waits != in.waits {
		in.waits = waits
		if waits {
			n.open++
		} else {
			c.closeOne(n)
		}
	}
	switch {
	case in.waits && in.edge.status == failed:
		c.fail(n, in.edge.node.err)
	case in.want == theResult && !in.waits:
		c.digest(in)
	}
}

// closeOne counts an outcome that n has waited for.
func (c *Core) closeOne(n *node) {
	if n.open--; n.open == 0 {
		c.touch(n)
	}
}

// digest starts to digest the result that in has, if its content matters.
func (c *Core) digest(in *input) {
	n := in.node
	if in.digest != undigested || n.running != nil || n.err != nil {
		return
	}
	in.digest = digesting
	n.open++
	c.do(&Digest{Vertex: n.vertex, Input: int(in.index), Dep: n.deps[in.index], Result: in.edge.result.Clone(), input: in})
}

// succeed gives e its result, which e owns.
func (c *Core) succeed(e *edge, r Result) {
	delete(c.avoid, r.ID())
	e.status, e.result, e.told = done, r, allKeys
	e.query, e.found = nil, &nothingFound
	for _, call := range c.hangUp(e) {
		c.do(&Answer{Call: call, Result: r.Clone()})
	}
	c.wake(e)
	c.touch(e.node)
}

// hangUp takes all requests off e.
func (c *Core) hangUp(e *edge) (ids []int) {
	ids = c.ids[e]
	e.wanted[theResult] -= int32(len(ids))
	delete(c.ids, e)
	for _, id := range ids {
		delete(c.calls, id)
	}
	return ids
}

// fail ends n with err; so do all that need one of its edges.
func (c *Core) fail(n *node, err *VertexError) {
	if n.err == nil {
		n.err = err
		c.touch(n)
	}
}

// refuse answers whoever waits for an edge of n, which has failed.
func (c *Core) refuse(n *node) {
	c.drop(n)
	for _, e := range n.edges {
		if e.status == done {
			continue
		}
		e.status = failed
		for _, call := range c.hangUp(e) {
			c.do(&Answer{Call: call, Err: n.err})
		}
		c.wake(e)
	}
}

// lose forgets the result of e, so that it is found or made again.
func (c *Core) lose(e *edge, why error) {
	id := e.result.ID()
	c.avoid[id], c.avoid[c.loaded[e]] = true, true
	delete(c.loaded, e)
	e.lost = true
	c.do(&Drop{Edge: e.ref(), Records: []string{id}, Reason: why.Error()})
	c.do(&Release{Result: e.result})
	e.result, e.status, e.asked = nil, unresolved, -1
	for in := e.users; in != nil; in = in.next {
		in.outdated = in.node.running != nil || in.digest == digesting
		if in.digest == digested {
			in.digest = undigested
		}
		for _, o := range in.node.edges {
			o.asked = -1 // keys and content may be others
		}
		c.settle(in)
	}
	c.touch(e.node)
}
