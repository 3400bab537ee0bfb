package ops

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

// Fingerprinter is a SourceInstance that can say what its last CacheKey stands
// for, without asking anybody. What others are is their identifier and their
// attributes.
type Fingerprinter interface {
	SourceInstance
	Facets() []Facet
}

func (s *sourceOp) kind() string {
	scheme, _, _ := strings.Cut(s.pb.GetSource().GetIdentifier(), "://")
	return scheme
}

func (s *sourceOp) facets() []Facet {
	if f, ok := s.instance.(Fingerprinter); ok {
		return f.Facets()
	}
	var f facets
	src := s.pb.GetSource()
	f.add("source", src.GetIdentifier())
	for _, name := range slices.Sorted(maps.Keys(src.GetAttrs())) {
		if name != pb.AttrLocalSessionID && name != pb.AttrLocalUniqueID {
			f.private("attribute "+name, src.Attrs[name])
		}
	}
	return f
}

func (m *mergeOp) kind() string { return "merge" }

func (m *mergeOp) facets() []Facet {
	var f facets
	f.private("merged states", jsonText(m.op))
	return f
}

func (d *diffOp) kind() string { return "diff" }

func (d *diffOp) facets() []Facet {
	var f facets
	f.private("compared states", jsonText(d.op))
	return f
}

func (p *passthroughOp) kind() string { return "passthrough" }

func (p *passthroughOp) facets() []Facet {
	var f facets
	f.private("outputs", jsonText(p.op))
	return f
}

func (n *nestedOp) kind() string { return "build" }

func (n *nestedOp) facets() []Facet {
	var f facets
	f.add("definition file", n.fileName())
	f.private("nested build", jsonText(n.op))
	return f
}

// jsonText is what of an op is hashed for its key.
func jsonText(v any) string {
	dt, err := json.Marshal(v)
	if err != nil { // then there is no key, and the step doesn't run
		return fmt.Sprintf("%T", v)
	}
	return string(dt)
}
