package solver_test

import (
	"fmt"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/opencontainers/go-digest"
)

// oracle evaluates builds one after another, depth first, with the rules of
// decide and nothing else: no events, no sharing, no concurrency.
type oracle struct {
	keys     *keygraph.Memory
	values   map[string]value
	executed map[string]int
}

// plainBuild is a build of the oracle. Its requests are evaluated one after
// another, and other builds may have their turn between them.
type plainBuild struct {
	o     *oracle
	edges map[plainID]*plain
	known map[vertexID]*known
	spare map[plainID]string // outputs that were made and not asked for
}

// vertexID tells vertices apart.
type vertexID struct {
	digest      digest.Digest
	ignoreCache bool
}

func vertexIDOf(v *Vertex) vertexID { return vertexID{v.Digest, v.IgnoreCache} }

type plainID struct {
	vertex vertexID
	index  int
}

// plain is an edge of the build that is evaluated.
type plain struct {
	b      *plainBuild
	o      *oracle
	v      *Vertex
	step   *step
	index  int
	inputs []*plain

	*known
	keys   []Key
	final  bool // keys lead to records
	found  Found
	result string
	forced bool
	err    error
}

// known is what the outputs of a vertex have in common.
type known struct {
	maps     int // how many cache maps were looked at
	contents map[int]Key
}

func newOracle() *oracle {
	return &oracle{keys: keygraph.NewMemory(), values: map[string]value{}, executed: map[string]int{}}
}

// plainResult names a result of the oracle.
type plainResult string

func (r plainResult) ID() string    { return string(r) }
func (r plainResult) Clone() Result { return r }
func (r plainResult) Release()      {}

func (o *oracle) newBuild() *plainBuild {
	return &plainBuild{o, map[plainID]*plain{}, map[vertexID]*known{}, map[plainID]string{}}
}

// solve evaluates edges as one build.
func (o *oracle) solve(edges ...Edge) (out []value, err error) {
	b := o.newBuild()
	for _, e := range edges {
		v, err := b.solve(e)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func (b *plainBuild) solve(e Edge) (value, error) {
	p := b.edge(e)
	err := p.solve()
	return b.o.values[p.result], err
}

func (b *plainBuild) edge(e Edge) *plain {
	id := plainID{vertexIDOf(e.Vertex), e.Index}
	if p := b.edges[id]; p != nil {
		return p
	}
	if b.known[id.vertex] == nil {
		b.known[id.vertex] = &known{maps: 1, contents: map[int]Key{}}
	}
	p := &plain{b: b, o: b.o, v: e.Vertex, step: e.Vertex.Op.(*step), index: e.Index, known: b.known[id.vertex]}
	b.edges[id] = p
	for _, in := range e.Vertex.Inputs {
		p.inputs = append(p.inputs, b.edge(in))
	}
	return p
}

func (p *plain) id() plainID { return plainID{vertexIDOf(p.v), p.index} }

func (p *plain) byContentOnly() bool { return p.forced || p.step.transient }

// lookup asks with what is known of the inputs now.
func (p *plain) lookup(all bool) Lookup {
	l := Lookup{Op: digest.Digest(p.step.ids[0]), Output: p.index}
	if len(p.inputs) == 0 {
		for _, id := range p.step.ids[:p.maps] {
			l.Roots = append(l.Roots, RootKey(digest.Digest(id), p.index))
		}
		return l
	}
	for i, in := range p.inputs {
		var keys []InputKey
		if all || !in.byContentOnly() {
			for _, k := range in.keys {
				keys = append(keys, InputKey{k, p.step.deps[i].selector})
			}
		}
		if k, ok := p.contents[i]; ok {
			keys = append(keys, InputKey{Key: k})
		}
		l.Inputs = append(l.Inputs, keys)
	}
	return l
}

// find looks up, and reports whether there is a record.
func (p *plain) find() bool {
	if p.v.IgnoreCache || p.step.transient {
		if len(p.inputs) == 0 {
			p.keys = p.lookup(false).Roots
		}
		return false
	}
	p.found, _ = p.o.keys.Lookup(p.lookup(false))
	p.keys = p.found.Keys
	p.final = len(p.found.Records) > 0
	return p.final
}

// know gets the keys of p: the first, or all by definition.
func (p *plain) know(all bool) bool {
	if p.result != "" || p.final {
		return p.final
	}
	for _, in := range p.inputs {
		in.know(all && !p.v.IgnoreCache)
	}
	for !p.find() && all && len(p.inputs) == 0 && p.maps < len(p.step.ids) && !p.v.IgnoreCache {
		p.maps++
	}
	return p.final
}

func (p *plain) solve() error {
	if p.result != "" || p.err != nil {
		return p.err
	}
	p.err = p.evaluate()
	return p.err
}

func (p *plain) evaluate() error {
	if id := p.b.spare[p.id()]; id != "" {
		p.keep(id)
		return nil
	}
	if p.know(false) || p.know(true) {
		return p.load()
	}
	for contents := p.mayMatch(); len(contents) > 0; contents = p.mayMatch() {
		if err := p.digest(contents); err != nil {
			return err
		}
		if p.find() {
			return p.load()
		}
	}
	for i := range p.inputs {
		if err := p.digest([]int{i}); err != nil {
			return err
		}
	}
	if p.find() {
		return p.load()
	}
	return p.execute()
}

func (p *plain) load() error {
	p.result = p.found.Records[0].Result
	return p.o.keys.Save(Save{Lookup: p.lookup(false), Keys: p.found.Keys})
}

// mayMatch are the inputs whose content may lead to a record.
func (p *plain) mayMatch() (out []int) {
	if p.v.IgnoreCache {
		return nil
	}
	var matched []int
	for i, d := range p.step.deps {
		_, known := p.contents[i]
		switch {
		case d.content && !known && p.found.Matched[i]:
			matched = append(matched, i)
		case d.content && !known:
			out = append(out, i)
		case !p.found.Matched[i]:
			return nil
		}
	}
	if len(out) > 0 {
		return out
	}
	return matched
}

// digest solves inputs and, if it matters, digests their content.
func (p *plain) digest(inputs []int) error {
	for _, i := range inputs {
		if err := p.inputs[i].solve(); err != nil {
			return err
		}
		if d := p.step.deps[i]; d.content {
			p.contents[i] = ContentKey(digest.Digest(p.o.values[p.inputs[i].result].view(d.selector)))
		}
	}
	return nil
}

func (p *plain) execute() error {
	if p.step.fails {
		return errStep
	}
	var views []string
	for i, in := range p.inputs {
		views = append(views, p.o.values[in.result].view(p.step.deps[i].selector))
	}
	p.o.executed[identity(p.step.name, views)]++
	for i, v := range p.step.results(views) {
		id := fmt.Sprintf("o%d", len(p.o.values))
		p.o.values[id] = v
		p.b.spare[plainID{p.id().vertex, i}] = id
		if i != p.index {
			beside := *p
			beside.index, beside.found = i, Found{}
			beside.keep(id)
		}
	}
	p.keep(p.b.spare[p.id()])
	return nil
}

// keep saves the result id.
func (p *plain) keep(id string) {
	p.result = id
	s := Save{Lookup: p.lookup(true), Keys: p.found.Keys, Result: plainResult(id)}
	if len(p.inputs) == 0 || len(s.Keys) == 0 {
		s.Keys = s.NewKeys()
	}
	p.keys = s.Keys
	p.forced = p.v.IgnoreCache && len(p.inputs) > 0
	for i, in := range p.inputs {
		_, byContent := p.contents[i]
		p.forced = p.forced || in.byContentOnly() && !byContent
	}
	if p.step.transient {
		return
	}
	if err := p.o.keys.Save(s); err != nil {
		panic(err) // memory doesn't fail
	}
}
