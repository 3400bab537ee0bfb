package progress

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// told collects what watchers see, in short.
type told struct{ lines []string }

func (w *told) Write(e Event) {
	v := e.Vertex
	line := v.Name
	for _, in := range v.Inputs {
		line += " <" + string(in)
	}
	switch {
	case v.Cached:
		line += " cached"
	case v.Completed != nil && v.Error != "":
		line += " failed " + v.Error
	case v.Completed != nil:
		line += " completed"
	case v.Started != nil:
		line += " started"
	}
	w.lines = append(w.lines, line)
}

func (w *told) expect(t *testing.T, want ...string) {
	t.Helper()
	if !slices.Equal(w.lines, want) {
		t.Errorf("told:\n%s\nwant:\n%s", strings.Join(w.lines, "\n"), strings.Join(want, "\n"))
	}
	w.lines = nil
}

// A vertex that runs or is found shows what it stands on, of which nothing else
// is known, as cached; what is left at the end is shown as cancelled.
func TestGraph(t *testing.T) {
	w := &told{}
	g := NewGraph[int](w)
	for i := range 5 {
		var inputs []int
		if i > 0 {
			inputs = []int{i - 1}
		}
		g.Add(i, digest.Digest(fmt.Sprint("d", i)), fmt.Sprint("v", i), nil, inputs)
	}
	w.expect(t, "v0", "v1 <d0", "v2 <d1", "v3 <d2", "v4 <d3")
	g.Start(0, time.Now())
	g.Complete(0, nil)
	g.Cached(2)
	w.expect(t, "v0 started", "v0 completed", "v1 <d0 cached", "v2 <d1 cached")
	g.Start(3, time.Now())
	g.Complete(3, errors.New("exit code 1"))
	g.Start(3, time.Now()) // once more
	g.Start(4, time.Now())
	w.expect(t, "v3 <d2 started", "v3 <d2 failed exit code 1", "v3 <d2 started", "v4 <d3 started")
	g.Complete(3, nil)
	g.Interrupt()
	w.expect(t, "v3 <d2 completed", "v4 <d3 failed "+context.Canceled.Error())
	if last := g.Shown(4); last.Name != "v4" || last.Error != context.Canceled.Error() || last.Completed == nil {
		t.Errorf("last told %+v", last)
	}
	g.Forget()
	if got, want := g.Counts(), (Counts{Total: 5, Completed: 4, Cached: 2}); got != want {
		t.Errorf("counts %+v, want %+v", got, want)
	}
}

// A vertex never has the digest of another.
func TestGraphTwins(t *testing.T) {
	w := &told{}
	g := NewGraph[string](w)
	g.Add("plain", "d", "plain", nil, nil)
	g.Add("twin", "d", "twin", nil, nil)
	if g.Digest("plain") != "d" || g.Digest("twin") == "d" {
		t.Errorf("digests %s and %s", g.Digest("plain"), g.Digest("twin"))
	}
	g.Complete("twin", errors.New("broken")) // before it started
	w.expect(t, "plain", "twin", "twin failed broken")
}
