package cache

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// Records that come and go at random are all gone through, each once and in the
// order in which they came, with few gaps; who has begun before some went, or
// before shelves were joined, still finds all that stayed.
func TestOrder(t *testing.T) {
	for seed := range uint64(8) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		m := newManager(Config{})
		var want []*record // in their order
		grow := 20 * atOnce
		for range 6 {
			for len(want) < grow {
				r := &record{id: fmt.Sprint(rnd.Uint64())}
				m.order.add(r)
				want = append(want, r)
			}
			before := slices.Clone(want)
			var seen []*record
			shrunk := false
			letGo := m.breathe
			m.breathe = func() {
				if !shrunk {
					shrunk = true
					want = shrink(m, want, rnd.IntN(len(want)), rnd)
				}
			}
			m.eachRecord(func(r *record) { seen = append(seen, r) })
			m.breathe = letGo
			stayed := slices.DeleteFunc(slices.Clone(before), func(r *record) bool { return r.state == gone })
			seenStayed := slices.DeleteFunc(slices.Clone(seen), func(r *record) bool { return r.state == gone })
			if !slices.Equal(seenStayed, stayed) {
				t.Fatalf("seed %d: a walk that began before some went saw %d of %d", seed, len(seenStayed), len(stayed))
			}
			seen = nil
			m.eachRecord(func(r *record) { seen = append(seen, r) })
			if !slices.Equal(seen, want) {
				t.Fatalf("seed %d: saw %d of %d", seed, len(seen), len(want))
			}
			if room := len(m.order.shelves) * atOnce; room > 8*len(want)+2*atOnce {
				t.Errorf("seed %d: there is room for %d records, and there are %d", seed, room, len(want))
			}
		}
	}
}

// shrink removes records at random until n are left, and returns those.
func shrink(m *Manager, all []*record, n int, rnd *rand.Rand) []*record {
	for _, i := range rnd.Perm(len(all))[n:] {
		m.order.remove(all[i])
		all[i].state = gone
	}
	return slices.DeleteFunc(all, func(r *record) bool { return r.state == gone })
}
