package store

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// What the journal tells is what a map would have, were its changes made one after
// the other, be the keys of its entries in order, as the store writes them, or not.
func TestHistory(t *testing.T) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		r, want := &replayed{histories: map[string]*history{}}, map[string]string{}
		for n := range 1 + rnd.IntN(40) {
			keys := make([]string, 1+rnd.IntN(1+rnd.IntN(200)))
			for i := range keys {
				keys[i] = fmt.Sprintf("%03d", rnd.IntN(300))
			}
			if seed%2 == 0 {
				slices.Sort(keys)
				keys = slices.Compact(keys)
			}
			var payload []byte
			for _, key := range keys {
				if rnd.IntN(3) == 0 {
					payload = appendChange(payload, "b", key, entry{deleted: true})
					delete(want, key)
					continue
				}
				want[key] = fmt.Sprint(n, key)
				payload = appendChange(payload, "b", key, entry{value: []byte(want[key])})
			}
			if err := r.apply(entryInfo{}, payload); err != nil {
				t.Fatal(err)
			}
		}
		got := map[string]string{}
		last := ""
		for _, told := range r.histories["b"].records() {
			if string(told.key) <= last {
				t.Fatalf("seed %d: key %s comes after %s", seed, told.key, last)
			}
			last = string(told.key)
			got[last] = string(told.value)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("seed %d: %v, want %v", seed, got, want)
		}
	}
}

// An entry of which a part makes no sense tells nothing.
func TestHistoryTakesWholeEntries(t *testing.T) {
	r := &replayed{histories: map[string]*history{}}
	payload := appendChange(nil, "b", "k", entry{value: []byte("v")})
	if err := r.apply(entryInfo{}, append(payload, 0, 200)); err == nil || r.entries != 0 || len(r.histories) != 0 {
		t.Errorf("%v; %+v", err, r)
	}
}
