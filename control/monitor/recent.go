package monitor

import (
	"cmp"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/solver"
)

// recent is what happened lately, of each kind on its own, so that the many of
// one don't push out the few of another. Nothing is noted until somebody may
// look.
type recent struct {
	on atomic.Bool

	mu     sync.Mutex // guards the fields below
	noted  map[kind][]note
	number uint64 // of the last note
}

// kind is what sort of thing was noted.
type kind string

const (
	lookups kind = "lookup" // of the key store
	stores  kind = "store"  // of what a step made
	loads   kind = "load"   // of a record
	events  kind = "event"  // of builds, and of lost records
)

type note struct {
	number uint64
	at     time.Time
	kind   kind
	text   string
}

// maxNotes bounds the notes of a kind.
const maxNotes = 200

// note keeps a line of at most a few hundred bytes.
func (r *recent) note(k kind, format string, args ...any) {
	if !r.on.Load() {
		return
	}
	text := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.number++
	if len(r.noted[k]) == maxNotes {
		r.noted[k] = slices.Delete(r.noted[k], 0, 1)
	}
	r.noted[k] = append(r.noted[k], note{r.number, time.Now(), k, text})
}

// page shows the notes of some kinds, the newest first.
func (r *recent) page(kinds ...kind) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		var all []note
		r.mu.Lock()
		for _, k := range kinds {
			all = append(all, r.noted[k]...)
		}
		r.mu.Unlock()
		slices.SortFunc(all, func(a, b note) int { return cmp.Compare(b.number, a.number) })
		plain(w)
		for _, n := range all {
			fmt.Fprintf(w, "%s %-6s %s\n", n.at.Format(time.RFC3339Nano), n.kind, n.text)
		}
		if len(all) == 0 {
			_, _ = io.WriteString(w, "nothing yet\n") // an error is the reader's, who has left
		}
	}
}

func plain(w http.ResponseWriter) { w.Header().Set("Content-Type", "text/plain; charset=utf-8") }

// name is v's, for a line.
func name(v *solver.Vertex) string { return fmt.Sprintf("%.120q", v.Name) }

// Queried is told what was asked of the key stores, and what they have.
func (o *observer) Queried(eff *solver.Query, found solver.Found) {
	if !o.m.recent.on.Load() {
		return
	}
	result := "miss"
	if len(found.Records) > 0 {
		result = "hit " + found.Records[0].String()
	}
	o.m.recent.note(lookups, "%s: %s, %d keys, %d records", name(eff.Edge.Vertex), result, len(found.Keys), len(found.Records))
}

// Loading is told of a record that was found.
func (o *observer) Loading(eff *solver.Load) {
	o.m.recent.note(loads, "%s: %s, %s", name(eff.Edge.Vertex), eff.Record, eff.Reason)
}

// Dropped is told of records that are lost.
func (o *observer) Dropped(eff *solver.Drop) {
	o.m.recent.note(events, "lost %.80q: %.200s", eff.Records, eff.Reason)
}

// made notes what a step has made.
func (m *Monitor) made(ev *solver.Executed) {
	if !m.recent.on.Load() {
		return
	}
	for _, out := range ev.Outputs {
		m.recent.note(stores, "%s: output %d is %s", name(ev.Vertex), out.Index, out.Result.ID())
	}
}

// ended notes how a build ended.
func (m *Monitor) ended(b *build.Build, out build.Outcome) {
	how := "succeeded"
	if out.Err != nil {
		how = fmt.Sprintf("failed: %.200s", out.Err)
	}
	m.recent.note(events, "build %s %s after %s: %d steps, %d cached", b.Request().Ref, how,
		out.Ended.Sub(out.Started).Round(time.Millisecond), out.Stats.Total, out.Stats.Cached)
}

// requests shows what runs now: calls of the API, and steps with how long they
// have been running, the oldest first. It tells what a build waits for.
func (m *Monitor) requests(w http.ResponseWriter, _ *http.Request) {
	type step struct {
		name  string
		begun time.Time
	}
	var calls []string
	var steps []step
	m.mu.Lock()
	builds := m.running
	for method, n := range m.calls {
		if n > 0 {
			calls = append(calls, fmt.Sprintf("%4d %s", n, method))
		}
	}
	for eff, begun := range m.begun {
		steps = append(steps, step{name(eff.Vertex), begun})
	}
	m.mu.Unlock()
	slices.Sort(calls)
	slices.SortFunc(steps, func(a, b step) int { return cmp.Or(a.begun.Compare(b.begun), cmp.Compare(a.name, b.name)) })
	plain(w)
	fmt.Fprintf(w, "builds: %d\n\ncalls: %d\n", builds, len(calls))
	for _, c := range calls {
		fmt.Fprintln(w, c)
	}
	fmt.Fprintf(w, "\nsteps: %d\n", len(steps))
	for _, s := range steps {
		fmt.Fprintf(w, "%10s %s\n", time.Since(s.begun).Round(time.Millisecond), s.name)
	}
}
