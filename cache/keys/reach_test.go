package keys

import (
	"slices"
	"testing"

	"github.com/kilnbuild/kiln/solver"
)

func TestMadeOf(t *testing.T) {
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	chain(t, s, "base", "one", "two")
	save := func(id string, output int, from ...solver.Key) {
		t.Helper()
		v := solver.Save{Lookup: solver.Lookup{Op: "other", Output: output}, Keys: []solver.Key{key(10 + output)}, Result: result(id)}
		for _, k := range from {
			v.Inputs = append(v.Inputs, []solver.InputKey{{Key: k}})
		}
		if err := s.Save(v); err != nil {
			t.Fatal(err)
		}
	}
	save("both", 0, key(1), key(20)) // of one and of something else
	save("apart", 1, key(20))        // of something else
	save("on", 2, key(10), key(12))  // of both and of itself
	save("ontop", 3, key(12))        // its id starts with another's
	for id, want := range map[string][]string{
		"base":    {"base", "both", "on", "one", "ontop", "two"},
		"one":     {"both", "on", "one", "ontop", "two"},
		"two":     {"two"},
		"apart":   {"apart"},
		"on":      {"on", "ontop"},
		"unknown": {"unknown"},
	} {
		got := s.MadeOf(id)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("made of %s: %v, want %v", id, got, want)
		}
	}
	if err := s.Drop([]string{"one"}); err != nil {
		t.Fatal(err)
	}
	if got := s.MadeOf("one"); !slices.Equal(got, []string{"one"}) {
		t.Errorf("made of what was dropped: %v", got)
	}
}
