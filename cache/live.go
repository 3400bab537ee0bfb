package cache

import "github.com/opencontainers/go-digest"

// contents is all that liveness depends on, from the store or from memory.
// Records go by their place in it.
type contents struct {
	records []fact // oldest first
}

// nobody is the place of a record that doesn't exist.
const nobody = -1

// fact is what liveness has to know of a record.
type fact struct {
	needs  []int // records that it builds on; nobody for a missing one
	blobs  []digest.Digest
	held   bool // by a handle
	kept   bool // a key's result points at it, or it is retained
	broken bool // its files are missing
}

// verdict says what lives, by the place of a record, and why.
type verdict struct {
	alive []bool
	inUse []bool // held, or below what is held (CTL-104)
	// broken is what can't live, because it or something it needs is missing.
	broken []bool
	// owner is the record that accounts for a blob: the oldest living one that
	// points at it. A blob that isn't in here is dead.
	owner map[digest.Digest]int
}

// liveness is the rule: a record lives while a handle, a child record or a key's
// result points at it, or it is retained, unless it is broken; a blob lives while
// a living record points at it. Collecting garbage, du, prune and fsck all ask it.
// It takes time in proportion to contents.
func liveness(c contents) verdict {
	n := len(c.records)
	v := verdict{
		alive: make([]bool, n), inUse: make([]bool, n), broken: make([]bool, n),
		owner: map[digest.Digest]int{},
	}
	v.spreadBroken(c)
	below := func(i int) []int { return c.records[i].needs }
	for i := range c.records {
		f := &c.records[i]
		if f.held {
			spread(v.inUse, i, below)
		}
		if (f.held || f.kept) && !v.broken[i] {
			spread(v.alive, i, below)
		}
	}
	for i := range c.records {
		if !v.alive[i] {
			continue
		}
		for _, d := range c.records[i].blobs {
			if _, ok := v.owner[d]; !ok {
				v.owner[d] = i
			}
		}
	}
	return v
}

// spreadBroken marks what is broken and all that builds on it.
func (v *verdict) spreadBroken(c contents) {
	var roots []int
	for i := range c.records {
		f := &c.records[i]
		broken := f.broken
		for _, n := range f.needs {
			broken = broken || n == nobody
		}
		if broken {
			roots = append(roots, i)
		}
	}
	if roots == nil {
		return
	}
	above := make([][]int, len(c.records)) // who needs a record
	for i := range c.records {
		for _, n := range c.records[i].needs {
			if n != nobody {
				above[n] = append(above[n], i)
			}
		}
	}
	for _, i := range roots {
		spread(v.broken, i, func(i int) []int { return above[i] })
	}
}

// spread marks i and all that next leads to.
func spread(marked []bool, i int, next func(int) []int) {
	for todo := []int{i}; len(todo) > 0; {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if i != nobody && !marked[i] {
			marked[i] = true
			todo = append(todo, next(i)...)
		}
	}
}
