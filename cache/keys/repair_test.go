package keys

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
)

// Whatever entries of the graph are lost, and whatever results, a repair leaves
// one that is whole, and takes nothing else.
func TestRepair(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 3))
			db := openDB(t, t.TempDir())
			m := &model{t: t, r: rnd, db: db, s: Open(db), m: keygraph.NewMemory()}
			for range 30 {
				m.save(rnd.IntN(4) > 0)
			}
			exists := func(string) bool { return true }
			if n := m.s.Repair(exists); n != 0 {
				t.Fatalf("a repair removes %d entries of a good graph", n)
			}
			lost := map[string]bool{}
			for _, id := range m.live {
				lost[id] = rnd.IntN(5) == 0
			}
			exists = func(id string) bool { return !lost[id] }
			b := &store.Batch{}
			for _, of := range []kind{links, backs, results, byID} {
				eachOf(db, of, "", func(k string, _ []byte) bool {
					if rnd.IntN(12) == 0 {
						drop(b, entry{of, k})
					}
					return true
				})
			}
			db.Write(b)
			before := entries(db)
			removed := m.s.Repair(exists)
			if after := entries(db); after != before-removed {
				t.Errorf("of %d entries %d are left, and %d were removed", before, after, removed)
			}
			if _, problems := m.s.Check(exists); len(problems) > 0 {
				t.Errorf("after a repair: %q", problems)
			}
			if n := m.s.Repair(exists); n != 0 {
				t.Errorf("another repair removes %d entries", n)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A rebuilt database may know results whose records are gone.
func TestRepairDropsResultsThatAreGone(t *testing.T) {
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	l := solver.Lookup{Op: "op", Roots: []solver.Key{key(1)}}
	for _, id := range []string{"gone", "here"} {
		if err := s.Save(solver.Save{Lookup: l, Keys: l.Roots, Result: result(id)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.Repair(func(id string) bool { return id == "here" }); n != 2 {
		t.Errorf("removed %d entries", n)
	}
	found, err := s.Lookup(l)
	if err != nil {
		t.Fatal(err)
	}
	if ids := slices.Collect(func(yield func(string) bool) {
		for _, r := range found.Records {
			if !yield(r.Result) {
				return
			}
		}
	}); !slices.Equal(ids, []string{"here"}) {
		t.Errorf("found %q", ids)
	}
}

// What is in the buckets and no entry is found, removed, and in nobody's way.
func TestStrays(t *testing.T) {
	db := openDB(t, t.TempDir())
	s := Open(db)
	chain(t, s, "base", "one")
	key, stamp := strings.Repeat("k", keyLen), make([]byte, stampLen)
	b := &store.Batch{}
	for _, k := range []string{"short", key, key + "x", key + "l", key + "lshort", key + "b" + key, key + "l" + key + key} {
		b.Put(bucketKeys, k, nil)
	}
	b.Put(bucketKeys, key+"rbad stamp", []byte("x"))
	b.Put(bucketByID, "bad stamp\x00"+key, nil)
	for _, k := range []string{"short", "no end" + key} {
		b.Put(bucketByID, k, nil)
	}
	b.Put(bucketKeys, key+"rgood", stamp)
	b.Put(bucketByID, "good\x00"+key, nil)
	db.Write(b)
	if _, err := s.Lookup(solver.Lookup{Op: "op", Inputs: [][]solver.InputKey{{{Key: solver.Key([]byte(key))}}}}); err != nil {
		t.Error(err)
	}
	all := func(string) bool { return true }
	if _, problems := s.Check(all); len(problems) != 10 {
		t.Errorf("%d problems: %q", len(problems), problems)
	}
	if n := s.Repair(all); n != 11 { // the end of one of them, too
		t.Errorf("%d entries are removed", n)
	}
	if _, problems := s.Check(all); len(problems) > 0 {
		t.Errorf("after the repair: %q", problems)
	}
	if _, ok := s.get(entry{results, key + "good"}); !ok {
		t.Error("a good entry is removed")
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}
