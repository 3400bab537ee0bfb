package contenthash

import (
	"context"
	"fmt"
	"slices"
	"testing"
)

func walked(t testing.TB, rec record, p string, opts Options) map[string][32]byte {
	t.Helper()
	out := map[string][32]byte{}
	err := walk(context.Background(), rec, p, opts, func(path string, sum [32]byte) { out[path] = sum })
	if err != nil {
		t.Fatalf("walk %s: %v", p, err)
	}
	return out
}

// What Walk tells differs exactly where files do, and only if the checksum
// does.
func TestWalkTellsWhatDiffers(t *testing.T) {
	before := []specEntry{
		{Path: "d", Mode: modeDir}, {Path: "d/a.go", Mode: modeFile, Data: "a"}, {Path: "d/b.txt", Mode: modeFile, Data: "b"},
		{Path: "d/e", Mode: modeDir}, {Path: "d/e/c.go", Mode: modeFile, Data: "c"}, {Path: "link", Mode: modeLink, Link: "d"},
	}
	after := slices.Clone(before)
	after[1].Data, after[2].Data = "A", "B"
	old, now := newRecord(t, ""), newRecord(t, "")
	recordAll(t, old, before)
	recordAll(t, now, after)
	for _, c := range []struct {
		path string
		opts Options
		want []string // that differ
		all  int
	}{
		{"/", Options{}, []string{"/d/a.go", "/d/b.txt"}, 7},
		{"/d", Options{}, []string{"/d/a.go", "/d/b.txt"}, 5},
		{"/link", Options{FollowLinks: true}, []string{"/link/a.go", "/link/b.txt"}, 5},
		{"/d/e", Options{}, nil, 2},
		{"/d/b.txt", Options{}, []string{"/d/b.txt"}, 1},
		{"/d/*.go", Options{Wildcard: true}, []string{"/d/a.go"}, 1},
		{"/", Options{IncludePatterns: []string{"**/*.go"}}, []string{"/d/a.go"}, 4},
		{"/d", Options{ExcludePatterns: []string{"*.go"}}, []string{"/d/b.txt"}, 4},
	} {
		a, b := walked(t, old, c.path, c.opts), walked(t, now, c.path, c.opts)
		var differ []string
		for p, sum := range b {
			if a[p] != sum {
				differ = append(differ, p)
			}
		}
		slices.Sort(differ)
		if !slices.Equal(differ, c.want) || len(a) != c.all || len(b) != c.all {
			t.Errorf("%s %+v: of %d and %d, %q differ; want %d, %q", c.path, c.opts, len(a), len(b), differ, c.all, c.want)
		}
		x, _ := checksum(context.Background(), old, c.path, c.opts)
		y, _ := checksum(context.Background(), now, c.path, c.opts)
		if (x == y) != (len(c.want) == 0) {
			t.Errorf("%s %+v: checksums %s and %s", c.path, c.opts, x, y)
		}
	}
	err := walk(context.Background(), old, "/nope", Options{}, func(string, [32]byte) { t.Error("something is there") })
	if err == nil {
		t.Error("a path that isn't there was walked")
	}
}

func TestRemovedNamesAreKept(t *testing.T) {
	rec := newRecord(t, "")
	transfer := func(change func(*Recorder)) {
		r, err := newRecorder(rec)
		if err != nil {
			t.Fatal(err)
		}
		change(r)
		if err := r.save(rec); err != nil {
			t.Fatal(err)
		}
	}
	transfer(func(r *Recorder) {
		for i := range 200 {
			r.Set(Entry{Path: fmt.Sprint("f", i), Mode: 0o644})
		}
	})
	if got := removed(rec); got != nil {
		t.Errorf("removed %q", got)
	}
	transfer(func(r *Recorder) { r.Remove("f1"); r.Remove("f2"); r.Remove("never was") })
	transfer(func(r *Recorder) { r.Remove("f3") })
	if got := removed(rec); !slices.Equal(got, []string{"/f3", "/f2", "/f1"}) {
		t.Errorf("removed %q", got)
	}
	transfer(func(r *Recorder) {
		for i := range 100 {
			r.Remove(fmt.Sprint("f", 10+i))
		}
	})
	if got := removed(rec); len(got) != maxRemoved || got[0] != "/f109" {
		t.Errorf("%d names are kept, the first is %q", len(got), got[0])
	}
}
