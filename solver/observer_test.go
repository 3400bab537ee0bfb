package solver_test

import (
	"context"
	"slices"
	"testing"

	. "github.com/kilnbuild/kiln/solver"
)

// looking is observed that is told of lookups too.
type looking struct{ observed }

func (o *looking) Queried(e *Query, found Found) {
	o.add("queried %s records=%d", e.Edge.Vertex.Name, len(found.Records))
}

func TestSeveralObservers(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		b := s.w.vertex("b", 1, in{v: a})
		run := func() (plain, looks []string) {
			t.Helper()
			p, l := &observed{}, &looking{}
			build := s.s.NewBuild(BuildOptions{Observers: []Observer{p, l}})
			r, err := build.Solve(context.Background(), Edge{Vertex: b})
			if err != nil {
				t.Fatal(err)
			}
			r.Release()
			build.Close()
			return p.lines, l.lines
		}
		for _, want := range [][]string{
			{"announced a", "announced b", "queried a records=0", "queried b records=0", "starts a",
				"ended a outputs=1 cached=false failed=false", "starts b", "ended b outputs=1 cached=false failed=false"},
			{"announced a", "announced b", "queried a records=1", "queried b records=1", "loading b inputs=1"},
		} {
			plain, looks := run()
			if !slices.Equal(looks, want) {
				t.Errorf("observed %q\nwant %q", looks, want)
			}
			want = slices.DeleteFunc(slices.Clone(want), func(s string) bool { return s[:2] == "qu" })
			if !slices.Equal(plain, want) {
				t.Errorf("without lookups observed %q\nwant %q", plain, want)
			}
		}
	})
}
