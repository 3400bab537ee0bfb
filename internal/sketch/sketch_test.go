package sketch

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// differ makes two sets with a common part, of which n items differ.
func differ(r *rand.Rand, common, n int) (a, b Sketch, want []uint64) {
	for range common {
		item := r.Uint64()
		a.Toggle(item)
		b.Toggle(item)
	}
	for i := range n {
		item := r.Uint64()
		if i%2 == 0 {
			a.Toggle(item)
		} else {
			b.Toggle(item)
		}
		want = append(want, item)
	}
	slices.Sort(want)
	return a, b, want
}

func TestFewDifferencesAreRead(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const rounds = 2000
	for n := range 13 {
		incomplete := 0
		for range rounds {
			a, b, want := differ(r, 20, n)
			got, complete := Diff(&a, &b)
			slices.Sort(got)
			if !complete {
				incomplete++
			} else if !slices.Equal(got, want) {
				t.Fatalf("%d items differ, read %x, want %x", n, got, want)
			}
			for _, item := range got {
				if !slices.Contains(want, item) {
					t.Errorf("%x is in both sets or in none", item)
				}
			}
		}
		if share := float64(incomplete) / rounds; share > 0.02 {
			t.Errorf("of %d differing items, %.1f%% of the differences could not be read", n, 100*share)
		}
	}
}

func TestALargeSetWithOneChange(t *testing.T) {
	a, b, want := differ(rand.New(rand.NewPCG(3, 4)), 200_000, 2)
	got, complete := Diff(&a, &b)
	slices.Sort(got)
	if !complete || !slices.Equal(got, want) {
		t.Errorf("read %x (complete %v), want %x", got, complete, want)
	}
}

// Too many differences are said to be too many, and the reading ends.
func TestManyDifferences(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, n := range []int{40, 100, 1000, 100_000} {
		a, b, _ := differ(r, 10, n)
		if got, complete := Diff(&a, &b); complete {
			t.Errorf("%d items differ, and %d are said to be all", n, len(got))
		}
	}
}

func TestStoredForm(t *testing.T) {
	a, b, _ := differ(rand.New(rand.NewPCG(7, 8)), 10, 5)
	for _, s := range []Sketch{a, b, {}} {
		got, ok := Parse(s.Bytes())
		if !ok || got != s {
			t.Errorf("%v became %v, %v", s, got, ok)
		}
	}
	for _, bad := range [][]byte{nil, make([]byte, Size-1), make([]byte, Size+1)} {
		if _, ok := Parse(bad); ok {
			t.Errorf("%d bytes are a sketch", len(bad))
		}
	}
}

// Whatever is stored, reading a difference ends.
func FuzzDiff(f *testing.F) {
	a, b, _ := differ(rand.New(rand.NewPCG(9, 10)), 10, 5)
	f.Add(a.Bytes(), b.Bytes())
	f.Fuzz(func(t *testing.T, x, y []byte) {
		a, ok := Parse(x)
		b, ok2 := Parse(y)
		if ok && ok2 {
			if items, _ := Diff(&a, &b); len(items) > cells {
				t.Errorf("%d items from %d cells", len(items), cells)
			}
		}
	})
}

func BenchmarkToggle(b *testing.B) {
	var s Sketch
	for i := range uint64(b.N) {
		s.Toggle(i)
	}
}
