package solver

import "slices"

// decide is the one place where the next step of a vertex is chosen. The rules:
//
//  1. A vertex asks as little as possible, in rising order of cost: the first
//     keys by definition, all keys by definition, the content of inputs, an
//     execution. It stops as soon as a record is found, and takes back what it
//     asked of its inputs.
//  2. Inputs are asked for keys side by side, and for a result only when it is
//     needed: to digest its content, or to execute.
//  3. Content is digested when keys by definition found nothing, the op offers
//     a content function, and the other inputs can still match: an input that
//     is matched by definition only, and isn't, rules every record out. Before
//     an execution the rest is digested too, for the keys it is saved under. For
//     keys alone no input is executed, except a source that is asked in every
//     build: who stands on it has no other key.
//  4. A vertex that ignores the cache looks nothing up and runs, and so does one
//     whose key is transient. What they made, unless it is an ignore-cache one
//     without inputs, is matched by content only; so is what others made of it.
//  5. An execution makes all outputs, so one that is asked for later is there.
//  6. A record that can't be had is a miss, and so is a lookup that fails.
//  7. All key stores are asked, the daemon's own and those that the build
//     imports. What was used of an import is saved.
//  8. An execution that nobody wants any more is cancelled; if somebody wants
//     it again, it starts over.
func (c *Core) decide(n *node) {
	if n.err != nil {
		c.refuse(n)
		return
	}
	unmet, results := n.demand()
	switch {
	case n.running != nil && results == 0 && !n.cancelled:
		n.cancelled = true
		c.do(&Cancel{Execute: n.running})
	case n.running != nil:
	case unmet == 0:
		c.drop(n)
	default:
		for _, e := range n.edges {
			c.resolve(e)
		}
	}
}

// demand counts the edges that lack what is wanted of them and don't wait for
// a load, and those of which the result is wanted and isn't there.
func (n *node) demand() (unmet, results int) {
	for _, e := range n.edges {
		want := e.want()
		if want == nothing || e.status == done {
			continue
		}
		if want == theResult {
			results++
		}
		if e.status != loading {
			unmet++
		}
	}
	return unmet, results
}

// resolve takes the next step of one edge whose vertex doesn't run.
func (c *Core) resolve(e *edge) {
	n, want := e.node, e.want()
	if want == nothing || e.status == done || e.status == matching || e.status == loading {
		return
	}
	if len(n.ops) == 0 {
		c.askMap(n)
	}
	c.askInputs(n, firstKeys)
	if n.blocked() {
		return
	}
	if n.ignoreCache {
		c.tell(e, allKeys)
	} else if !c.match(e, want) {
		return
	}
	if want == theResult {
		c.prepare(e)
	}
}

// blocked reports whether something must come before the next decision.
func (n *node) blocked() bool { return n.open > 0 || n.running != nil || n.err != nil }

// match asks the store, for as many keys as want needs. It reports whether
// there is nothing left to find by definition or known content.
func (c *Core) match(e *edge, want level) bool {
	for {
		if c.askStore(e) || c.hit(e, want) {
			return false
		}
		if e.node.knowsAllKeys() && (want > firstKeys || !e.mayAskSources()) {
			break
		}
		c.tell(e, firstKeys)
		if want == firstKeys || c.moreKeys(e.node) {
			return false
		}
	}
	if want == allKeys && c.askSources(e) {
		return false
	}
	c.tell(e, allKeys)
	return want == theResult
}

// knowsAllKeys reports whether there are no more by definition to ask for.
func (n *node) knowsAllKeys() bool {
	for i := range n.inputs {
		if !n.inputs[i].edge.has(allKeys) {
			return false
		}
	}
	return len(n.inputs) > 0 || !n.more
}

// askSources asks for the content of those inputs that have nothing else to be
// matched by, if the others match. It reports whether there is something to wait
// for.
func (c *Core) askSources(e *edge) bool {
	if !e.mayAskSources() {
		return false
	}
	n := e.node
	for i := range n.inputs {
		if in := &n.inputs[i]; in.isSource() {
			c.ask(in, theResult)
		}
	}
	return n.blocked()
}

// mayAskSources reports whether there are such inputs, and the others match.
func (e *edge) mayAskSources() (may bool) {
	for i := range e.node.inputs {
		switch {
		case e.node.inputs[i].isSource():
			may = true
		case !e.found.matched(i):
			return false
		}
	}
	return may
}

// isSource reports whether only its content can match in, and isn't known yet.
func (in *input) isSource() bool { return in.digest == undigested && in.edge.node.transient }

// moreKeys asks for every key by definition, also if those known had led to a
// record that then couldn't be had. It reports whether there is something to
// wait for.
func (c *Core) moreKeys(n *node) bool {
	if len(n.inputs) == 0 && n.more {
		c.askMap(n)
	}
	c.askInputs(n, allKeys)
	return n.blocked()
}

func (c *Core) askMap(n *node) {
	if !n.asking {
		n.asking = true
		n.open++
		c.do(&GetCacheMap{Vertex: n.vertex, Index: len(n.ops), node: n})
	}
}

func (c *Core) askInputs(n *node, l level) {
	if n.asked >= l {
		return
	}
	n.asked = l
	for i := range n.inputs {
		c.ask(&n.inputs[i], l)
	}
}

// askStore starts a lookup if there are candidates that weren't looked up yet.
func (c *Core) askStore(e *edge) bool {
	count := int32(e.candidates())
	if count == e.asked || e.node.transient {
		return false
	}
	e.asked = count
	if count == 0 {
		e.found = &nothingFound
		return false
	}
	e.status = matching
	e.query = &Query{Edge: e.ref(), Lookup: e.lookup(), edge: e}
	c.do(e.query)
	return true
}

// candidates counts what lookup would ask with.
func (e *edge) candidates() (count int) {
	n := e.node
	if len(n.inputs) == 0 {
		return len(n.ops)
	}
	for i := range n.inputs {
		in := &n.inputs[i]
		if !in.edge.byContentOnly {
			count += len(in.edge.keys)
		}
		if in.digest == digested {
			count++
		}
	}
	return count
}

// lookup is what is known of e that a record may be found by.
func (e *edge) lookup() Lookup { return e.identity(false) }

// identity is what is known of e: all of it is what a result is saved under, but
// the keys of inputs that are matched by content only may lead to records that
// are older than they are.
func (e *edge) identity(all bool) Lookup {
	n := e.node
	l := Lookup{Op: n.ops[0], Output: int(e.index)}
	if len(n.inputs) == 0 {
		l.Roots = rootKeys(n.ops, int(e.index))
		return l
	}
	l.Inputs = make([][]InputKey, len(n.inputs))
	keys := make([]InputKey, 0, e.candidates())
	for i := range n.inputs {
		in, start := &n.inputs[i], len(keys)
		// A key that tells who is asked leads nobody anywhere.
		if !in.edge.byContentOnly || all && !(in.edge.node.transient && in.digest == digested) {
			for _, k := range in.edge.keys {
				keys = append(keys, InputKey{Key: k, Selector: n.deps[i].Selector})
			}
		}
		if in.digest == digested {
			keys = append(keys, InputKey{Key: in.content})
		}
		l.Inputs[i] = slices.Clip(keys[start:])
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
		c.do(&Load{Edge: e.ref(), Lookup: e.lookup(), Record: e.found.Records[0], Reason: e.hitReason(), edge: e})
		c.touch(e.node)
	}
	return true
}

func (e *edge) hitReason() string {
	for i := range e.node.inputs {
		if e.node.inputs[i].digest == digested {
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
// then the results of all inputs. What the digests found is looked up before
// this is reached again.
func (c *Core) prepare(e *edge) {
	n := e.node
	if need := c.contentsThatMayMatch(e); len(need) > 0 {
		for _, in := range need {
			c.ask(in, theResult)
		}
	} else {
		c.askInputs(n, theResult)
	}
	if !n.blocked() {
		c.execute(e)
	}
}

// contentsThatMayMatch lists the inputs whose content could still lead to a
// record.
func (c *Core) contentsThatMayMatch(e *edge) []*input {
	n := e.node
	if n.ignoreCache {
		return nil
	}
	var matched, unmatched []*input
	for i := range n.inputs {
		switch in := &n.inputs[i]; {
		case in.digest == undigested && e.found.matched(i):
			matched = append(matched, in)
		case in.digest == undigested:
			unmatched = append(unmatched, in)
		case !e.found.matched(i):
			return nil
		}
	}
	if len(unmatched) > 0 {
		return unmatched
	}
	return matched
}

// execute runs e's vertex.
func (c *Core) execute(e *edge) {
	n := e.node
	n.open++
	x := &Execute{
		Vertex: n.vertex, node: n, Ops: n.ops, Deps: n.deps, Transient: n.transient, Reason: e.runReason(),
		Inputs: make([]Result, len(n.inputs)),
	}
	for i := range n.inputs {
		in := &n.inputs[i]
		x.Inputs[i] = in.edge.result.Clone()
		if in.digest == digested {
			if x.Contents == nil {
				x.Contents = make([]Key, len(n.inputs))
			}
			x.Contents[i] = in.content
		}
	}
	for _, o := range n.edges {
		if o.want() != theResult || o.status == done || o.status == loading {
			continue
		}
		o.status = executing
		w := Wanted{Lookup: o.lastLookup()}
		w.Save = o.save(w.Lookup)
		x.Wanted = append(x.Wanted, w)
	}
	n.running = x
	c.do(x)
}

// lastLookup is e's lookup, which mostly is what was asked for last.
func (e *edge) lastLookup() Lookup {
	if e.asked > 0 && int(e.asked) == e.candidates() {
		return e.query.Lookup
	}
	return e.lookup()
}

// runReason says why nothing was found.
func (e *edge) runReason() string {
	n := e.node
	if n.ignoreCache {
		return "run: ignore-cache"
	}
	if n.transient {
		return "run: it is asked for in every build"
	}
	if e.lost {
		return "run: the record is lost"
	}
	missed := -1
	for i := range n.inputs {
		switch {
		case n.inputs[i].edge.byContentOnly && n.inputs[i].digest != digested:
			return "run: input " + itoa(i) + " is new in every build"
		case !e.found.matched(i) && missed < 0:
			missed = i
		}
	}
	switch {
	case len(n.inputs) == 0 || len(e.found.Keys) > 0:
		return "run: no record"
	case missed >= 0:
		return "run: input " + itoa(missed) + " is new"
	}
	return "run: the inputs are new together"
}

// save is how e's result is made findable: under the keys that its inputs
// already lead to, or else under a new one.
func (e *edge) save(l Lookup) Save {
	if slices.ContainsFunc(e.node.inputs, func(in input) bool { return in.edge.byContentOnly }) {
		l = e.identity(true)
	}
	s := Save{Lookup: l, Keys: e.found.Keys}
	if e.node.transient {
		return s // findable by nothing
	}
	if len(s.Inputs) == 0 || len(s.Keys) == 0 {
		s.Keys = s.newKeys()
	}
	return s
}

// made gives e the result of an execution.
func (c *Core) made(e *edge, out Output) {
	n := e.node
	e.keys = out.Keys
	e.byContentOnly = out.Apart || n.transient || n.ignoreCache && len(n.inputs) > 0
	for i := range n.inputs {
		in := &n.inputs[i]
		e.byContentOnly = e.byContentOnly || in.edge.byContentOnly && in.digest != digested
	}
	c.succeed(e, out.Result)
}
