package explain

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/internal/explanation"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// evictions are those that a test made up.
type evictions map[string]cache.Eviction

func (e evictions) Evicted(results ...string) map[string]cache.Eviction {
	out := map[string]cache.Eviction{}
	for _, r := range results {
		if ev, ok := e[r]; ok {
			out[r] = ev
		}
	}
	return out
}

func openStore(t testing.TB, dir string) *store.DB {
	t.Helper()
	db, err := store.Open(store.Options{Root: dir})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func newJournal(t testing.TB) *Journal {
	db := openStore(t, t.TempDir())
	j := Open(Config{Store: db, Evictions: evictions{}})
	t.Cleanup(func() {
		j.Close()
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

// script is a build whose events a test makes up: each step stands on the one
// before.
type script struct {
	t     testing.TB
	r     *Recorder
	ref   string
	steps []*solver.Vertex
}

func (j *Journal) script(t testing.TB, ref string, names ...string) *script {
	var steps []*solver.Vertex
	for i, name := range names {
		v := &solver.Vertex{Name: name, Digest: digest.FromString(name)}
		if i > 0 {
			v.Inputs = []solver.Edge{{Vertex: steps[i-1]}}
		}
		steps = append(steps, v)
	}
	return j.scriptOf(t, ref, steps)
}

func (j *Journal) scriptOf(t testing.TB, ref string, steps []*solver.Vertex) *script {
	r := j.NewRecorder(Options{Ref: ref, Key: func() (string, bool) { return "project", true }, Shown: notShown})
	for _, v := range steps {
		r.Announced(&solver.Announce{Vertex: v, Inputs: v.Inputs})
	}
	return &script{t: t, ref: ref, r: r, steps: steps}
}

// notShown is a vertex of which watchers know nothing.
func notShown(*solver.Vertex) progress.Vertex { return progress.Vertex{} }

// result has an id and nothing else.
type result string

func (r result) ID() string           { return string(r) }
func (r result) Clone() solver.Result { return r }
func (r result) Release()             {}

// execute is the execution of step i whose definition is op, on a result of the
// key input, making one of the key output.
func (s *script) execute(i int, op, input, output string) *solver.Execute {
	v := s.steps[i]
	x := &solver.Execute{Vertex: v, Ops: []digest.Digest{digest.FromString(op)}}
	l := solver.Lookup{Op: x.Ops[0]}
	for range v.Inputs {
		l.Inputs = append(l.Inputs, []solver.InputKey{{Key: key(input)}})
		x.Inputs = append(x.Inputs, result(input))
	}
	x.Wanted = []solver.Wanted{{Lookup: l, Save: solver.Save{Lookup: l, Keys: []solver.Key{key(output)}}}}
	return x
}

func key(s string) solver.Key { return solver.RootKey(digest.FromString(s), 0) }

// run executes step i and returns why.
func (s *script) run(i int, op, input, output string, err error) string {
	s.t.Helper()
	x := s.execute(i, op, input, output)
	s.r.Starts(x, progress.Scope{})
	ev := &solver.Executed{Execute: x, Err: err}
	if err == nil {
		ev.Outputs = []solver.Output{{Result: result("result of " + output)}}
	}
	s.r.Ended(x, ev)
	s.r.work.Wait()
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	return s.r.stepLocked(s.r.states[x.Vertex]).Sentence()
}

func (s *script) expect(got, want string) {
	s.t.Helper()
	if got != want {
		s.t.Errorf("%s: it %q\nwant %q", s.ref, got, want)
	}
}

const (
	noRun  = "ran because no earlier run of it is known"
	isGone = "ran because its earlier result is no longer in the cache, nothing changed"
)

func TestCausesWithoutChange(t *testing.T) {
	j := newJournal(t)
	j.cfg.Evictions = evictions{
		"result of evicted": {Rule: "gc rule#2", At: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)},
		"result of lost":    {Rule: "lost: files are missing"},
	}
	for _, c := range []struct {
		output string
		err    error
		want   string
	}{
		{"gone", nil, isGone},
		{"evicted", nil, "ran because its result was removed by gc rule#2 at 2026-01-02 03:04:05, nothing changed"},
		{"lost", nil, "ran because its cached result could not be used: files are missing"},
		{"failed", errors.New("exit code 1"), "ran because it failed the last time, nothing changed since"},
		{"input lost", &solver.LostError{Inputs: []int{0}, Err: errors.New("gone")}, noRun}, // that run says nothing
	} {
		project := func() (string, bool) { return c.output, true }
		s := j.script(t, c.output+" 1", "[1/1] RUN "+c.output)
		s.r.opts.Key = project
		s.expect(s.run(0, c.output, "", c.output, c.err), noRun)
		s.r.Close(c.err != nil)
		s = j.script(t, c.output+" 2", "[1/1] RUN "+c.output)
		s.r.opts.Key = project
		s.expect(s.run(0, c.output, "", c.output, nil), c.want)
		s.r.Close(false)
	}
}

// broken is a defect.
type broken struct{}

func (broken) Evicted(...string) map[string]cache.Eviction { panic("broken") }

// A defect in explaining costs the explanation.
func TestDefectsAreSurvived(t *testing.T) {
	j := newJournal(t)
	var log strings.Builder
	j.cfg.Evictions, j.cfg.Log = broken{}, slog.New(slog.NewTextHandler(&log, nil))
	for i, want := range []string{noRun, "ran for a reason that is not known"} {
		s := j.script(t, fmt.Sprint(i), "[1/1] RUN a")
		s.expect(s.run(0, "a", "", "a", nil), want)
		s.r.Close(false)
	}
	if b, ok := j.Get("1"); !ok || len(b.Steps) != 1 {
		t.Errorf("kept %+v", b)
	}
	if !strings.Contains(log.String(), "explain a step panicked") {
		t.Errorf("log: %s", log.String())
	}
}

// A record that is found and then is of no use.
func TestLostRecord(t *testing.T) {
	j := newJournal(t)
	s := j.script(t, "1", "[1/1] RUN a")
	rec := solver.Record{Result: "r"}
	s.r.Loading(&solver.Load{Edge: solver.Edge{Vertex: s.steps[0]}, Record: rec})
	s.r.Dropped(&solver.Drop{Records: []string{"other", "r"}, Reason: "layer is missing"})
	s.expect(s.run(0, "a", "", "a", nil), "ran because its cached result could not be used: layer is missing")
	s.r.Close(false)
}

// gatedEvictions are asked for until the gate opens.
type gatedEvictions struct {
	asked chan struct{}
	gate  chan struct{}
}

func (e gatedEvictions) Evicted(...string) map[string]cache.Eviction {
	e.asked <- struct{}{}
	<-e.gate
	return nil
}

// A step whose result is lost at once runs again while it is still being found
// out why it ran.
func TestRunsAgainWhileItIsExplained(t *testing.T) {
	j := newJournal(t)
	s := j.script(t, "1", "[1/1] RUN a")
	s.run(0, "a", "", "a", nil)
	s.r.Close(false)
	j.settle()

	e := gatedEvictions{make(chan struct{}, 2), make(chan struct{})}
	j.cfg.Evictions = e
	s = j.script(t, "2", "[1/1] RUN a")
	x := s.execute(0, "a", "", "a")
	s.r.Starts(x, progress.Scope{})
	<-e.asked
	s.r.Ended(x, &solver.Executed{Execute: x})
	s.r.Starts(x, progress.Scope{})
	close(e.gate)
	s.r.Ended(x, &solver.Executed{Execute: x})
	s.r.work.Wait()
	if b := s.r.stepLocked(s.r.states[x.Vertex]); len(b.Causes) != 1 {
		t.Errorf("causes %v", b.Causes)
	}
	s.r.Close(false)
}

// A record that is found, and removed before it is loaded.
func TestRecordIsRemovedMeanwhile(t *testing.T) {
	j := newJournal(t)
	j.cfg.Evictions = evictions{"r": {Rule: "prune", At: time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)}}
	s := j.script(t, "1", "[1/1] RUN a")
	s.r.Loading(&solver.Load{Edge: solver.Edge{Vertex: s.steps[0]}, Record: solver.Record{Result: "r"}})
	s.r.Dropped(&solver.Drop{Records: []string{"r"}, Reason: "record not found"})
	s.expect(s.run(0, "a", "", "a", nil), "ran because its result was removed by prune at 2026-01-02 03:04:05, nothing changed")
	s.r.Close(false)
}

// An import that can't be used may be why a step runs, unless no cache is.
func TestImportThatFailed(t *testing.T) {
	j := newJournal(t)
	names := []string{"[1/3] FROM base", "[2/3] RUN a", "[3/3] RUN b"}
	const failed = "the imported cache registry r.example.com/cache could not be used: connection refused"
	fail := func(s *script) {
		for range 2 { // each lookup tells
			s.r.ImportFailed("registry r.example.com/cache", errors.New("connection refused"))
		}
	}
	s := j.script(t, "1", names...)
	fail(s)
	s.expect(s.run(0, "base", "", "base", nil), "ran because no earlier run of it is known and "+failed)
	s.expect(s.run(1, "a", "base", "a", nil), "ran because no earlier run of it is known and "+failed)
	s.r.Close(false)

	s = j.script(t, "2", names...)
	fail(s)
	s.steps[2].IgnoreCache = true
	s.expect(s.run(1, "a 2", "base", "a 2", nil), "ran because its definition changed and "+failed)
	s.expect(s.run(2, "b", "a 2", "b", nil), "ran because ignore-cache in the definition asks for it")
	s.r.Close(false)

	s = j.script(t, "3", names...)
	s.expect(s.run(1, "a 3", "base", "a 3", nil), "ran because its definition changed")
	s.r.Close(false)

	many := make([]explanation.Cause, 5)
	got := withImports(many, []explanation.Cause{{Kind: explanation.Import}})
	if len(got) != 6 || !strings.Contains((explanation.Step{Ran: true, Causes: got}).Sentence(), "the imported cache") {
		t.Errorf("of many causes %v: it isn't shown", got)
	}
}

func TestWithoutTheCache(t *testing.T) {
	j := newJournal(t)
	s := j.script(t, "1", "[1/3] FROM base", "[2/3] RUN a", "[3/3] RUN b")
	s.steps[1].IgnoreCache = true
	s.expect(s.run(0, "base", "", "base", nil), noRun)
	s.expect(s.run(1, "a", "base", "a", nil), "ran because ignore-cache in the definition asks for it")
	s.expect(s.run(2, "b", "a", "b", nil), "ran because [2/3] RUN a has a new result (ignore-cache in the definition asks for it)")
	s.r.Close(false)

	for given, said := range map[string]string{"": "--no-cache", "a,b": "--no-cache-filter=a,b"} {
		r := j.NewRecorder(Options{Ref: "2", Opts: map[string]string{"no-cache": given}, Key: func() (string, bool) { return "project", true }, Shown: notShown})
		r.Announced(&solver.Announce{Vertex: s.steps[1]})
		s := &script{t: t, ref: "2", r: r, steps: []*solver.Vertex{{}, s.steps[1]}}
		x := s.execute(1, "a", "base", "a")
		x.Inputs, x.Wanted[0].Lookup.Inputs, x.Wanted[0].Save.Lookup.Inputs = nil, nil, nil
		r.Starts(x, progress.Scope{})
		r.work.Wait()
		s.expect(r.stepLocked(r.states[x.Vertex]).Sentence(), "ran because "+said+" asks for it")
		r.Close(false)
	}
}

// Steps that projects have in common stand in stages of other names.
func TestOrderAcrossProjects(t *testing.T) {
	j := newJournal(t)
	in := func(project string, names ...string) *script {
		s := j.script(t, project, names...)
		s.r.opts.Key = func() (string, bool) { return project, true }
		return s
	}
	s := in("other", "[theirs 1/2] FROM base", "[theirs 2/2] RUN x")
	s.run(0, "base", "", "base", nil)
	s.r.Close(false)
	s = in("ours", "[1/2] FROM base", "[2/2] RUN a")
	s.run(1, "a", "base", "a", nil)
	s.r.Close(false)
	s = in("ours", "[1/3] FROM base", "[2/3] RUN new", "[3/3] RUN a")
	s.run(1, "new", "base", "new", nil)
	s.expect(s.run(2, "a", "new", "a 2", nil), "ran because it now follows [2/3] RUN new and followed FROM base before")
	s.r.Close(false)
}

// What nobody wrote is not named where the instruction is another one.
func TestOrderOfActions(t *testing.T) {
	of := func(text, order string) *record {
		return &record{Step: step{Kind: "file", Text: text}, Op: order, Facets: facetsBy(map[string]string{"source": "f", "order of the actions": order})}
	}
	for was, want := range map[string]string{
		"COPY f /f":        "ran because its command changed; it was COPY f /f",
		"COPY --link f /f": "ran because the order of the actions changed from 0 to 1",
	} {
		now, old := of("COPY --link f /f", "1"), of(was, "0")
		causes := compare(now, old).facetCauses(now, old, func(string) bool { return false })
		if got := (explanation.Step{Ran: true, Causes: causes}).Sentence(); got != want {
			t.Errorf("it was %s: %q, want %q", was, got, want)
		}
	}
}

// A cause is followed from step to step, also through steps that didn't run.
func TestCausesOfOtherSteps(t *testing.T) {
	j := newJournal(t)
	names := []string{"[1/3] FROM base", "[2/3] RUN a", "[3/3] RUN b"}
	s := j.script(t, "1", names...)
	s.run(0, "base 1", "", "base 1", nil)
	s.run(1, "a", "base 1", "a 1", nil)
	s.run(2, "b", "a 1", "b 1", nil)
	s.r.Close(false)

	s = j.script(t, "2", names...)
	s.expect(s.run(0, "base 2", "", "base 2", nil), "ran because its definition changed")
	s.expect(s.run(1, "a", "base 2", "a 2", nil), "ran because [1/3] FROM base has a new result (its definition changed)")
	s.expect(s.run(2, "b", "a 2", "b 2", nil), "ran because [2/3] RUN a has a new result (its definition changed)")
	s.r.Close(false)

	// What the step before has was made by another build.
	s = j.script(t, "3", names...)
	l := solver.Lookup{Op: digest.FromString("a"), Inputs: [][]solver.InputKey{{{Key: key("base 3")}}}}
	s.r.Loading(&solver.Load{Edge: solver.Edge{Vertex: s.steps[1]}, Lookup: l, Record: solver.Record{Result: "r"}})
	s.expect(s.run(2, "b", "a 3", "b 3", nil), "ran because [2/3] RUN a has a new result")
	s.r.Close(false)
}

// Steps come and go between others.
func TestOrderOfSteps(t *testing.T) {
	for _, c := range []struct {
		names []string
		ops   []string // "" didn't run
		want  []string // of those that ran
	}{
		{[]string{"[1/4] FROM base", "[2/4] RUN a", "[3/4] RUN inserted", "[4/4] RUN b"}, []string{"", "", "inserted", "b"},
			[]string{noRun, "ran because it now follows [3/4] RUN inserted and followed [2] RUN a before"}},
		{[]string{"[1/2] FROM base", "[2/2] RUN b"}, []string{"", "b"},
			[]string{"ran because it now follows [1/2] FROM base and followed [2] RUN a before"}},
		{[]string{"[1/3] FROM base", "[2/3] RUN edited", "[3/3] RUN b"}, []string{"", "edited", "b"},
			[]string{"ran because its definition changed", "ran because [2/3] RUN edited has a new result (its definition changed)"}},
		{[]string{"[1/3] FROM base", "[2/3] RUN b", "[3/3] RUN a"}, []string{"", "b", "a"},
			[]string{"ran because it now follows [1/3] FROM base and followed [2] RUN a before", "ran because it now follows [2/3] RUN b and followed [1] FROM base before"}},
	} {
		j := newJournal(t)
		s := j.script(t, "before", "[1/3] FROM base", "[2/3] RUN a", "[3/3] RUN b")
		s.run(0, "base", "", "base", nil)
		s.run(1, "a", "base", "a", nil)
		s.run(2, "b", "a", "b", nil)
		s.r.Close(false)
		s = j.script(t, "after", c.names...)
		input := "base"
		for i, op := range c.ops {
			if op == "" {
				input = []string{"base", "a"}[i]
				continue
			}
			s.expect(s.run(i, op, input, "new "+op, nil), c.want[0])
			input, c.want = "new "+op, c.want[1:]
		}
		s.r.Close(false)
	}
}

// The nearest record counts, not the last one.
func TestBackToAnEarlierState(t *testing.T) {
	j := newJournal(t)
	for i, op := range []string{"one", "two", "one"} {
		s := j.script(t, fmt.Sprint(i), "[1/2] FROM base", "[2/2] RUN a")
		s.run(0, "base", "", "base", nil)
		s.expect(s.run(1, op, "base", op, nil), []string{noRun, "ran because its definition changed", isGone}[i])
		s.r.Close(false)
	}
}

// Of a project that is a copy of another nothing is certain.
func TestCopiesOfProjects(t *testing.T) {
	j := newJournal(t)
	run := func(ref, project string, op string) string {
		s := j.script(t, ref, "[1/4] FROM base", "[2/4] RUN a", "[3/4] RUN b", "[4/4] RUN c")
		s.r.opts.Key = func() (string, bool) { return project, true }
		defer s.r.Close(false)
		return s.run(3, op, "", op, nil)
	}
	for _, c := range []struct{ ref, project, op, want string }{
		{"1", "a", "1", noRun},
		{"2", "b", "2", "ran, probably because its definition changed"},
		{"3", "b", "3", "ran because its definition changed"},
		{"4", "", "4", "ran, probably because its definition changed"},
		{"5", "", "5", "ran, probably because its definition changed"},
	} {
		if got := run(c.ref, c.project, c.op); got != c.want {
			t.Errorf("build %s: it %q, want %q", c.ref, got, c.want)
		}
	}
}

// No run of a step with very many inputs is kept. That is said in place of what
// isn't known, and is no warning in the log of each build.
func TestManyInputs(t *testing.T) {
	j := newJournal(t)
	var log bytes.Buffer
	j.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	var steps []*solver.Vertex
	merge := &solver.Vertex{Name: "merge", Digest: digest.FromString("merge")}
	for i := range 200 {
		v := &solver.Vertex{Name: fmt.Sprint("RUN ", i), Digest: digest.FromString(fmt.Sprint(i))}
		steps, merge.Inputs = append(steps, v), append(merge.Inputs, solver.Edge{Vertex: v})
	}
	steps = append(steps, merge)
	const none = "ran because no earlier run of it is known: none is kept of a step with 200 inputs"
	for ref, c := range map[string]struct {
		runs []int
		want string
	}{
		"nothing": {nil, none},
		"one":     {[]int{7}, "ran, probably because RUN 7 has a new result (no earlier run of it is known)"},
	} {
		s := j.scriptOf(t, ref, steps)
		for _, i := range c.runs {
			s.run(i, fmt.Sprint(ref, i), "", fmt.Sprint(ref, i), nil)
		}
		s.expect(s.run(200, "merge", "input", "merged", nil), c.want)
		s.r.Close(false)
	}
	j.settle()
	if log.Len() > 0 {
		t.Errorf("the log says\n%s", &log)
	}
}

// A step that had few inputs when it ran, and has too many now, isn't said to have
// changed in what of it isn't looked at any more; nor are more steps named than
// somebody reads.
func TestInputsBecomeTooMany(t *testing.T) {
	j := newJournal(t)
	merge := func(inputs int) []*solver.Vertex {
		m := loaded(t, llb.Scratch().File(llb.Mkfile("/merged", 0o644, nil), llb.WithCustomName("merge")))
		m.Inputs = nil
		var steps []*solver.Vertex
		for i := range inputs {
			v := &solver.Vertex{Name: fmt.Sprint("RUN ", i), Digest: digest.FromString(fmt.Sprint(i))}
			steps, m.Inputs = append(steps, v), append(m.Inputs, solver.Edge{Vertex: v})
		}
		on := &solver.Vertex{Name: "RUN on", Digest: digest.FromString("on"), Inputs: []solver.Edge{{Vertex: m}}}
		return append(steps, m, on)
	}
	for i, c := range []struct {
		inputs int
		want   string
	}{
		{2, noRun},
		{maxInputs + 1, "ran because merge has a new result"},
	} {
		steps := merge(c.inputs)
		s := j.scriptOf(t, fmt.Sprint(i), steps)
		for n := range c.inputs {
			s.run(n, fmt.Sprint(i, n), "", fmt.Sprint(i, n), nil)
		}
		s.run(c.inputs, fmt.Sprint("merge", i), "input", fmt.Sprint("merged", i), nil)
		if got := s.r.states[steps[c.inputs]].causes; len(got) > maxParents {
			t.Errorf("%d causes", len(got))
		}
		s.expect(s.run(c.inputs+1, "on", fmt.Sprint("merged", i), fmt.Sprint("on", i), nil), c.want)
		s.r.Close(false)
	}
}

// A few steps that many projects have make no copy: nothing of the one says why
// the other's steps run. A client that doesn't tell projects apart has perhaps
// edited the one that it built before.
func TestUnrelatedProjects(t *testing.T) {
	const guess = "ran, probably because its definition changed"
	for i, c := range []struct {
		project string
		steps   []string // after those of the project a
		want    string
	}{
		{"b", []string{"[1/3] FROM base", "[2/3] COPY . .", "[3/3] RUN make"}, noRun},
		{"b", []string{"[1/3] FROM base", "[2/3] COPY . .", "[3/3] RUN make b"}, noRun},
		{"b", []string{"[1/2] FROM base", "[2/2] RUN make"}, noRun},
		{"", []string{"[1/3] FROM base", "[2/3] COPY . .", "[3/3] RUN make b"}, guess},
		{"", []string{"[1/2] FROM base", "[2/2] RUN other"}, noRun},
		{"a", []string{"[1/3] FROM base", "[2/3] COPY . .", "[3/3] RUN make b"}, "ran because its definition changed"},
	} {
		j := newJournal(t)
		run := func(ref, project string, steps ...string) string {
			s := j.script(t, ref, steps...)
			s.r.opts.Key = func() (string, bool) { return project, true }
			defer s.r.Close(false)
			s.run(0, "base", "", "base", nil)
			return s.run(len(steps)-1, ref, "base", ref, nil)
		}
		run("before", "a", "[1/3] FROM base", "[2/3] COPY . .", "[3/3] RUN make")
		if got := run("after", c.project, c.steps...); got != c.want {
			t.Errorf("case %d: it %q, want %q", i, got, c.want)
		}
	}
}

// What is kept outlives the daemon; what is damaged is dropped.
func TestJournalIsKept(t *testing.T) {
	dir := t.TempDir()
	db := openStore(t, dir)
	j := Open(Config{Store: db, Evictions: evictions{}})
	for _, ref := range []string{"one", "two"} {
		s := j.script(t, ref, "[1/1] RUN "+ref)
		s.run(0, ref, "", ref, nil)
		s.r.Close(ref == "two")
	}
	j.Close()
	var bad store.Batch
	bad.Put(stepsBucket, "0000000000000100", []byte("nonsense"))
	bad.Put(stepsBucket, "0000000000000101", []byte{})
	bad.Put(stepsBucket, "not a number", []byte("nonsense"))
	bad.Put(buildsBucket, "three", []byte("nonsense"))
	db.Write(&bad)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}

	db = openStore(t, dir)
	var log strings.Builder
	j = Open(Config{Store: db, Evictions: evictions{}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	for ref, want := range map[string]string{"one": "one", "two": "two", "": "two"} {
		b, ok := j.Get(ref)
		if !ok || b.Ref != want || b.Failed != (want == "two") || len(b.Steps) != 1 {
			t.Errorf("%q is explained by %+v, %v", ref, b, ok)
		}
	}
	if _, ok := j.Get("three"); ok {
		t.Error("a damaged explanation is given")
	}
	j.byKey(nil)                                              // reads all records
	for _, want := range []string{"entries=3", "entries=1"} { // of steps, and of builds
		if strings.Count(log.String(), "is dropped") != 2 || !strings.Contains(log.String(), want) {
			t.Errorf("log: %s, want %s", log.String(), want)
		}
	}
	s := j.script(t, "four", "[1/1] RUN one")
	s.expect(s.run(0, "one", "", "one", nil), isGone)
	s.r.Close(false)
	j.Forget("one")
	if _, ok := j.Get("one"); ok {
		t.Error("a forgotten build is explained")
	}
	j.Close()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = openStore(t, dir)
	defer db.Close()
	builds := 0
	db.Scan(buildsBucket, "", func(string, []byte) bool { builds++; return true })
	if builds != 2 {
		t.Errorf("%d builds are stored", builds)
	}
	j = Open(Config{Store: db, Evictions: evictions{}})
	j.byKey(nil)
	if j.live != 2 { // the same step again took the place of its record
		t.Errorf("%d records are known", j.live)
	}
}

// countStored is how many records the store has.
func (j *Journal) countStored() (n int) {
	j.cfg.Store.Scan(stepsBucket, "", func(_ string, data []byte) bool { n += countRecords(data); return true })
	return n
}

// known are the texts of the records that are.
func (j *Journal) known() (texts []string) {
	for _, rec := range j.records {
		if rec != nil {
			texts = append(texts, rec.Step.Text)
		}
	}
	return texts
}

// A step that runs in every build leaves one record, however often it runs: what
// is stored is written anew when most of it is of no use.
func TestRecordsThatNobodyNeedsGo(t *testing.T) {
	j := newJournal(t)
	j.bounds.records = 20
	run := func(ref string, names ...string) (why string) {
		s := j.script(t, ref, names...)
		for i, name := range names {
			why = s.run(i, name, "in", name, nil)
		}
		s.r.Close(false)
		j.settle()
		return why
	}
	run("once", "RUN once")
	for b := range 100 {
		run(fmt.Sprint("again ", b), "RUN again", "RUN and again")
		if stored := j.countStored(); stored != j.stored || stored > 2*20 || len(j.records) > 2*20 {
			t.Fatalf("%d records are stored, or %d, and %d known", stored, j.stored, len(j.records))
		}
		if b%30 == 29 {
			j.Rest()
		}
	}
	if got, want := j.known(), []string{"RUN once", "RUN again", "RUN and again"}; !slices.Equal(got, want) {
		t.Errorf("known are %q, want %q", got, want)
	}
	j.Rest()
	if why := run("late", "RUN once"); why != isGone {
		t.Errorf("it %s", why)
	}
}

// However much is built, only so much is kept: the newest.
func TestJournalIsBounded(t *testing.T) {
	j := newJournal(t)
	const maxRecords, maxBuilds, steps = 400, 50, 40
	j.bounds = bounds{maxRecords, maxBuilds}
	names := make([]string, steps)
	for b := range maxRecords/steps + 10 {
		for i := range names {
			names[i] = fmt.Sprintf("[%d/%d] RUN %d in %d", i+1, steps, i, b)
		}
		s := j.script(t, fmt.Sprintf("%04d", b), names...)
		for i := range names {
			s.run(i, names[i], "in", names[i], nil)
		}
		s.r.Close(false)
		j.settle()
	}
	if stored := j.countStored(); stored != j.stored || stored > 2*maxRecords || j.live != maxRecords {
		t.Errorf("%d records are stored, or %d, and %d known, want %d", stored, j.stored, j.live, maxRecords)
	}
	known := 0
	for i := range j.index {
		for _, rec := range j.index[i] {
			for ; rec != nil; rec = rec.beside[i].older {
				known++
			}
		}
	}
	if known != 3*maxRecords || len(j.keys) > maxRecords {
		t.Errorf("%d names of records and %d keys are known", known, len(j.keys))
	}
	for b := range maxBuilds + 10 {
		j.script(t, fmt.Sprintf("build %04d", b)).r.Close(false)
	}
	j.settle()
	builds := 0
	j.cfg.Store.Scan(buildsBucket, "", func(string, []byte) bool { builds++; return true })
	if builds != maxBuilds || len(j.builds) != maxBuilds {
		t.Errorf("%d builds are stored and %d known, want %d", builds, len(j.builds), maxBuilds)
	}
	if b, ok := j.Get(""); !ok || b.Ref != fmt.Sprintf("build %04d", maxBuilds+9) {
		t.Errorf("the last build is %s", b.Ref)
	}
}

func TestStepNames(t *testing.T) {
	long := strings.Repeat("x", 200)
	for name, want := range map[string]step{
		"[build 2/5] RUN make":                              {Stage: "build", Index: 2, Text: "RUN make"},
		"[2/5] RUN make":                                    {Index: 2, Text: "RUN make"},
		"[ 2/12] RUN a\nb":                                  {Index: 2, Text: "RUN a\nb"},
		"[linux/amd64 build  2/12] COPY a b":                {Stage: "linux/amd64 build", Index: 2, Text: "COPY a b"},
		"[internal] load build context":                     {Text: "[internal] load build context"},
		"[1/2] FROM a:b@" + digest.FromString("x").String(): {Index: 1, Text: "FROM a:b"},
		"[build 2/5] RUN echo [x 1/2] y":                    {Stage: "build", Index: 2, Text: "RUN echo [x 1/2] y"},
		"[build x/5] RUN make":                              {Text: "[build x/5] RUN make"},
		"make":                                              {Text: "make"},
		"":                                                  {},
	} {
		want.Kind = "other"
		if got := stepOf(&solver.Vertex{Name: name}); got != want {
			t.Errorf("%q is %+v, want %+v", name, got, want)
		}
	}
	a, b := stepOf(&solver.Vertex{Name: long + "a"}), stepOf(&solver.Vertex{Name: long + "b"})
	if a == b || len(a.Text) > maxText+8 {
		t.Errorf("%+v and %+v", a, b)
	}
}

// Too many facets are kept as one of their group.
// facetsBy are facets by name.
func facetsBy(byName map[string]string) facets {
	var out values
	for name, value := range byName {
		out = append(out, facet{name, value})
	}
	out.sort()
	return out.facets(nil)
}

func TestLargeRecords(t *testing.T) {
	large := func(change string) *record {
		r := &record{Origin: &Origin{Build: short("b"), Project: short("p")}, Step: step{Kind: "exec", Stage: "build", Index: 3, Text: strings.Repeat("RUN ", 20)},
			Op: short(change), Keys: []string{short("k")}, Results: []string{short("r") + short("s")},
			Inputs: []inputFact{{Content: short("a")}, {Keys: []string{short("b"), short("c")}}}, Sketch: slices.Repeat([]byte(short(change+"sketch")), 40)}
		values := map[string]string{"command": "#" + short(change)}
		for i := range 400 {
			values[fmt.Sprint("env VARIABLE_NUMBER_", i)] = "#" + short(fmt.Sprint(change, i))
			values[fmt.Sprint("mount /m", i)] = strings.Repeat("bind readonly ", 4)
		}
		r.Facets = facetsBy(values)
		return r
	}
	a, b, same := large("a"), large("b"), large("a")
	for _, r := range []*record{a, b} {
		if err := r.fit(); err != nil {
			t.Fatal(err)
		}
		data, err := packRecords([]*record{r})
		if err != nil || len(data) > maxRecord {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
		got, err := unpackRecords(data)
		if err != nil || len(got) != 1 || got[0].Op != r.Op || len(got[0].Facets) > 3 {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if d := compare(same, a); !d.none() {
		t.Errorf("a record differs from itself in %+v", d)
	}
	d := compare(same, b) // one folded, the other not
	causes := d.facetCauses(same, b, func(string) bool { return false })
	var said []string
	for _, c := range causes {
		said = append(said, c.String())
	}
	if want := []string{"its command changed", "the environment changed"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
}

// Whatever is stored, it can be compared with.
func FuzzCompare(f *testing.F) {
	for _, r := range []*record{{}, {Op: "a", Facets: facetsBy(map[string]string{"env *": "#x"}), Inputs: []inputFact{{Content: "c"}}}} {
		r.Origin = &Origin{}
		data, err := packRecords([]*record{r})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	now := &record{Op: "o", Facets: facetsBy(map[string]string{"env A": "#a", "user": "me"}), Inputs: []inputFact{{Keys: []string{"k"}}}}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := unpackRecords(data)
		if err != nil || len(all) == 0 {
			return
		}
		old := all[0]
		d := compare(now, old)
		for _, c := range d.facetCauses(now, old, func(string) bool { return true }) {
			io.WriteString(io.Discard, c.String())
		}
		fam := &family{texts: map[uint64]bool{}, claimed: map[uint64]int{}, kin: map[string]kinship{}}
		fam.likeness(now.Step, old.Step)
		contentDistance(now, old)
		if _, err := (&content{}).changed(context.Background(), old.Sketch, now.Sketch); err != nil {
			t.Error(err)
		}
	})
}

// BenchmarkStep is what a step costs that runs when the journal is full: Starts
// and Ended, which hold up the build, and in all.
func BenchmarkStep(b *testing.B) {
	j := newJournal(b)
	names := make([]string, 32)
	build := func(n int) *script {
		for i := range names {
			names[i] = fmt.Sprintf("[%d/%d] RUN %d of %d", i+1, len(names), i, n%100)
		}
		return j.script(b, fmt.Sprint("build ", n), names...)
	}
	for n := range defaultBounds.records / len(names) {
		s := build(n)
		for i := range names {
			s.run(i, fmt.Sprint(n, i), fmt.Sprint("input ", n), fmt.Sprint("output ", n, i), nil)
		}
		s.r.Close(false)
	}
	j.settle()
	n, held, before := 1000, time.Duration(0), processorTime(b)
	for b.Loop() {
		n++
		s := build(n)
		for i := range names {
			x := s.execute(i, fmt.Sprint(n, i), fmt.Sprint("input ", n), fmt.Sprint("output ", n, i))
			start := time.Now()
			s.r.Starts(x, progress.Scope{})
			s.r.Ended(x, &solver.Executed{Execute: x, Outputs: []solver.Output{{Result: result("r")}}})
			held += time.Since(start)
		}
		s.r.Close(false)
		j.settle()
	}
	steps := float64(b.N * len(names))
	b.ReportMetric(float64(held.Microseconds())/steps, "held-µs/step")
	b.ReportMetric(float64((processorTime(b)-before).Microseconds())/steps, "cpu-µs/step")
}

// BenchmarkVertex is what a vertex of a large build costs that runs, and one
// that is answered from the cache: the memory held until the build ends, and
// what the processors do, the writing of records included.
func BenchmarkVertex(b *testing.B) {
	const n = 1000
	for _, ran := range []bool{true, false} {
		b.Run(fmt.Sprintf("ran=%v", ran), func(b *testing.B) {
			j := newJournal(b)
			names := make([]string, n)
			for i := range names {
				names[i] = fmt.Sprintf("[%d/%d] RUN step %d", i+1, n, i)
			}
			s := j.script(b, "build", names...)
			executions := make([]*solver.Execute, n)
			for i := range executions {
				executions[i] = s.execute(i, fmt.Sprint("op ", i), fmt.Sprint("input ", i), fmt.Sprint("output ", i))
			}
			watch := func() *Recorder {
				r := j.NewRecorder(Options{Ref: "measured", Key: func() (string, bool) { return "project", true }, Shown: notShown})
				for _, x := range executions {
					r.Announced(&solver.Announce{Vertex: x.Vertex})
				}
				for _, x := range executions {
					if ran {
						r.Starts(x, progress.Scope{})
						r.Ended(x, &solver.Executed{Execute: x, Outputs: []solver.Output{{Result: result("r")}}})
					} else {
						r.Loading(&solver.Load{Edge: solver.Edge{Vertex: x.Vertex}, Lookup: x.Wanted[0].Lookup})
					}
				}
				r.work.Wait()
				return r
			}
			empty := held()
			r := watch()
			bytes := held() - empty
			r.Close(false)
			j.settle()
			before := processorTime(b)
			for b.Loop() {
				watch().Close(false)
				j.settle()
			}
			b.ReportMetric(float64(bytes)/n, "heldB/vertex")
			b.ReportMetric(float64((processorTime(b)-before).Nanoseconds())/float64(b.N*n), "cpu-ns/vertex")
		})
	}
}

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}
