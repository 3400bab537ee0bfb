package explain

import (
	"slices"
	"unicode/utf8"

	"github.com/kilnbuild/kiln/solver"
)

// record is what is kept of a step that ran: enough to tell a later run of it
// what is different, in at most maxRecord bytes.
type record struct {
	*Origin
	Step    step
	Op      string // short of the op's digest in its cache key
	Facets  facets // values, or "#" and their short
	Inputs  []inputFact
	Keys    []string // shorts of the keys of its outputs
	Results []string // ids of its outputs
	Sketch  []byte   // of what it reads by content (content.go)
	Failed  bool

	id     uint64        // in the journal: later ones have greater ids
	beside [names]beside // of those found by the same, for each of foundBy
	search uint64        // the last one that looked at it
}

// beside are the records made before and after one.
type beside struct{ older, newer *record }

// Origin is the build that a record is of.
type Origin struct {
	Build   string // short of the build's ref
	Time    int64  // when it started, in Unix seconds
	Project string // short of what tells projects apart
}

// inputFact is what an input was.
type inputFact struct {
	Content string   // short of the content digest, if it counts by that
	Keys    []string // shorts of its keys by definition otherwise
	Select  string   // short of the part of it that counts
}

// maxKeys bounds the keys kept of an output or an input.
const maxKeys = 3

func shortKey(k solver.Key) string { return shortOf(k[:]) }

// executedRecord is the record of an execution that starts, after that of a step
// with the facets last. Of a step that isn't kept it says what its inputs are.
func executedRecord(eff *solver.Execute, last facets) *record {
	save := eff.Wanted[0].Save
	rec := &record{Step: stepOf(eff.Vertex), Op: short(string(eff.Ops[0])), Inputs: inputFacts(save.Lookup, eff.Contents)}
	if len(rec.Inputs) > maxInputs {
		return rec
	}
	rec.Facets = facetsOf(eff.Vertex, last)
	for _, w := range eff.Wanted {
		for _, k := range w.Save.Keys[:min(len(w.Save.Keys), maxKeys, 2*maxKeys-len(rec.Keys))] {
			rec.Keys = append(rec.Keys, shortKey(k))
		}
	}
	return rec
}

// loadedRecord is the record that a vertex answered by a found result would
// have; contents aren't told apart from keys there.
func loadedRecord(eff *solver.Load) *record {
	v := eff.Edge.Vertex
	return &record{
		Step: stepOf(v), Op: short(string(eff.Lookup.Op)), Facets: facetsOf(v, nil),
		Inputs: inputFacts(eff.Lookup, nil),
	}
}

// inputFacts reads the inputs off a lookup. Where the content counts it is the
// last candidate.
func inputFacts(l solver.Lookup, contents []solver.Key) []inputFact {
	out := make([]inputFact, len(l.Inputs))
	for i, keys := range l.Inputs {
		f := &out[i]
		if len(contents) > i && contents[i] != (solver.Key{}) {
			f.Content = shortKey(contents[i])
			continue
		}
		for _, k := range keys[:min(len(keys), maxKeys)] {
			f.Keys = append(f.Keys, shortKey(k.Key))
			if k.Selector != "" {
				f.Select = short(string(k.Selector))
			}
		}
	}
	return out
}

// same reports whether f is the input that other was.
func (f inputFact) same(other inputFact) bool {
	switch {
	case f.Content != "" && other.Content != "":
		return f.Content == other.Content
	case f.Content != "":
		return slices.Contains(other.Keys, f.Content)
	case other.Content != "":
		return slices.Contains(f.Keys, other.Content)
	}
	return f.Select == other.Select && slices.ContainsFunc(f.Keys, func(k string) bool { return slices.Contains(other.Keys, k) })
}

// clip shortens s to n bytes without cutting through a character.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const ellipsis = "…"
	end := n - len(ellipsis)
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + ellipsis
}
