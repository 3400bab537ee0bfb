package keygraph

import (
	"fmt"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// A chain that dies from its end is gone through once, not once for each key.
func TestDeadEndsOfAChain(t *testing.T) {
	const n = 1000
	key := func(i int) solver.Key { return solver.RootKey(digest.FromString(fmt.Sprint(i)), 0) }
	place := map[solver.Key]int{}
	for i := range n {
		place[key(i)] = i
	}
	calls := 0
	around := func(step int) func(solver.Key) []solver.Key {
		return func(k solver.Key) []solver.Key {
			calls++
			if i := place[k] + step; i >= 0 && i < n {
				return []solver.Key{key(i)}
			}
			return nil
		}
	}
	dead := DeadEnds([]solver.Key{key(n - 1)}, func(k solver.Key) bool { return place[k] == 10 }, around(+1), around(-1))
	if len(dead) != n-11 {
		t.Errorf("%d keys are dead, want %d", len(dead), n-11)
	}
	if calls > 3*n {
		t.Errorf("%d calls for %d keys", calls, n)
	}
}
