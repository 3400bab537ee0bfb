package solver

import (
	"slices"
)

// decide is the one place where the next step of an edge is chosen. The rules:
//
//  1. An edge asks as little as possible, in rising order of cost: the first
//     keys by definition, all keys by definition, the content of inputs, an
//     execution. It stops as soon as a record is found.
//  2. Inputs are asked for keys side by side, and for a result only when it is
//     needed: to digest its content, or to execute.
//  3. Content is digested when keys by definition found nothing, the op offers
//     a content function, and the other inputs can still match: an input that
//     is matched by definition only, and isn't, rules every record out. Before
//     an execution the rest is digested too, for the keys it is saved under.
//  4. A vertex that ignores the cache looks nothing up and runs.
//  5. An edge that has what was asked of it takes back what it asked of others.
func (c *Core) decide(e *edge) {
	n := e.node
	if n.err != nil && e.status != done {
		c.refuse(e)
		return
	}
	want := e.want()
	if e.status == done || e.status == matching || e.status == loading || n.running || want == nothing {
		return
	}
	if len(n.maps) == 0 {
		c.askMap(n)
	}
	for _, in := range n.inputs {
		c.ask(e, in, firstKeys)
	}
	if len(n.maps) == 0 || !c.inputsTold(n, firstKeys) {
		return
	}
	if n.vertex.IgnoreCache {
		c.tell(e, allKeys)
	} else if !c.match(e, want) {
		return
	}
	if want == theResult {
		c.prepare(e)
	}
}

// match asks the store, for as many keys as want needs. It reports whether
// there is nothing left to find by definition or known content.
func (c *Core) match(e *edge, want level) bool {
	if c.askStore(e) || c.hit(e, want) {
		return false
	}
	c.tell(e, firstKeys)
	if want == firstKeys {
		return false
	}
	if e.told < allKeys && c.moreKeys(e) {
		return false
	}
	if c.askStore(e) || c.hit(e, want) {
		return false
	}
	c.tell(e, allKeys)
	return want == theResult
}

// moreKeys asks for every key by definition. It reports whether there is
// something to wait for.
func (c *Core) moreKeys(e *edge) bool {
	n := e.node
	if len(n.inputs) == 0 {
		if n.more {
			c.askMap(n)
		}
		return n.more
	}
	for _, in := range n.inputs {
		c.ask(e, in, allKeys)
	}
	return !c.inputsTold(n, allKeys)
}

func (c *Core) askMap(n *node) {
	if !n.asking {
		n.asking = true
		c.do(&GetCacheMap{Vertex: n.vertex, Index: len(n.maps)})
	}
}

// inputsTold reports whether every input has told its keys up to l. A failed
// input fails the node.
func (c *Core) inputsTold(n *node, l level) bool {
	told := true
	for _, in := range n.inputs {
		if err := in.edge.node.err; err != nil && in.edge.status != done {
			c.fail(n, err)
			return false
		}
		told = told && in.edge.told >= l
	}
	return told
}

// askStore starts a lookup if there are candidates that weren't looked up yet.
func (c *Core) askStore(e *edge) bool {
	l := e.lookup()
	count := len(l.Roots)
	for _, in := range l.Inputs {
		count += len(in)
	}
	if count == e.asked {
		return false
	}
	e.asked = count
	e.status = matching
	c.do(&Query{Edge: e.ref(), Lookup: l})
	return true
}

// lookup is what is known of e that a store could be asked with.
func (e *edge) lookup() Lookup {
	n := e.node
	l := Lookup{Op: n.maps[0].Digest, Output: e.index}
	if len(n.inputs) == 0 {
		for _, m := range n.maps {
			l.Roots = append(l.Roots, RootKey(m.Digest, e.index))
		}
		return l
	}
	l.Inputs = make([][]InputKey, len(n.inputs))
	for i, in := range n.inputs {
		for _, k := range in.edge.keys {
			l.Inputs[i] = append(l.Inputs[i], InputKey{Key: k, Selector: n.maps[0].Deps[i].Selector})
		}
		if in.digest == digested {
			l.Inputs[i] = append(l.Inputs[i], InputKey{Key: in.content})
		}
	}
	return l
}

// hit takes the best record, if there is one.
func (c *Core) hit(e *edge, want level) bool {
	if len(e.found.Records) == 0 {
		return false
	}
	c.tell(e, allKeys)
	if want == theResult {
		e.status = loading
		c.drop(e)
		c.do(&Load{Edge: e.ref(), Record: e.found.Records[0], Reason: e.hitReason()})
	}
	return true
}

func (e *edge) hitReason() string {
	for _, in := range e.node.inputs {
		if in.digest == digested {
			return "hit: by content"
		}
	}
	return "hit: by definition"
}

// tell lets consumers know e's keys up to l.
func (c *Core) tell(e *edge, l level) {
	keys := e.found.Keys
	if len(e.node.inputs) == 0 {
		keys = e.lookup().Roots
	}
	if l <= e.told && len(keys) == len(e.keys) {
		return
	}
	e.told = max(e.told, l)
	e.keys = keys
	c.wake(e)
}

// prepare gets what an execution needs: digests that may still find a record,
// then the results of all inputs.
func (c *Core) prepare(e *edge) {
	n := e.node
	e.status = waiting
	need := c.contentsThatMayMatch(e)
	if len(need) == 0 {
		need = indexes(n.inputs)
	}
	ready := true
	for _, i := range need {
		in := n.inputs[i]
		c.ask(e, in, theResult)
		switch {
		case in.edge.node.err != nil && in.edge.status != done:
			c.fail(n, in.edge.node.err)
			return
		case in.edge.status != done:
			ready = false
		case n.maps[0].Deps[i].Content != nil && in.digest != digested:
			ready = false
			if in.digest == undigested {
				in.digest = digesting
				c.do(&Digest{Vertex: n.vertex, Input: i, Dep: n.maps[0].Deps[i], Result: in.edge.result.Clone()})
			}
		}
	}
	// A digest that arrives is looked up before this is reached again.
	if ready {
		c.execute(e)
	}
}

// contentsThatMayMatch lists the inputs whose content could still lead to a
// record.
func (c *Core) contentsThatMayMatch(e *edge) []int {
	n := e.node
	if n.vertex.IgnoreCache {
		return nil
	}
	var open, unmatched []int
	for i, in := range n.inputs {
		byContent := n.maps[0].Deps[i].Content != nil && in.digest != digested
		matched := e.found.Matched[i]
		switch {
		case byContent && !matched:
			unmatched = append(unmatched, i)
		case byContent:
			open = append(open, i)
		case !matched:
			return nil
		}
	}
	if len(unmatched) > 0 {
		return unmatched
	}
	return open
}

func indexes[T any](s []T) []int {
	out := make([]int, len(s))
	for i := range s {
		out[i] = i
	}
	return out
}

// execute runs e's vertex.
func (c *Core) execute(e *edge) {
	n := e.node
	n.running = true
	x := &Execute{Vertex: n.vertex, Op: n.maps[0].Digest, Deps: n.maps[0].Deps, Reason: "run: no record"}
	if n.vertex.IgnoreCache {
		x.Reason = "run: ignore-cache"
	}
	for _, in := range n.inputs {
		x.Inputs = append(x.Inputs, in.edge.result.Clone())
	}
	for _, i := range slices.Sorted(keysOf(n.edges)) {
		o := n.edges[i]
		if o.want() != theResult || o.status == done {
			continue
		}
		o.status = executing
		x.Saves = append(x.Saves, o.save())
	}
	c.do(x)
}

func keysOf(m map[int]*edge) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// save is how e's result is made findable: under the keys that its inputs
// already lead to, or else under a new one.
func (e *edge) save() Save {
	l := e.lookup()
	s := Save{Lookup: l, Keys: e.found.Keys}
	switch {
	case len(l.Inputs) == 0:
		s.Keys = l.Roots
	case len(s.Keys) == 0:
		first := make([]InputKey, len(l.Inputs))
		for i, keys := range l.Inputs {
			if len(keys) > 0 {
				first[i] = keys[len(keys)-1] // by content, if it was digested
			}
		}
		s.Keys = []Key{derivedKey(l.Op, l.Output, first)}
	}
	return s
}

// refuse answers callers of an edge whose vertex has failed.
func (c *Core) refuse(e *edge) {
	for _, call := range e.calls {
		c.do(&Answer{Call: call.id, Err: e.node.err})
	}
	e.calls = nil
	if e.status != failed {
		e.status = failed
		c.wake(e)
	}
}
