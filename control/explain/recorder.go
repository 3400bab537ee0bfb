package explain

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/explanation"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// Options describe the build that a Recorder watches.
type Options struct {
	Ref  string
	Opts map[string]string // of the frontend
	// Key is what the client says tells its directories apart, "" if it says
	// nothing; ok is false as long as the client isn't there. It is called from
	// when the first step runs until it is known.
	Key func() (key string, ok bool)
}

// Recorder watches one build. It is the observer of its solver.Build.
type Recorder struct {
	solver.Unobserved
	journal *Journal
	opts    Options
	started time.Time
	work    sync.WaitGroup // explainWaiting

	mu      sync.Mutex // guards the fields below, and the states
	waiting []func()   // explain steps that run; the first one is being run
	show    bool
	order   []*state
	states  map[*solver.Vertex]*state
	shown   map[digest.Digest]*progress.Vertex // what watchers were last told of a vertex
	lines   map[digest.Digest]string
	last    facets              // of the last step that started
	failed  []explanation.Cause // imported caches, by their names
	key     *string             // once it is known
	family  *family             // of the first known vertices
	known   int                 // so many
}

// state is what is known of a vertex in this build.
type state struct {
	vertex *solver.Vertex
	inputs []*state
	found  *found // nil if nothing was
	ran    bool
	ended  bool
	failed bool
	// fresh is set if it ran on what isn't what the cache has: see forced.
	fresh  bool
	record *record // of the execution, from its start
	// causes and compared are set once the step is explained: after its execution
	// starts, and before whatever stands on it is.
	causes   []explanation.Cause
	compared *explanation.Earlier
}

// found is the record that was found last.
type found struct {
	*solver.Load
	dropped string // why it was of no use
	wanted  []int  // the outputs that executions since then are for
}

var _ solver.Observer = (*Recorder)(nil)

// NewRecorder returns the recorder of a build that begins.
func (j *Journal) NewRecorder(opts Options) *Recorder {
	return &Recorder{
		journal: j, opts: opts, started: time.Now(), states: map[*solver.Vertex]*state{},
		shown: map[digest.Digest]*progress.Vertex{}, lines: map[digest.Digest]string{},
	}
}

// Show makes the log of each step that runs begin with the reason.
func (r *Recorder) Show() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.show = true
}

// Located tells where the vertices of a definition stand in its source.
func (r *Recorder) Located(src *pb.Source) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for dgst, locations := range src.GetLocations() {
		for _, l := range locations.GetLocations() {
			i := int(l.GetSourceIndex())
			if i >= 0 && i < len(src.Infos) && len(l.Ranges) > 0 {
				r.lines[digest.Digest(dgst)] = fmt.Sprintf("%s:%d", src.Infos[i].GetFilename(), l.Ranges[0].GetStart().GetLine())
				break
			}
		}
	}
}

// Shown takes note of what watchers are told of a vertex.
func (r *Recorder) Shown(v *progress.Vertex) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shown[v.Digest] = v
}

// Announced implements solver.Observer.
func (r *Recorder) Announced(eff *solver.Announce) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &state{vertex: eff.Vertex}
	for _, in := range eff.Inputs {
		s.inputs = append(s.inputs, r.states[in.Vertex])
	}
	r.states[eff.Vertex] = s
	r.order = append(r.order, s)
}

// Loading implements solver.Observer.
func (r *Recorder) Loading(eff *solver.Load) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.states[eff.Edge.Vertex]
	if s.found == nil {
		s.found = &found{}
	}
	s.found.Load = eff
}

// Dropped implements solver.Observer.
func (r *Recorder) Dropped(eff *solver.Drop) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.order {
		// A record of an import has another name here than there.
		if s.found != nil && (s.vertex == eff.Edge.Vertex || slices.Contains(eff.Records, s.found.Record.Result)) {
			s.found.dropped = eff.Reason
		}
	}
}

// ImportFailed implements solver.Observer. An import may also turn out to
// be of no use before anything is asked of it.
func (r *Recorder) ImportFailed(name string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.ContainsFunc(r.failed, func(c explanation.Cause) bool { return c.Subject == name }) {
		r.failed = append(r.failed, explanation.Cause{Kind: explanation.Import, Subject: name, From: clip(err.Error(), maxName)})
	}
}

// Starts implements solver.Observer. The step is explained while it runs,
// unless its log is to begin with the reason.
func (r *Recorder) Starts(eff *solver.Execute, scope progress.Scope) {
	r.mu.Lock()
	last := r.last
	r.mu.Unlock()
	rec := executedRecord(eff, last)
	files := contentOf(eff)

	r.mu.Lock()
	r.last = rec.Facets
	s, show := r.states[eff.Vertex], r.show
	s.ran, s.record, s.ended = true, rec, false
	for i, in := range s.inputs {
		s.fresh = s.fresh || rec.Inputs[i].Content == "" && in.forced()
	}
	for _, w := range eff.Wanted {
		if s.found != nil {
			s.found.wanted = append(s.found.wanted, w.Save.Output)
		}
	}
	r.mu.Unlock()
	if !show {
		r.later(func() { r.explain(s, files) })
		return
	}
	r.explain(s, files)
	r.mu.Lock()
	line := "kiln: " + r.stepLocked(s).Sentence()
	r.mu.Unlock()
	scope.Write(progress.Event{Log: &progress.Log{Stream: 2, Data: []byte(line + "\n"), Timestamp: time.Now()}})
}

// Ended implements solver.Observer.
func (r *Recorder) Ended(eff *solver.Execute, ev *solver.Executed) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.states[eff.Vertex]
	if s.record == nil || ev.Cached || ev.Interrupted() {
		return // whatever it was like, it says nothing of the next time
	}
	s.ended, s.failed = true, ev.Err != nil
	for _, out := range ev.Outputs {
		s.record.Results = append(s.record.Results, out.Result.ID())
	}
	slices.Sort(s.record.Results)
}

// later has fn, which explains a step, run after those of steps that started
// before it. One goroutine does it for all: steps start when what they stand on
// has ended, so that what is known of that is known by then, and a thousand that
// start at once take no thousand stacks.
func (r *Recorder) later(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting = append(r.waiting, fn)
	if len(r.waiting) == 1 {
		r.work.Go(r.explainWaiting)
	}
}

func (r *Recorder) explainWaiting() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.waiting) > 0 {
		fn := r.waiting[0]
		r.mu.Unlock()
		fn()
		r.mu.Lock()
		r.waiting[0] = nil
		r.waiting = r.waiting[1:]
	}
	r.waiting = nil
}

// Close explains what is left to explain. After it nothing of the build is
// held; the explanation is kept a moment later.
func (r *Recorder) Close(failed bool) {
	r.work.Wait()
	ended := time.Now()
	f := r.kin()
	r.journal.later(func() { r.keep(f, ended, failed) })
}

func (r *Recorder) keep(f *family, ended time.Time, failed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := &build{Build: explanation.Build{Ref: r.opts.Ref, Started: r.started, Ended: ended, Failed: failed}}
	var records []*record
	origin := &Origin{Build: short(r.opts.Ref), Project: f.project, Time: r.started.Unix()}
	for _, s := range r.order {
		shown := r.shown[s.vertex.Digest]
		if !s.ran && (shown == nil || shown.Completed == nil) {
			continue // it wasn't needed
		}
		if s.ran || len(b.Steps) < maxSteps {
			b.Steps = append(b.Steps, r.stepLocked(s))
		}
		if s.ended && s.recorded() {
			s.record.Origin, s.record.Failed = origin, s.failed
			records = append(records, s.record)
		}
	}
	b.Texts = f.allTexts(maxSteps)
	b.Args = r.args()
	r.journal.keep(b, records)
}

// maxSteps bounds the steps from the cache that an explanation lists.
const maxSteps = 4096

// args are the build's arguments, each with the short of its value. Ours aren't
// for the build.
func (r *Recorder) args() map[string]string {
	out := map[string]string{}
	for name, value := range r.opts.Opts {
		if arg, ok := strings.CutPrefix(name, "build-arg:"); ok && !strings.HasPrefix(arg, "KILN_") {
			out[arg] = short(value)
		}
	}
	return out
}

// recorded reports whether s is compared with later steps. What is read from
// the client runs in every build, and whoever uses it knows what changed.
func (s *state) recorded() bool { return ops.Kind(s.vertex) != "local" }

// name is what people know s by.
func (s *state) name() string { return clip(s.vertex.Name, maxName) }

// stepLocked is what the explanation says of s.
func (r *Recorder) stepLocked(s *state) explanation.Step {
	out := explanation.Step{
		Name: s.name(), Line: r.lines[s.vertex.Digest], Ran: s.ran, Causes: s.causes, Compared: s.compared,
	}
	if v := r.shown[s.vertex.Digest]; v != nil && v.Started != nil && v.Completed != nil {
		out.Failed = v.Error != ""
		if s.ran {
			out.Duration = v.Completed.Sub(*v.Started)
		}
	}
	return out
}

// maxName bounds the names in explanations.
const maxName = 200

// kin is what of this build tells which records are of its steps. It grows with
// the graph.
func (r *Recorder) kin() *family {
	project, _ := r.project()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.family == nil {
		r.known, r.family = 0, &family{
			project: project, known: r.key != nil && *r.key != "",
			texts: map[uint64]bool{}, claimed: map[uint64]int{}, kin: map[string]kinship{},
		}
	}
	for _, s := range r.order[r.known:] {
		if s.recorded() {
			r.family.add(stepOf(s.vertex))
		}
	}
	r.known = len(r.order)
	return r.family
}

// project is the short of what tells projects apart. It isn't final, and ok is
// false, as long as the client isn't there.
func (r *Recorder) project() (project string, ok bool) {
	r.mu.Lock()
	known := r.key
	r.mu.Unlock()
	if known == nil {
		key, ok := r.opts.Key()
		if !ok {
			return r.projectOf(key), false
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.key, r.family = &key, nil
		known = r.key
	}
	return r.projectOf(*known), true
}

func (r *Recorder) projectOf(key string) string {
	o := r.opts.Opts
	return short(strings.Join([]string{key, o["filename"], o["context"], o["contextkey"]}, "\x00"))
}

// explain finds the causes of s, which starts to run, and lets go of files.
func (r *Recorder) explain(s *state, files *content) {
	defer files.release()
	defer r.journal.survive("explain a step")
	ctx := context.Background() // it reads memory, and is waited for
	var sketched []byte
	if s.recorded() {
		var err error
		if sketched, err = files.sketch(ctx); err != nil {
			// What a step reads is lost at times, and found out by the step.
			r.journal.cfg.Log.Debug("the files of a step can't be compared", "step", s.vertex.Name, "err", err)
		}
	}
	r.mu.Lock()
	s.record.Sketch = sketched
	r.mu.Unlock()
	q := &inquiry{r: r, s: s, family: r.kin(), files: files}
	causes, compared := q.causes(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	s.causes = withImports(causes, r.failed)
	if compared != nil {
		s.compared = r.journal.earlier(compared)
	}
}
