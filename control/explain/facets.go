package explain

import (
	"maps"
	"slices"
	"unique"
)

// facets are the parts of a definition by their names, in order. Steps have
// most of them in common with others: each is kept once, however many records
// have it.
type facets []facet

type facet = unique.Handle[nameValue]

type nameValue struct{ name, value string }

func facetOf(name, value string) facet { return unique.Make(nameValue{name, value}) }

func facetsOf(values map[string]string) facets {
	out := make(facets, 0, len(values))
	for _, name := range slices.Sorted(maps.Keys(values)) {
		out = append(out, facetOf(name, values[name]))
	}
	return out
}

func (f facets) values() map[string]string {
	out := make(map[string]string, len(f))
	for _, one := range f {
		out[one.Value().name] = one.Value().value
	}
	return out
}
