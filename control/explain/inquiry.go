package explain

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/explanation"
)

// inquiry is the search for the causes of one step.
type inquiry struct {
	r      *Recorder
	s      *state
	family *family
	files  *content
}

// isNew are the causes of a step that wasn't there before; large builds have
// many. Nobody changes it.
var isNew = []explanation.Cause{{Kind: explanation.New, Certain: true}}

// causes says why the step runs, and which record it was compared with.
func (q *inquiry) causes(ctx context.Context) ([]explanation.Cause, *record) {
	if c, ok := q.plain(); ok {
		return []explanation.Cause{c}, nil
	}
	if !q.s.kept() {
		return q.unkept(), nil
	}
	old, ok := q.r.journal.nearest(q.s.record, q.family)
	if !ok {
		return isNew, nil
	}
	if old.diff.none() {
		return []explanation.Cause{q.without(old.record)}, old.record
	}
	args := q.r.arguments(old.record)
	causes := old.diff.facetCauses(q.s.record, old.record, args.has)
	for i := range causes {
		args.behind(&causes[i], q.s.record, old.record)
	}
	for _, i := range old.diff.inputs {
		causes = append(causes, q.input(ctx, i, old.record)...)
	}
	if !old.sure() {
		for i := range causes {
			causes[i].Certain = false
		}
	}
	return causes, old.record
}

// unkept are the causes of a step with so many inputs that no run of it is kept:
// what it stands on and ran is probably why.
func (q *inquiry) unkept() (out []explanation.Cause) {
	q.r.mu.Lock()
	var ran []*state
	for _, in := range q.s.inputs {
		if in.ran && in.recorded() && len(ran) < maxParents {
			ran = append(ran, in)
		}
	}
	q.r.mu.Unlock()
	for _, in := range ran {
		out = append(out, explanation.Cause{Kind: explanation.Parent, Subject: in.name(), By: q.r.causesOf(in)})
	}
	if len(out) == 0 {
		what := fmt.Sprintf("none is kept of a step with %d inputs", len(q.s.inputs))
		out = []explanation.Cause{{Kind: explanation.New, Subject: what, Certain: true}}
	}
	return out
}

// maxParents bounds how many steps are named that may be why another one runs.
const maxParents = 16

// plain finds causes that need no comparison.
func (q *inquiry) plain() (explanation.Cause, bool) {
	s := q.s
	if s.vertex.IgnoreCache {
		return explanation.Cause{Kind: explanation.NoCache, Subject: q.noCache(), Certain: true}, true
	}
	if !s.recorded() {
		return explanation.Cause{Kind: explanation.Always, Certain: true}, true
	}
	if dropped, result, ok := q.r.lost(s); ok {
		if c, ok := q.evicted(result); ok {
			return c, true // between the lookup and the load
		}
		return explanation.Cause{Kind: explanation.Lost, From: loss(dropped), Certain: true}, true
	}
	for i, in := range s.inputs {
		if in.forced() && s.record.Inputs[i].Content == "" {
			return explanation.Cause{Kind: explanation.Parent, Subject: in.name(), Certain: true, By: q.r.causesOf(in)}, true
		}
	}
	return explanation.Cause{}, false
}

// lost reports whether a record was found for s and was of no use.
func (r *Recorder) lost(s *state) (why, result string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := s.found
	if f == nil || !slices.Contains(f.wanted, f.Edge.Index) {
		return "", "", false
	}
	return f.dropped, f.Record.Result, true
}

// longDigest is a digest of which the first characters are enough to find it.
var longDigest = regexp.MustCompile(`(sha256:[0-9a-f]{12})[0-9a-f]{52}`)

// loss is why a record is lost, in the words of whoever met it, without what the
// explanation says anyway, so that the cause of it all isn't cut off.
func loss(why string) string {
	if _, after, ok := strings.Cut(why, cache.ErrLost.Error()+": "); ok {
		why = after
	}
	return clip(longDigest.ReplaceAllString(why, "$1"), maxName)
}

// noCache is who asks for the step to run.
func (q *inquiry) noCache() string {
	switch stages, ok := q.r.opts.Opts["no-cache"]; {
	case ok && stages != "":
		return "--no-cache-filter=" + clip(stages, maxName)
	case ok:
		return "--no-cache"
	}
	return "ignore-cache in the definition"
}

// maxDepth bounds how far a cause is followed from step to step.
const maxDepth = 64

// forced reports whether s ran without the cache, or on something that did, so
// that what it makes isn't what the cache has.
func (s *state) forced() bool {
	if s.vertex.IgnoreCache {
		return len(s.inputs) > 0
	}
	return !s.recorded() || s.fresh
}

// causesOf is why s ran, as far as that is known by now.
func (r *Recorder) causesOf(s *state) []explanation.Cause {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(s.causes) == 0 || !s.causes[0].Certain {
		return nil
	}
	root := s.causes[0].Root()
	return []explanation.Cause{root}
}

// withImports names imports that failed among the causes: any of them may have
// had the result, unless it wasn't to be taken from a cache.
func withImports(causes, failed []explanation.Cause) []explanation.Cause {
	if len(failed) == 0 || len(causes) == 0 {
		return causes
	}
	switch causes[0].Root().Kind {
	case explanation.Always, explanation.NoCache:
		return causes
	}
	return slices.Insert(causes, min(len(causes), explanation.MaxShown-1), failed...)
}

// without says what became of a result that should be there.
func (q *inquiry) without(old *record) explanation.Cause {
	if old.Failed {
		return explanation.Cause{Kind: explanation.FailedBefore, Certain: true}
	}
	if c, ok := q.evicted(old.Results...); ok {
		return c
	}
	return explanation.Cause{Kind: explanation.Gone, Certain: true}
}

// evicted says what became of results, if the cache knows.
func (q *inquiry) evicted(results ...string) (explanation.Cause, bool) {
	for _, e := range q.r.journal.cfg.Evictions.Evicted(results...) {
		if why, lost := strings.CutPrefix(e.Rule, "lost: "); lost {
			return explanation.Cause{Kind: explanation.Lost, From: loss(why), Time: e.At, Certain: true}, true
		}
		return explanation.Cause{Kind: explanation.Evicted, Subject: e.Rule, Time: e.At, Certain: true}, true
	}
	return explanation.Cause{}, false
}

// arguments tells build arguments from other variables, as far as requests name
// them, and which of them differ.
type arguments struct{ now, before map[string]string }

func (r *Recorder) arguments(old *record) arguments {
	r.journal.mu.Lock()
	defer r.journal.mu.Unlock()
	r.journal.readyBuildsLocked()
	a := arguments{now: r.args()}
	if b := r.journal.builds[old.Build]; b != nil {
		a.before = b.Args
	}
	return a
}

func (a arguments) has(name string) bool { return a.now[name] != "" || a.before[name] != "" }

// behind adds to a cause what may be behind it: instructions are expanded before
// they become steps, so that an argument isn't seen in them any more.
func (a arguments) behind(c *explanation.Cause, now, old *record) {
	if c.Kind != explanation.Definition && c.Kind != explanation.Command || now.Step.Text == old.Step.Text {
		return
	}
	var differ []string
	for name := range union(a.now, a.before) {
		if a.now[name] != a.before[name] {
			differ = append(differ, name)
		}
	}
	if len(differ) == 1 {
		c.By = []explanation.Cause{{Kind: explanation.Argument, Subject: differ[0]}}
	}
}

// input says why the step's input isn't what it was in an earlier run.
func (q *inquiry) input(ctx context.Context, i int, old *record) []explanation.Cause {
	now := q.s.record.Inputs[i]
	if now.Content != "" && old.Inputs[i].Content != "" {
		return q.content(ctx, i, old)
	}
	return []explanation.Cause{q.r.parent(q.s, i, old, 0)}
}

// content names the files of an input that differ.
func (q *inquiry) content(ctx context.Context, i int, old *record) (out []explanation.Cause) {
	q.r.mu.Lock()
	sketched := q.s.record.Sketch
	q.r.mu.Unlock()
	changes, err := q.files.changed(ctx, old.Sketch, sketched)
	if err != nil {
		q.r.journal.cfg.Log.Debug("the files of a step can't be compared", "step", q.s.vertex.Name, "err", err)
	}
	var by []explanation.Cause
	if in := q.s.inputs[i]; in.recorded() { // a step, not the client's files
		by = []explanation.Cause{{Kind: explanation.Parent, Subject: in.name(), Certain: true, By: q.r.causesOf(in)}}
	}
	if len(by) > 0 {
		if root := by[0].Root(); strings.HasPrefix(root.Subject, hereDocument) {
			return []explanation.Cause{root} // it is the one file, and known by this name
		}
	}
	for _, c := range changes {
		if c.input == i {
			cause := c.cause()
			cause.By = by
			out = append(out, cause)
		}
	}
	if len(out) == 0 {
		out = append(out, explanation.Cause{Kind: explanation.Files, Certain: true, By: by})
	}
	return out
}

// parent says why input i of s, which counts by what made it, isn't what it was
// in the run of which old is the record.
func (r *Recorder) parent(s *state, i int, old *record, depth int) explanation.Cause {
	in := s.inputs[i]
	name := in.name()
	c := explanation.Cause{Kind: explanation.Parent, Subject: name, Certain: true}
	before := r.journal.byKey(old.Inputs[i].Keys)
	if before != nil && !r.sameStep(in, before) {
		from := before.Step.name()
		if before.Project != old.Project {
			from = before.Step.Text // projects have steps in common, not the names of stages
		}
		return explanation.Cause{Kind: explanation.Order, Subject: name, From: from, Certain: true}
	}
	if before != nil && depth < maxDepth {
		c.By = r.differs(in, before, depth+1)
	}
	if len(c.By) == 0 {
		c.By = r.causesOf(in)
	}
	if len(c.By) > 0 && c.By[0].Kind == explanation.Image && len(in.inputs) == 0 {
		return c.By[0]
	}
	return c
}

// sameStep reports whether s may be the step of which old is a record.
func (r *Recorder) sameStep(s *state, old *record) bool {
	f := r.kin()
	switch now := stepOf(s.vertex); {
	case now.Text == old.Step.Text:
		return true
	case f.has(old.Step):
		return false
	default:
		return now.samePlace(old.Step) || now.Index == 0 && now.alike(old.Step)
	}
}

// differs says how the definition of s, or of a step before it, is another than
// in an earlier run; nil if it is the content of files that is, or not known.
func (r *Recorder) differs(s *state, old *record, depth int) []explanation.Cause {
	if !s.kept() {
		return nil // the earlier run was that of another graph
	}
	now := r.present(s)
	d := compare(now, old)
	if now.Op == "" {
		d.op = len(d.facets) > 0 // of a step that wasn't looked at only these are known
	}
	if causes := d.facetCauses(now, old, r.arguments(old).has); len(causes) > 0 {
		return causes[:1]
	}
	for i := range s.inputs {
		if i >= len(old.Inputs) || now.Op != "" && !slices.Contains(d.inputs, i) || old.Inputs[i].Content != "" {
			continue
		}
		if c := r.parent(s, i, old, depth); len(c.By) > 0 || c.Kind != explanation.Parent {
			return []explanation.Cause{c.Root()}
		}
	}
	return nil
}

// present is what is known of s in this build, in the form of a record.
func (r *Recorder) present(s *state) *record {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case s.record != nil:
		return s.record
	case s.found != nil:
		return loadedRecord(s.found.Load)
	}
	return &record{Step: stepOf(s.vertex), Facets: facetsOf(s.vertex, nil)}
}

// earlier is where rec comes from.
func (j *Journal) earlier(rec *record) *explanation.Earlier {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.readyBuildsLocked()
	e := &explanation.Earlier{Time: time.Unix(rec.Time, 0).UTC()}
	if b := j.builds[rec.Build]; b != nil {
		e.Ref = b.Ref
	}
	return e
}
