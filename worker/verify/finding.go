package verify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// Outcome is what a check found.
type Outcome string

// The outcomes of a check.
const (
	Equal            Outcome = "equal"            // the record is what the step makes
	Nondeterministic Outcome = "nondeterministic" // the step makes something else each time
	Wrong            Outcome = "wrong"            // the step makes something else than the record
	// Unsure: it does, but from an input that may not be the one that the record
	// was made from, as there are several results of it.
	Unsure  Outcome = "unsure"
	Failed  Outcome = "failed"  // the step fails when it is executed again
	Skipped Outcome = "skipped" // it can't be executed again
)

// Outcomes are all of them.
var Outcomes = []Outcome{Equal, Nondeterministic, Wrong, Unsure, Failed, Skipped}

// maxPaths is how many paths a Finding names.
const maxPaths = 10

// Finding is the outcome of a check.
type Finding struct {
	At        time.Time     `json:"at"`
	Outcome   Outcome       `json:"outcome"`
	Step      string        `json:"step"`
	Vertex    digest.Digest `json:"vertex"`
	Records   []string      `json:"records"`
	Paths     []string      `json:"paths,omitempty"`     // that differ, the first few
	More      int           `json:"more,omitempty"`      // further ones
	Forgotten int           `json:"forgotten,omitempty"` // records, of a wrong one and what was made of it
	Detail    string        `json:"detail,omitempty"`    // why it failed or was skipped
}

// note adds what differs, in words for what only one side has.
func (f *Finding) note(d differences, onlyFirst, onlySecond string) {
	for _, p := range d.paths {
		switch p.What {
		case snapshot.OnlyInFirst:
			p.What = onlyFirst
		case snapshot.OnlyInSecond:
			p.What = onlySecond
		}
		if len(f.Paths) == maxPaths {
			f.More++
			continue
		}
		f.Paths = append(f.Paths, p.String())
	}
	f.More += d.count - len(d.paths)
}

func (f *Finding) log(log *slog.Logger) {
	about := []any{"step", f.Step, "vertex", f.Vertex.String(), "records", f.Records}
	if len(f.Paths) > 0 {
		about = append(about, "differ", f.Paths, "more", f.More)
	}
	switch f.Outcome {
	case Equal:
		log.Debug("cache verify: a cached result is what its step makes", about...)
	case Nondeterministic:
		log.Warn("cache verify: a step isn't deterministic: two executions on the same inputs differ", about...)
	case Wrong:
		log.Error("cache verify: a cached result was wrong: the step makes something else, twice the same; "+
			"the record and what was made of it are forgotten", append(about, "forgotten", f.Forgotten)...)
	case Unsure:
		log.Info("cache verify: a cached result differs from what its step makes, but an input was made again since", about...)
	case Failed:
		log.Warn("cache verify: a step that the cache has a result of fails when it is executed again", append(about, "error", f.Detail)...)
	case Skipped:
		log.Debug("cache verify: a cached result can't be verified", append(about, "reason", f.Detail)...)
	}
}

// differences counts paths that results don't agree in, and keeps the first.
type differences struct {
	count int
	paths []snapshot.Difference
}

// between adds the differences of a and b.
func (d *differences) between(ctx context.Context, a, b solver.Result) (err error) {
	if a.ID() == b.ID() {
		return nil
	}
	first, err := refOf(a).Open(ctx)
	if err != nil {
		return fmt.Errorf("open %s: %w", a.ID(), err)
	}
	defer func() { err = errors.Join(err, first.Close()) }()
	second, err := refOf(b).Open(ctx)
	if err != nil {
		return fmt.Errorf("open %s: %w", b.ID(), err)
	}
	defer func() { err = errors.Join(err, second.Close()) }()
	return snapshot.Compare(ctx, first, second, func(p snapshot.Difference) {
		d.count++
		if len(d.paths) < maxPaths {
			d.paths = append(d.paths, p)
		}
	})
}

// maxFindings is how many findings are remembered.
const maxFindings = 100

// results sums up what was found.
type results struct {
	counts   map[Outcome]int
	skipped  map[string]int
	findings []Finding
}

func (r *results) add(f Finding) {
	if f.Outcome == Skipped {
		r.skip(f.Detail)
		return
	}
	if r.counts == nil {
		r.counts = map[Outcome]int{}
	}
	r.counts[f.Outcome]++
	if f.Outcome == Equal {
		return
	}
	if len(r.findings) == maxFindings {
		r.findings = r.findings[1:]
	}
	r.findings = append(r.findings, f)
}

func (r *results) skip(reason string) {
	if r.counts == nil {
		r.counts = map[Outcome]int{}
	}
	if r.skipped == nil {
		r.skipped = map[string]int{}
	}
	r.counts[Skipped]++
	r.skipped[reason]++
}

// Summary is what the checks since the start have found.
type Summary struct {
	Queued   int             `json:"queued"`   // that wait or are being checked
	Counts   map[Outcome]int `json:"counts"`   // of checks
	Skipped  map[string]int  `json:"skipped"`  // by reason
	Findings []Finding       `json:"findings"` // newest last; none for what is equal or was skipped
}

// Summary returns what was found so far.
func (v *Verifier) Summary() Summary {
	v.mu.Lock()
	defer v.mu.Unlock()
	return Summary{
		Queued: len(v.queued), Counts: maps.Clone(v.results.counts), Skipped: maps.Clone(v.results.skipped),
		Findings: slices.Clone(v.results.findings),
	}
}
