package solver

// What the tests see that nobody else does.

var ErrClosed = errClosed

const CrewSize = crewSize

func (l Lookup) NewKeys() []Key { return l.newKeys() }

func (f *Found) Add(other Found, importNumber int) { f.add(other, importNumber) }

func (b *Build) Take(c *Core, ev Event) { b.step(c, ev) }

func (c *Core) Vertices() (out []*Vertex) {
	for _, n := range c.order {
		out = append(out, n.vertex)
	}
	return out
}
