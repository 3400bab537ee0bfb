package explain

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"unique"
)

// facets are the parts of a definition by their names, in order. Steps have
// most of them in common with others: each is kept once, however many records
// have it.
type facets []facet

// facet is a name, a NUL, and a value.
type facet = unique.Handle[string]

func facetsOf(values map[string]string) facets {
	out := make(facets, 0, len(values))
	for _, name := range slices.Sorted(maps.Keys(values)) {
		out = append(out, unique.Make(name+"\x00"+values[name]))
	}
	return out
}

func (f facets) values() map[string]string {
	out := make(map[string]string, len(f))
	for _, one := range f {
		name, value, _ := strings.Cut(one.Value(), "\x00")
		out[name] = value
	}
	return out
}

// MarshalJSON makes an object of f, which is how it is stored.
func (f facets) MarshalJSON() ([]byte, error) { return json.Marshal(f.values()) }

// UnmarshalJSON reads an object.
func (f *facets) UnmarshalJSON(data []byte) error {
	var values map[string]string
	if err := json.Unmarshal(data, &values); err != nil {
		return err
	}
	*f = facetsOf(values)
	return nil
}
