package explain

import (
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
)

// facets are the parts of a definition by their names, in order. A step has most
// of them in common with others, and shares what the one before it has.
type facets []*facet

type facet struct{ name, value string }

// maxValue bounds values that are kept as they are.
const maxValue = 80

// maxFacets bounds those of a record: more would not fit into maxRecord bytes.
const maxFacets = 128

// facetsOf are the facets of v in the form of a record. What last has of them
// isn't kept again.
func facetsOf(v *solver.Vertex, last facets) facets {
	all := make(values, 0, 16) // enough for most, without allocating
	for _, f := range ops.Facets(v) {
		if f.Private || len(f.Value) > maxValue || strings.HasPrefix(f.Value, "#") || !utf8.ValidString(f.Value) {
			f.Value = hidden(f.Value)
		}
		all = append(all, facet{f.Name, f.Value})
	}
	all.sort()
	for i := 0; len(all) > maxFacets; i++ {
		all = all.fold(groups[i])
	}
	return all.facets(last)
}

// hidden stands for a value that isn't kept.
func hidden(value string) string { return "#" + short(value) }

// of is the value of a name, "" if there is none.
func (f facets) of(name string) string {
	for _, one := range f {
		if one.name == name {
			return one.value
		}
	}
	return ""
}

func (f facets) folded() bool {
	return slices.ContainsFunc(f, func(one *facet) bool { return strings.HasSuffix(one.name, foldMark) })
}

// values are facets outside records, in the same order.
type values []facet

func (f facets) values() values {
	out := make(values, len(f))
	for i, one := range f {
		out[i] = *one
	}
	return out
}

// facets are v, of which last may have some.
func (v values) facets(last facets) facets {
	out := make(facets, len(v))
	for i := range v {
		for len(last) > 0 && last[0].name < v[i].name {
			last = last[1:]
		}
		if len(last) > 0 && *last[0] == v[i] {
			out[i] = last[0]
		} else {
			out[i] = &facet{v[i].name, v[i].value}
		}
	}
	return out
}

func (v values) sort() {
	slices.SortFunc(v, func(a, b facet) int { return strings.Compare(a.name, b.name) })
}

// folded is the name under which facets of a group that has too many are kept
// as one.
func folded(group string) string { return group + foldMark }

const foldMark = " *"

// groups are folded one after the other until a record is small enough; ""
// stands for all facets.
var groups = []string{"env", "mount", "action", "extra host", ""}

// fold replaces the facets of group by one that stands for them all.
func (v values) fold(group string) values {
	name := folded(group)
	if slices.ContainsFunc(v, func(one facet) bool { return one.name == name }) {
		return v
	}
	var out values
	var line []byte
	all := sha256.New()
	for _, one := range v {
		if !inGroup(one.name, group) {
			out = append(out, one)
			continue
		}
		line = append(append(append(append(line[:0], one.name...), '='), one.value...), '\n')
		all.Write(line)
	}
	out = append(out, facet{name, "#" + shortOf(all.Sum(nil))})
	out.sort()
	return out
}

func inGroup(name, group string) bool {
	rest, ok := strings.CutPrefix(name, group)
	return group == "" || ok && rest != "" && (rest[0] == ' ' || rest[0] == ':')
}

// short is enough of a hash of s to compare it with few others.
func short(s string) string {
	h := sha256.Sum256([]byte(s))
	return shortOf(h[:])
}

// shortOf is short of what has that hash.
func shortOf(hash []byte) string {
	var out [8]byte
	base64.RawURLEncoding.Encode(out[:], hash[:6])
	return string(out[:])
}
