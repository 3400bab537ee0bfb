package cache

import "slices"

// order is all records, in the order in which they became known: about that in
// which they were made, and in which they lie in memory. Whoever goes through all
// of them goes through memory from one end to the other; in the order of a map, of
// 100,000 records each is waited for.
//
// Manager.mu guards it, but for the records of a shelf that is listed no more.
type order struct {
	shelves []*shelf // none is empty
}

// shelf is a stretch of the order: so many records that builds can wait for as long
// as they are gone through.
type shelf struct {
	records []*record // nil for one that went
	there   int
}

// atOnce is how many records are gone through while mu is held: builds wait for
// no more than that, however many there are.
const atOnce = 256

// sparse is with how few records a shelf is joined with one beside it that is
// sparse, too.
const sparse = atOnce / 4

func (o *order) add(r *record) {
	last := len(o.shelves) - 1
	if last < 0 || len(o.shelves[last].records) == atOnce {
		o.shelves = append(o.shelves, &shelf{records: make([]*record, 0, atOnce)})
		last++
	}
	o.shelves[last].put(r)
}

func (s *shelf) put(r *record) {
	r.shelf, r.slot = s, len(s.records)
	s.records = append(s.records, r)
	s.there++
}

func (o *order) remove(r *record) {
	s := r.shelf
	s.records[r.slot] = nil
	if s.there--; s.there > sparse {
		return
	}
	at := slices.Index(o.shelves, s)
	switch {
	case s.there == 0:
		o.shelves = slices.Delete(o.shelves, at, at+1)
	case at > 0 && o.shelves[at-1].there <= sparse:
		o.join(at - 1)
	case at+1 < len(o.shelves) && o.shelves[at+1].there <= sparse:
		o.join(at)
	}
}

// join makes a new shelf of the one at i and the next. The old ones stay as they
// are, for who is going through them.
func (o *order) join(i int) {
	joined := &shelf{records: make([]*record, 0, atOnce)}
	for _, s := range o.shelves[i : i+2] {
		for _, r := range s.records {
			if r != nil {
				joined.put(r)
			}
		}
	}
	o.shelves = slices.Replace(o.shelves, i, i+2, joined)
}

// eachRecord calls fn, with mu held, for every record, about in the order in which
// they were made. It lets go of mu between some and the next, so that it doesn't
// show all records as of one moment: those that come or go meanwhile may be among
// them or not.
func (m *Manager) eachRecord(fn func(r *record)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, s := range slices.Clone(m.order.shelves) {
		if i > 0 {
			m.breathe()
		}
		for _, r := range s.records {
			if r != nil && r.state != gone { // of a shelf that is listed no more they may be
				fn(r)
			}
		}
	}
}
