package keys

import (
	"slices"
	"testing"

	"github.com/kilnbuild/kiln/solver"
)

// Of what leads to a key, the contents of its inputs are told by their place, and
// those that are found by definition aren't among them.
func TestContents(t *testing.T) {
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	chain(t, s, "base", "one") // key(0) leads to key(1)
	l := solver.Lookup{Op: "op", Output: 1, Inputs: [][]solver.InputKey{
		{{Key: key(1), Selector: "sel"}, {Key: key(30)}},
		{{Key: key(1)}, {Key: key(31)}, {Key: key(32)}},
	}}
	if err := s.Save(solver.Save{Lookup: l, Keys: []solver.Key{key(40)}, Result: result("r")}); err != nil {
		t.Fatal(err)
	}
	got := s.Contents(key(40), solver.Lookup{Op: "op", Output: 1, Inputs: make([][]solver.InputKey, 2)})
	for _, keys := range got {
		slices.SortFunc(keys, func(a, b solver.Key) int { return slices.Compare(a[:], b[:]) })
	}
	second := []solver.Key{key(31), key(32)}
	slices.SortFunc(second, func(a, b solver.Key) int { return slices.Compare(a[:], b[:]) })
	if len(got) != 2 || !slices.Equal(got[0], []solver.Key{key(30)}) || !slices.Equal(got[1], second) {
		t.Errorf("contents %v, want %v and %v", got, key(30), second)
	}
	for name, other := range map[string]solver.Lookup{"op": {Op: "no", Output: 1}, "output": {Op: "op"}} {
		other.Inputs = make([][]solver.InputKey, 2)
		if got := s.Contents(key(40), other); got[0] != nil || got[1] != nil {
			t.Errorf("another %s has %v", name, got)
		}
	}
}
