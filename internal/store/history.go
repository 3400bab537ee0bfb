package store

import "bytes"

// told is what the journal says of a record at one moment. Its bytes are the
// journal's own.
type told struct {
	key, value []byte
	deleted    bool
}

// history is what the journal tells of one bucket, as runs: each is in the order
// of its keys, and of what is in several the last one holds. A commit is such a
// run, and so is all of a journal that was written anew. So most of the order is
// there already, and merging is all that is left of sorting.
type history struct{ runs [][]told }

// add takes a further run. Of two, the older one stays the longer one by far, so
// that a change is moved once for every doubling of what is told.
func (h *history) add(run []told) {
	last := len(h.runs) - 1
	if last >= 0 && bytes.Compare(h.runs[last][len(h.runs[last])-1].key, run[0].key) < 0 {
		h.runs[last] = append(h.runs[last], run...)
	} else {
		h.runs = append(h.runs, run)
		last++
	}
	for ; last > 0 && 2*len(h.runs[last]) > len(h.runs[last-1]); last-- {
		h.join(last)
	}
}

// join makes one of the run i, which is the last one, and the one before it.
func (h *history) join(i int) {
	h.runs[i-1] = mergeRuns(h.runs[i-1], h.runs[i])
	h.runs = h.runs[:i]
}

// records are what is there at last, in the order of the keys.
func (h *history) records() []told {
	for i := len(h.runs) - 1; i > 0; i-- {
		h.join(i)
	}
	there := h.runs[0][:0]
	for _, t := range h.runs[0] {
		if !t.deleted {
			there = append(there, t)
		}
	}
	return there
}

// mergeRuns makes one run of two; what newer says holds.
func mergeRuns(older, newer []told) []told {
	out := make([]told, 0, len(older)+len(newer))
	for len(older) > 0 && len(newer) > 0 {
		switch c := bytes.Compare(older[0].key, newer[0].key); {
		case c < 0:
			out, older = append(out, older[0]), older[1:]
		case c > 0:
			out, newer = append(out, newer[0]), newer[1:]
		default:
			older = older[1:]
		}
	}
	return append(append(out, older...), newer...)
}

// run is a run of the changes of one bucket.
type run struct {
	bucket string
	told   []told
}

// runsOf splits the payload of an entry into runs, in its order.
func runsOf(payload []byte) (runs []run, err error) {
	var at *run
	err = changes(payload, func(bucket, key, value []byte, deleted bool) {
		if at == nil || at.bucket != string(bucket) || bytes.Compare(at.told[len(at.told)-1].key, key) >= 0 {
			runs = append(runs, run{bucket: string(bucket)})
			at = &runs[len(runs)-1]
		}
		at.told = append(at.told, told{key, value, deleted})
	})
	return runs, err
}
