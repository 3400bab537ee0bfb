package llb

import (
	"errors"
	"fmt"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// definition is a vertex made from a finished definition, whose ops are taken
// over byte for byte.
type definition struct {
	def    *pb.Definition
	target *pb.Input
}

// FromDefinition returns the state that def stands for, so that it can be built
// upon. An empty definition is Scratch.
func FromDefinition(def *pb.Definition) (State, error) {
	in, err := target(def)
	if err != nil {
		return State{}, err
	}
	if in == nil {
		return Scratch(), nil
	}
	if in.Index < 0 {
		return State{}, fmt.Errorf("definition points to output %d of %s", in.Index, in.Digest)
	}
	o := &output{vertex: &definition{def: def, target: in}}
	for _, dt := range def.Def[:len(def.Def)-1] {
		var op pb.Op
		if err := op.UnmarshalVT(dt); err != nil {
			return State{}, fmt.Errorf("parse op of definition: %w", err)
		}
		if digest.FromBytes(dt) != digest.Digest(in.Digest) {
			continue
		}
		if op.Platform != nil {
			p := op.Platform.Spec()
			o.platform = &p
		}
		return newState(o), nil
	}
	return State{}, fmt.Errorf("definition points to %s, which it doesn't hold", in.Digest)
}

func (d *definition) marshal(*marshaller) (*pb.Op, Constraints, error) {
	return nil, Constraints{}, errors.New("internal error: an included definition has no op of its own")
}

// include writes all ops of d and returns the reference to its target.
func (m *marshaller) include(d *definition) (*pb.Input, error) {
	if _, ok := m.done[d]; ok {
		return d.target, nil
	}
	for _, dt := range d.def.Def[:len(d.def.Def)-1] {
		md := d.def.Metadata[string(digest.FromBytes(dt))]
		m.append(dt, metadataFromPB(md))
	}
	if err := m.sources.include(d.def.Source, m.known); err != nil {
		return nil, err
	}
	m.done[d] = digest.Digest(d.target.Digest)
	return d.target, nil
}

func metadataFromPB(md *pb.OpMetadata) metadata {
	m := metadata{
		ignoreCache: md.GetIgnoreCache(),
		description: md.GetDescription(),
		group:       md.GetProgressGroup(),
		resources:   md.GetLinuxResources(),
		caps:        md.GetCaps(),
	}
	if e := md.GetExportCache(); e != nil {
		m.exportCache = &e.Value
	}
	return m
}

// include adds the files and locations of another definition, those of ops that
// are known.
func (c *sourceCollector) include(src *pb.Source, known map[digest.Digest]metadata) error {
	index := make([]int32, len(src.GetInfos()))
	for i, info := range src.GetInfos() {
		if info == nil {
			return fmt.Errorf("source file %d of definition is missing", i)
		}
		index[i] = c.addInfo(info)
	}
	for dgst, locs := range src.GetLocations() {
		if _, ok := known[digest.Digest(dgst)]; !ok {
			continue
		}
		c.at(dgst)
		for _, l := range locs.GetLocations() {
			if l == nil || l.SourceIndex < 0 || int(l.SourceIndex) >= len(index) {
				return fmt.Errorf("location of op %s points to a missing source file", dgst)
			}
			c.addLocation(dgst, &pb.Location{SourceIndex: index[l.SourceIndex], Ranges: l.Ranges})
		}
	}
	return nil
}
