package explain

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	deflate "github.com/klauspost/compress/flate"
)

// record is what is kept of a step that ran: enough to tell a later run of it
// what is different, in at most maxRecord bytes.
type record struct {
	*Origin
	Step    step        `json:"n"`
	Op      string      `json:"o"`           // short of the op's digest in its cache key
	Facets  facets      `json:"f,omitempty"` // values, or "#" and their short
	Inputs  []inputFact `json:"in,omitempty"`
	Keys    []string    `json:"ks,omitempty"` // shorts of the keys of its outputs
	Results []string    `json:"r,omitempty"`  // ids of its outputs
	Sketch  []byte      `json:"sk,omitempty"` // of what it reads by content (content.go)
	Failed  bool        `json:"x,omitempty"`

	id     uint64        // in the store
	beside [names]beside // of those found by the same, for each of foundBy
}

// beside are the records made before and after one.
type beside struct{ older, newer *record }

// Origin is the build that a record is of.
type Origin struct {
	Build   string `json:"b"` // short of the build's ref
	Time    int64  `json:"u"` // when it started, in Unix seconds
	Project string `json:"p"` // short of what tells projects apart
}

// inputFact is what an input was.
type inputFact struct {
	Content string   `json:"c,omitempty"` // short of the content digest, if it counts by that
	Keys    []string `json:"k,omitempty"` // shorts of its keys by definition otherwise
	Select  string   `json:"s,omitempty"` // short of the part of it that counts
}

// maxRecord bounds the stored form of a record.
const maxRecord = 768

// maxKeys bounds the keys kept of an output or an input.
const maxKeys = 3

// short is enough of a hash of s to compare it with few others.
func short(s string) string {
	h := sha256.Sum256([]byte(s))
	return base64.RawURLEncoding.EncodeToString(h[:6])
}

func shortKey(k solver.Key) string { return base64.RawURLEncoding.EncodeToString(k[:6]) }

func shortKeys(keys []solver.Key) []string {
	out := make([]string, 0, min(len(keys), maxKeys))
	for _, k := range keys[:min(len(keys), maxKeys)] {
		out = append(out, shortKey(k))
	}
	return out
}

// maxValue bounds values that are kept as they are.
const maxValue = 80

// facetValues are the facets of v in the form of a record.
func facetValues(v *solver.Vertex) facets {
	all := ops.Facets(v)
	out := make(map[string]string, len(all))
	for _, f := range all {
		if f.Private || len(f.Value) > maxValue || strings.HasPrefix(f.Value, "#") || !utf8.ValidString(f.Value) {
			f.Value = "#" + short(f.Value)
		}
		out[f.Name] = f.Value
	}
	return facetsOf(out)
}

// executedRecord is the record of an execution that starts.
func executedRecord(eff *solver.Execute) *record {
	save := eff.Wanted[0].Save
	rec := &record{
		Step: stepOf(eff.Vertex), Op: short(string(eff.Ops[0])), Facets: facetValues(eff.Vertex),
		Inputs: inputFacts(save.Lookup, eff.Contents),
	}
	for _, w := range eff.Wanted {
		rec.Keys = append(rec.Keys, shortKeys(w.Save.Keys)...)
	}
	rec.Keys = rec.Keys[:min(len(rec.Keys), 2*maxKeys)]
	return rec
}

// loadedRecord is the record that a vertex answered by a found result would
// have; contents aren't told apart from keys there.
func loadedRecord(eff *solver.Load) *record {
	v := eff.Edge.Vertex
	return &record{
		Step: stepOf(v), Op: short(string(eff.Lookup.Op)), Facets: facetValues(v),
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

// folded is the name under which facets of a group that has too many are kept
// as one.
func folded(group string) string { return group + foldMark }

const foldMark = " *"

// fold replaces the facets of group by one that stands for them all.
func fold(facets map[string]string, group string) map[string]string {
	if facets[folded(group)] != "" {
		return facets
	}
	out := make(map[string]string, len(facets))
	var all strings.Builder
	for _, name := range slices.Sorted(maps.Keys(facets)) {
		if inGroup(name, group) {
			fmt.Fprintf(&all, "%s=%s\n", name, facets[name])
		} else {
			out[name] = facets[name]
		}
	}
	out[folded(group)] = "#" + short(all.String())
	return out
}

func inGroup(name, group string) bool {
	return group == "" || strings.HasPrefix(name, group+" ") || strings.HasPrefix(name, group+":")
}

// groups are folded one after the other until a record is small enough; ""
// stands for all facets.
var groups = []string{"env", "mount", "action", "extra host", ""}

// pack is the stored form of r. What doesn't fit is left out, the least telling
// part first.
func (r *record) pack() ([]byte, error) {
	data, err := pack(r)
	for i := 0; err == nil && len(data) > maxRecord && i < len(groups); i++ {
		r.Facets = facetsOf(fold(r.Facets.values(), groups[i]))
		data, err = pack(r)
	}
	if err == nil && len(data) > maxRecord {
		r.Sketch = nil
		data, err = pack(r)
	}
	if err == nil && len(data) > maxRecord {
		return nil, fmt.Errorf("it takes %d bytes, more than %d", len(data), maxRecord)
	}
	return data, err
}

func unpackRecord(data []byte) (*record, error) {
	r := &record{Origin: &Origin{}}
	return r, unpack(data, r)
}

// pack is v as compressed JSON. It is compressed without a state: that of other
// compressors is larger than all that a build has to pack, and making it was
// most of what keeping an explanation took.
func pack(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := deflate.StatelessDeflate(&out, text, true, nil); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// maxUnpacked bounds what damaged data can make of itself.
const maxUnpacked = 16 << 20

// unpackers are used again: one takes 40 KB, and the first build after a start
// makes what is known of thousands of steps of as many bytes each.
var unpackers = sync.Pool{New: func() any { return flate.NewReader(nil) }}

func unpack(data []byte, v any) error {
	r := unpackers.Get().(io.ReadCloser)
	defer unpackers.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(data), nil); err != nil {
		return err
	}
	return json.NewDecoder(io.LimitReader(r, maxUnpacked)).Decode(v)
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
