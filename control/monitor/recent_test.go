package monitor

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
)

// What builds ask of the cache, give it and get from it can be seen, and how
// they ended. compat: DMN-114
func TestRecentPages(t *testing.T) {
	e, m := newEngine(t, 0)
	h := m.Handler()
	get := func(path string) string {
		t.Helper()
		status, body, header := page(t, h, "GET", path)
		if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: status %d, %v", path, status, header)
		}
		return body
	}
	if got := get("/debug/cache/all"); got != "nothing yet\n" {
		t.Errorf("before any build: %q", got)
	}
	for i, path := range []string{"/a", "/a", "/missing/a"} {
		_, err := e.Run(t.Context(), build.Request{Ref: fmt.Sprint("ref", i), Definition: definition(t, path)})
		if (err == nil) != (i < 2) {
			t.Fatalf("build of %s: %v", path, err)
		}
	}
	for path, want := range map[string][]string{
		"/debug/cache/lookup": {`lookup .*: miss, `, `lookup .*: hit \S+, 1 keys, 1 records`, `lookup .*: miss, `},
		"/debug/cache/load":   {`load .*: \S+, hit: by definition`},
		"/debug/cache/store":  {`store .*: output 0 is \S+`},
		"/debug/cache/all":    {`lookup .*: miss`, `load `, `lookup .*: hit `, `store `, `lookup .*: miss`},
		"/debug/events": {
			`event .*build ref2 failed: .*missing.* after \S+: 1 steps, 0 cached`,
			`event .*build ref1 succeeded after \S+: 1 steps, 1 cached`, `event .*build ref0 succeeded after \S+: 1 steps, 0 cached`,
		},
	} {
		lines := strings.Split(strings.TrimSuffix(get(path), "\n"), "\n")
		if len(lines) != len(want) {
			t.Errorf("%s has %d lines, want %d:\n%s", path, len(lines), len(want), strings.Join(lines, "\n"))
			continue
		}
		for i, line := range lines {
			if !regexp.MustCompile(want[i]).MatchString(line) {
				t.Errorf("%s: line %d is %q, want %q", path, i, line, want[i])
			}
		}
	}
}

// What runs is listed until it ends, and the past is bounded.
func TestRequestsPage(t *testing.T) {
	_, m := newEngine(t, 0)
	h := m.Handler()
	o, ended := m.Watch()
	x := &solver.Execute{Vertex: &solver.Vertex{Name: "[2/3] RUN make\nall"}}
	o.Starts(x, progress.Scope{})
	over := m.call("/service/Method")
	_, text, _ := page(t, h, "GET", "/debug/requests")
	for _, want := range []string{"builds: 1\n", "\ncalls: 1\n   1 /service/Method\n", "\nsteps: 1\n", ` "[2/3] RUN make\nall"` + "\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	o.Ended(x, &solver.Executed{Execute: x, Err: errors.New("exit code 1")})
	over(new(error))
	ended()
	if _, text, _ := page(t, h, "GET", "/debug/requests"); text != "builds: 0\n\ncalls: 0\n\nsteps: 0\n" {
		t.Errorf("when all is over: %q", text)
	}
	for i := range maxNotes + 10 {
		o.Dropped(&solver.Drop{Records: []string{fmt.Sprint("record", i)}, Reason: "files are missing"})
	}
	_, text, _ = page(t, h, "GET", "/debug/events")
	if n := strings.Count(text, "\n"); n != maxNotes {
		t.Errorf("%d events are shown, want the last %d", n, maxNotes)
	}
	first, _, _ := strings.Cut(text, "\n")
	if want := fmt.Sprintf("lost [%q]: files are missing", fmt.Sprint("record", maxNotes+9)); !strings.HasSuffix(first, want) {
		t.Errorf("the first line is %q, want %q at its end", first, want)
	}
}

// Nothing is kept for a daemon without debug pages.
func TestNothingIsNotedUnseen(t *testing.T) {
	_, m := newEngine(t, 0)
	o, ended := m.Watch()
	defer ended()
	o.Dropped(&solver.Drop{Records: []string{"r"}, Reason: "gone"})
	if len(m.recent.noted) != 0 {
		t.Errorf("noted: %v", m.recent.noted)
	}
}
