package cache

import "github.com/opencontainers/go-digest"

// contents is all that liveness depends on, from the store or from memory.
type contents struct {
	records []fact // oldest first
	images  map[string]Image
	holds   map[digest.Digest]int
}

// fact is what liveness has to know of a record.
type fact struct {
	id     string
	needs  []string // records that it builds on
	blobs  []digest.Digest
	held   bool // by a handle
	kept   bool // a key's result points at it, or it is retained
	broken bool // its files are missing
}

// verdict says what lives, by record id, and why.
type verdict struct {
	alive  map[string]bool
	inUse  map[string]bool // held, or below what is held (CTL-104)
	shared map[string]bool // named by an image, or below what is (CTL-105)
	// owner is the record that accounts for a blob: the oldest living one that
	// points at it, "" if only an image or a hold does. A blob that isn't in
	// here is dead.
	owner map[digest.Digest]string
	// broken is what can't live, because it or something it needs is missing.
	broken map[string]bool
}

// liveness is the rule: a record lives while a handle, a child record, a key's
// result or a user's mark points at it, unless it is broken; a blob lives
// while a living record, an image or a hold points at it. Collecting garbage,
// du, prune and fsck all ask it.
func liveness(c contents) verdict {
	v := verdict{
		alive: map[string]bool{}, inUse: map[string]bool{}, shared: map[string]bool{},
		owner: map[digest.Digest]string{}, broken: map[string]bool{},
	}
	facts := make(map[string]*fact, len(c.records))
	above := make(map[string][]string, len(c.records)) // who needs a record
	for i := range c.records {
		f := &c.records[i]
		facts[f.id] = f
		for _, n := range f.needs {
			above[n] = append(above[n], f.id)
		}
	}
	for _, f := range c.records {
		if f.broken {
			spread(v.broken, f.id, func(id string) []string { return above[id] })
		}
		for _, n := range f.needs {
			if facts[n] == nil {
				spread(v.broken, f.id, func(id string) []string { return above[id] })
			}
		}
	}
	below := func(id string) []string { return facts[id].needs }
	for _, f := range c.records {
		if f.held {
			spread(v.inUse, f.id, below)
		}
		if (f.held || f.kept) && !v.broken[f.id] {
			spread(v.alive, f.id, below)
		}
	}
	for _, img := range c.images {
		for _, id := range img.Refs {
			if facts[id] != nil && !v.broken[id] {
				spread(v.shared, id, below)
				spread(v.alive, id, below)
			}
		}
		for _, d := range img.Blobs {
			v.owner[d] = ""
		}
	}
	for d := range c.holds {
		v.owner[d] = ""
	}
	for _, f := range c.records {
		if !v.alive[f.id] {
			continue
		}
		for _, d := range f.blobs {
			if v.owner[d] == "" {
				v.owner[d] = f.id
			}
		}
	}
	return v
}

// spread marks id and all that next leads to.
func spread(marked map[string]bool, id string, next func(string) []string) {
	for todo := []string{id}; len(todo) > 0; {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if !marked[id] {
			marked[id] = true
			todo = append(todo, next(id)...)
		}
	}
}
