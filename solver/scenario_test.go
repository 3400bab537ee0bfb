package solver_test

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/kilnbuild/kiln/solver/trace"
)

var update = flag.Bool("update", false, "rewrite the effects in testdata")

var hexKey = regexp.MustCompile(`[0-9a-f]{64}`)

// Every scenario gives the effects that its file says, and no status and no rule
// is left out. compat: LLB-007, LLB-C73, LLB-170, LLB-171, LLB-172, LLB-173
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d scenarios: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { playFile(t, file) })
	}
}

func playFile(t *testing.T, file string) {
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got, err := trace.Play(string(old))
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != string(old) {
		t.Errorf("%s has\n%s\ngot\n%s", file, old, got)
	}
}

// What Trace records of a build can be replayed.
func TestTraceReplays(t *testing.T) {
	w := newWorld()
	s := New(Options{Keys: keygraph.NewMemory(), Results: w})
	base, other := w.vertex("base", 2), w.vertex("other", 1)
	mid := w.vertex("mid", 1, in{v: base, content: true, selector: "b"}, in{v: other, index: 0})
	top := w.vertex("top", 2, in{v: mid}, in{v: base, index: 1, content: true})
	again := w.vertex("again", 1, in{v: top, index: 1})
	again.IgnoreCache = true
	broken := w.vertex("fail", 1, in{v: again})
	broken.Name = "a \"name\"\nthat error=\"may\" confuse"
	for _, root := range []*Vertex{top, again, broken} {
		rec := &recorded{}
		b := s.NewBuild(BuildOptions{Trace: rec.trace})
		if r, err := b.Solve(context.Background(), Edge{Vertex: root}); err == nil {
			r.Release()
		}
		b.Close()
		rec.replay(t)
	}
	s.Close()
	w.check(t)
}

// recorded is what a build did.
type recorded struct {
	text strings.Builder
	also func(Event, []Effect) // may be nil
}

func (r *recorded) trace(ev Event, effects []Effect) {
	for _, line := range trace.Lines(ev, effects) {
		r.text.WriteString(line + "\n")
	}
	if r.also != nil {
		r.also(ev, effects)
	}
}

// replay plays what was recorded, once the build is closed: the effects must be
// the same.
func (r *recorded) replay(t *testing.T) {
	t.Helper()
	played, err := trace.Play(r.text.String())
	if err != nil {
		t.Errorf("replay: %v\n%s", err, r.text.String())
	} else if played != r.text.String() {
		t.Errorf("recorded:\n%s\nreplayed:\n%s", r.text.String(), played)
	}
}
