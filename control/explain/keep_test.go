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

// A journal that is being closed stores what it is given and learns nothing of it:
// the next one does, and is bounded then.
func TestClosingJournalOnlyStores(t *testing.T) {
	dir := t.TempDir()
	db := openStore(t, dir)
	j := Open(Config{Store: db, Evictions: evictions{}})
	build := func(ref string, names ...string) {
		s := j.script(t, ref, names...)
		for i, name := range names {
			s.run(i, name, "in", name, nil)
		}
		s.r.Close(false)
	}
	build("before", "RUN a", "RUN b", "RUN c")
	j.settle()
	j.Close()
	build("closing", "RUN d", "RUN b", "RUN e", "RUN f")
	j.settle()
	if len(j.used) != 3 {
		t.Errorf("%d records are known, want those of before", len(j.used))
	}
	for _, want := range [][]string{{"RUN a", "RUN c", "RUN d", "RUN b", "RUN e", "RUN f"}, {"RUN d", "RUN b", "RUN e", "RUN f"}} {
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		db = openStore(t, dir)
		j = Open(Config{Store: db, Evictions: evictions{}})
		j.bounds.records = len(want)
		if b, ok := j.Get("closing"); !ok || len(b.Steps) != 4 {
			t.Errorf("the build is explained by %+v, %v", b, ok)
		}
		var known []string
		for _, rec := range j.used {
			known = append(known, rec.Step.Text)
		}
		if !slices.Equal(known, want) {
			t.Errorf("known are %q, want %q", known, want)
		}
		stored := 0
		db.Scan(stepsBucket, "", func(string, []byte) bool { stored++; return true })
		if stored != len(known) {
			t.Errorf("%d records are stored, want %d", stored, len(known))
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}
