package control

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/internal/explanation"
	control "github.com/moby/buildkit/api/services/control"
)

// ran lists the steps that ran, except those that bring the client's files.
func ran(b *explanation.Build) (out []explanation.Step) {
	for _, s := range b.Steps {
		if s.Ran && s.Causes[0].Kind != explanation.Always {
			out = append(out, s)
		}
	}
	return out
}

// What changes no result makes nothing run, and the rest is counted.
func TestNothingToExplain(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "same")
	first := p.build()
	if n := len(ran(first)); n < 7 {
		t.Errorf("%d steps ran:\n%s", n, asText(t, first))
	}
	for name, change := range map[string]func(){
		"nothing":            func() {},
		"a file nobody uses": func() { p.write("unused.txt", "x") },
		"times of files": func() {
			must(t, os.Chtimes(p.path("src/main.go"), time.Unix(1, 0), time.Unix(1, 0)))
		},
		"a label":         func() { p.edit("USER daemon", "LABEL a=b\nUSER daemon") },
		"a comment":       func() { p.edit("USER daemon", "# hello\nUSER daemon") },
		"a stage's name":  func() { p.edit("AS build", "AS maker"); p.edit("--from=build", "--from=maker") },
		"the explanation": func() { p.opts["kiln.explain"] = "1" },
	} {
		change()
		b := p.build()
		if steps := ran(b); len(steps) > 0 {
			t.Errorf("%s changed, and steps ran:\n%s", name, asText(t, b))
		}
		if len(b.Steps) != len(first.Steps) && name != "a label" {
			t.Errorf("%s changed: %d steps instead of %d:\n%s", name, len(b.Steps), len(first.Steps), asText(t, b))
		}
	}
}

// A cache that the build was to import, and that isn't used, is named where
// something runs that it may have had.
func TestImportsThatAreNotUsed(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "imports")
	ref := reg.host + "/no/such:cache"
	p.opts["cache-imports"] = `[{"Type":"registry","Attrs":{"ref":"` + ref + `"}}]`
	cause := "the imported cache registry " + ref + " could not be used: resolve " + ref + ": not found"
	for _, s := range ran(p.build()) {
		if got := s.Sentence(); got != "ran because no earlier run of it is known and "+cause {
			t.Errorf("%s %s", s.Name, got)
		}
	}
	delete(p.opts, "cache-imports")
	p.write("src/main.go", "changed")
	for _, s := range ran(p.build()) {
		if got := s.Sentence(); strings.Contains(got, "imported") {
			t.Errorf("%s %s", s.Name, got)
		}
	}
}

// With the option each step's log begins with the reason, whoever the client is.
func TestReasonsInTheLog(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "shown")
	p.build()
	for name, value := range map[string]string{"kiln.explain": "0", "build-arg:KILN_EXPLAIN": "maybe"} {
		p.opts[name] = value
	}
	p.write("src/main.go", "first")
	p.build()
	if strings.Contains(string(p.logs), "kiln:") {
		t.Errorf("reasons without the option:\n%s", p.logs)
	}
	for name, value := range map[string]string{"kiln.explain": "1", "build-arg:KILN_EXPLAIN": "true"} {
		p.opts = map[string]string{name: value}
		p.write("src/main.go", name)
		p.checkLog(p.build())
	}
}

// checkLog checks that the log holds the reasons and nothing else.
func (p *project) checkLog(b *explanation.Build) {
	t := p.t
	t.Helper()
	var want []string
	for _, s := range b.Steps {
		if s.Ran {
			want = append(want, "kiln: "+s.Sentence())
		}
	}
	got := strings.Split(strings.TrimSuffix(string(p.logs), "\n"), "\n")
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) || !slices.Contains(got, "kiln: ran because src/main.go changed") {
		t.Errorf("log:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A client that doesn't say which directory it builds is told what is probable.
func TestClientsWithoutAKey(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "anonymous")
	p.anon = true
	p.build()
	p.write("src/main.go", "x")
	steps := ran(p.build())
	if len(steps) == 0 || steps[0].Sentence() != "ran, probably because src/main.go changed" {
		t.Errorf("%+v", steps)
	}
}

// A directory that is a copy of another has the other's cache, and nothing that
// is said of its first run is certain.
func TestCopyOfAProject(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "copied")
	p.build()
	q := newProject(t, d, reg, "copied")
	if steps := ran(q.build()); len(steps) > 0 {
		t.Errorf("steps of a copy ran: %+v", steps)
	}
	q.write("src/main.go", "x")
	for _, s := range ran(q.build()) {
		for _, c := range s.Causes {
			if c.Certain && c.Kind != explanation.Parent {
				t.Errorf("%s %s", s.Name, s.Sentence())
			}
		}
	}
	q.write("src/main.go", "y")
	steps := ran(q.build())
	if len(steps) == 0 || steps[0].Sentence() != "ran because src/main.go changed" {
		t.Errorf("%+v", steps)
	}
}

// What is back to what it was ran because it is gone, not because it changed.
func TestBackAndForth(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	p := newProject(t, d, reg, "back")
	p.build()
	p.write("src/main.go", "x")
	p.build()
	p.write("src/main.go", "src/main.go of back")
	if steps := ran(p.build()); len(steps) > 0 {
		t.Errorf("steps ran: %+v", steps)
	}
	must(t, d.client().Prune(t.Context(), client.PruneOptions{All: true}, func(*control.UsageRecord) error { return nil }))
	for _, s := range ran(p.build()) {
		for _, c := range s.Causes {
			if c.Kind != explanation.Evicted && c.Kind != explanation.Gone {
				t.Errorf("%s %s", s.Name, s.Sentence())
			}
		}
	}
}

// Builds of several projects, and several of one, are explained side by side.
func TestExplainConcurrentBuilds(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	reg.tag(t, "latest", "base")
	var wg sync.WaitGroup
	for i := range 4 {
		p := newProject(t, d, reg, fmt.Sprintf("concurrent %d", i/2))
		wg.Go(func() {
			p.build()
			for change := range 3 {
				p.write("src/main.go", fmt.Sprint(i, change))
				b := p.build()
				if steps := ran(b); len(steps) == 0 || !strings.Contains(steps[0].Sentence(), "because src/main.go changed") {
					t.Errorf("change %d of %s:\n%s", change, p.name, asText(t, b))
				}
			}
		})
	}
	wg.Wait()
}
