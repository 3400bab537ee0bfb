package explain

import (
	"slices"
	"sync"
	"testing"
)

// Builds are kept in the order in which they ended, by one goroutine, which Close
// waits for; a defect costs one of them.
func TestBuildsAreKeptInOrder(t *testing.T) {
	j := newJournal(t)
	const builds = 100
	var kept []int // unguarded: the race detector sees to it that it is one goroutine at a time
	var settled sync.WaitGroup
	for n := range builds {
		j.later(func() {
			if n == 50 {
				panic("broken")
			}
			kept = append(kept, n)
		})
		if n%10 == 0 {
			settled.Go(j.settle)
		}
	}
	settled.Wait()
	j.Close()
	want := make([]int, 0, builds)
	for n := range builds {
		if n != 50 {
			want = append(want, n)
		}
	}
	if !slices.Equal(kept, want) {
		t.Errorf("kept %v", kept)
	}
	if len(j.waiting) > 0 || j.kept != builds {
		t.Errorf("%d wait, %d are kept", len(j.waiting), j.kept)
	}
}
