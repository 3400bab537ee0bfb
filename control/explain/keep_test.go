package explain

import (
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"weak"

	"github.com/kilnbuild/kiln/solver"
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

// A journal that rests holds nothing of the steps and knows them all when it is
// asked; what it is given meanwhile is known then, too.
func TestRest(t *testing.T) {
	j := newJournal(t)
	run := func(ref string, names ...string) (why string) {
		s := j.script(t, ref, names...)
		for i, name := range names {
			why = s.run(i, ref, "in", name, nil)
		}
		s.r.Close(false)
		return why
	}
	run("one", "[1/2] RUN a", "[2/2] RUN b")
	j.Rest()
	if len(j.records)+len(j.index[0])+len(j.keys) > 0 {
		t.Errorf("%d records, %d names and %d keys are held", len(j.records), len(j.index[0]), len(j.keys))
	}
	s := j.script(t, "cached", "[1/2] RUN a", "[2/2] RUN b")
	s.r.Close(false)
	j.settle()
	if len(j.records) > 0 {
		t.Error("a build of which no step runs has records read")
	}
	if b, ok := j.Get(""); !ok || b.Ref != "cached" {
		t.Errorf("the last build is %q, %v", b.Ref, ok)
	}
	late := j.script(t, "late", "[1/1] RUN c")
	late.run(0, "late", "in", "RUN c", nil)
	j.Rest()
	late.r.Close(false)
	j.Rest()
	if why := run("two", "[1/2] RUN a", "[2/2] RUN b"); strings.Contains(why, "new") {
		t.Errorf("after a rest: %s", why)
	}
	j.settle()
	if known, want := j.known(), []string{"RUN a", "RUN b", "RUN c", "RUN a", "RUN b"}; !slices.Equal(known, want) {
		t.Errorf("known are %q, want %q", known, want)
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
	if len(j.records) != 3 {
		t.Errorf("%d records are known, want those of before", len(j.records))
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
		j.byKey(nil) // reads all records
		if known := j.known(); !slices.Equal(known, want) {
			t.Errorf("known are %q, want %q", known, want)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// A recorder whose build was kept holds none of its vertices.
func TestKeptBuildIsLetGo(t *testing.T) {
	j := newJournal(t)
	build := func() (*Recorder, weak.Pointer[solver.Vertex]) {
		s := j.script(t, "one", "[1/2] RUN a", "[2/2] RUN b")
		s.run(1, "one", "in", "RUN b", nil)
		s.r.Close(false)
		return s.r, weak.Make(s.steps[1])
	}
	r, v := build()
	j.settle()
	runtime.GC()
	if v.Value() != nil {
		t.Error("a vertex is held")
	}
	runtime.KeepAlive(r)
	if b, ok := j.Get("one"); !ok || len(b.Steps) != 1 {
		t.Errorf("of the build %d steps are kept, %v", len(b.Steps), ok)
	}
}
