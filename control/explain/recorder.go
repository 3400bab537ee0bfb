package explain

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/explanation"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// Options describe the build that a Recorder watches.
type Options struct {
	Ref  string
	Opts map[string]string // of the frontend
	// Key is what the client says tells its directories apart, "" if it says
	// nothing; ok is false as long as the client isn't there. It is called from
	// when the first step runs until it is known.
	Key func() (key string, ok bool)
	// Shown is what watchers were last told of a vertex. It is called until the
	// explanation is kept, which is after the build has ended.
	Shown func(*solver.Vertex) progress.Vertex
	// Kept is called once the explanation is; it may be nil.
	Kept func()
}

// Recorder watches one build. It is the observer of its solver.Build.
type Recorder struct {
	solver.Unobserved
	journal *Journal
	opts    Options
	started time.Time
	args    func() map[string]string
	work    sync.WaitGroup // explainWaiting

	mu           sync.Mutex // guards the fields below, and the states
	waiting      []func()   // explain steps that run; the first one is being run
	show         bool
	told         []solver.Effect // that aren't in the two fields below yet
	order        []*state
	states       map[*solver.Vertex]*state
	sources      []*pb.Source        // of the definitions
	last         facets              // of the last step that started
	failed       []explanation.Cause // imported caches, by their names
	key          *string             // once it is known
	projectShort string              // what project returns once key is known
	family       *family             // of the first known vertices
	known        int                 // so many
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
	args := sync.OnceValue(func() map[string]string { return argsOf(opts.Opts) })
	return &Recorder{journal: j, opts: opts, started: time.Now(), args: args}
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
	if len(src.GetLocations()) > 0 {
		r.sources = append(r.sources, src)
	}
}

// lineLocked is where v stands, such as Dockerfile:4; "" if that isn't known.
func (r *Recorder) lineLocked(v *solver.Vertex) string {
	for _, src := range slices.Backward(r.sources) {
		for _, l := range src.Locations[string(v.Digest)].GetLocations() {
			i := int(l.GetSourceIndex())
			if i >= 0 && i < len(src.Infos) && len(l.Ranges) > 0 {
				return src.Infos[i].GetFilename() + ":" + strconv.Itoa(int(l.Ranges[0].GetStart().GetLine()))
			}
		}
	}
	return ""
}

// Announced implements solver.Observer.
func (r *Recorder) Announced(eff *solver.Announce) { r.tell(eff) }

// Loading implements solver.Observer.
func (r *Recorder) Loading(eff *solver.Load) { r.tell(eff) }

// Dropped implements solver.Observer.
func (r *Recorder) Dropped(eff *solver.Drop) { r.tell(eff) }

// tell keeps what is looked at when a step runs, or the build is over.
func (r *Recorder) tell(eff solver.Effect) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = append(r.told, eff)
}

// catchUpLocked looks at what was told.
func (r *Recorder) catchUpLocked() {
	if r.states == nil {
		r.states = make(map[*solver.Vertex]*state, len(r.told))
	}
	var block []state // a thousand vertices are announced at once, and forgotten
	for i, eff := range r.told {
		switch eff := eff.(type) {
		case *solver.Announce:
			if len(block) == 0 {
				block = make([]state, len(r.told)-i)
			}
			r.announcedLocked(&block[0], eff)
			block = block[1:]
		case *solver.Load:
			s := r.states[eff.Edge.Vertex]
			if s.found == nil {
				s.found = &found{}
			}
			s.found.Load = eff
		case *solver.Drop:
			r.droppedLocked(eff)
		}
	}
	r.told = nil
}

// announcedLocked makes s the state of a new vertex.
func (r *Recorder) announcedLocked(s *state, eff *solver.Announce) {
	s.vertex, s.inputs = eff.Vertex, make([]*state, len(eff.Inputs))
	for i, in := range eff.Inputs {
		s.inputs[i] = r.states[in.Vertex]
	}
	r.states[eff.Vertex] = s
	r.order = append(r.order, s)
}

func (r *Recorder) droppedLocked(eff *solver.Drop) {
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
	files := &content{}
	if len(rec.Inputs) <= maxInputs {
		files = contentOf(eff)
	}

	r.mu.Lock()
	r.last = rec.Facets
	r.catchUpLocked()
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
	if s == nil || s.record == nil || ev.Cached || ev.Interrupted() {
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

// Close explains what is left to explain. The explanation is kept a moment later;
// then nothing of the build is held.
func (r *Recorder) Close(failed bool) {
	r.work.Wait()
	ended := time.Now()
	r.project()
	r.journal.later(func() {
		r.keep(ended, failed)
		if r.opts.Kept != nil {
			r.opts.Kept()
		}
	})
}

func (r *Recorder) keep(ended time.Time, failed bool) {
	r.mu.Lock()
	r.catchUpLocked()
	b := &build{Build: explanation.Build{
		Ref: r.opts.Ref, Started: r.started, Ended: ended, Failed: failed,
		Steps: make([]explanation.Step, 0, min(len(r.order), maxSteps)),
	}}
	var records []*record
	for _, s := range r.order {
		shown := r.opts.Shown(s.vertex)
		if !s.ran && shown.Completed == nil {
			continue // it wasn't needed
		}
		if s.ran || len(b.Steps) < maxSteps {
			b.Steps = append(b.Steps, r.endedLocked(s, shown))
		}
		if s.ended && s.kept() {
			s.record.Failed = s.failed
			records = append(records, s.record)
		}
	}
	r.mu.Unlock()
	if len(records) > 0 {
		f := r.kin()
		origin := &Origin{Build: short(r.opts.Ref), Project: f.project, Time: r.started.Unix()}
		for _, rec := range records {
			rec.Origin = origin
		}
		// Nobody asks for these but who finds a record of the build.
		b.Texts, b.Args = f.allTexts(maxSteps), r.args()
	}
	r.journal.keep(b, records)
	r.order, r.states, r.family = nil, map[*solver.Vertex]*state{}, nil
}

// maxSteps bounds the steps from the cache that an explanation lists.
const maxSteps = 4096

// argsOf are a build's arguments, each with the short of its value. Ours aren't
// for the build.
func argsOf(opts map[string]string) map[string]string {
	out := map[string]string{}
	for name, value := range opts {
		if arg, ok := strings.CutPrefix(name, "build-arg:"); ok && !strings.HasPrefix(arg, "KILN_") {
			out[arg] = short(value)
		}
	}
	return out
}

// recorded reports whether s is compared with later steps. What is read from
// the client runs in every build, and whoever uses it knows what changed.
func (s *state) recorded() bool { return ops.Kind(s.vertex) != "local" }

// kept reports whether there is room for a record of s.
func (s *state) kept() bool { return s.recorded() && len(s.inputs) <= maxInputs }

// name is what people know s by.
func (s *state) name() string { return clip(s.vertex.Name, maxName) }

// stepLocked is what the explanation says of s as long as it isn't over.
func (r *Recorder) stepLocked(s *state) explanation.Step {
	return explanation.Step{Name: s.name(), Ran: s.ran, Causes: s.causes, Compared: s.compared}
}

// endedLocked is what it says at the end, when watchers were shown s so.
func (r *Recorder) endedLocked(s *state, shown progress.Vertex) explanation.Step {
	out := r.stepLocked(s)
	out.Line = r.lineLocked(s.vertex)
	if shown.Started != nil && shown.Completed != nil {
		out.Failed = shown.Error != ""
		if s.ran {
			out.Duration = shown.Completed.Sub(*shown.Started)
		}
	}
	return out
}

// maxName bounds the names in explanations.
const maxName = 200

// kin is what of this build tells which records are of its steps. It grows with
// the graph.
func (r *Recorder) kin() *family {
	project := r.project()
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

// project is the short of what tells projects apart. It isn't final as long as
// the client isn't there.
func (r *Recorder) project() string {
	r.mu.Lock()
	known, project := r.key != nil, r.projectShort
	r.mu.Unlock()
	if known {
		return project
	}
	key, ok := r.opts.Key()
	o := r.opts.Opts
	project = short(strings.Join([]string{key, o["filename"], o["context"], o["contextkey"]}, "\x00"))
	if ok {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.key, r.projectShort, r.family = &key, project, nil
	}
	return project
}

// explain finds the causes of s, which starts to run, and lets go of files.
func (r *Recorder) explain(s *state, files *content) {
	defer files.release()
	defer r.journal.survive("explain a step")
	ctx := context.Background() // it reads memory, and is waited for
	var sketched []byte
	if s.kept() {
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
