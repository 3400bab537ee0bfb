package llb

import (
	"bytes"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// SourceMap is a file from which operations are made, so that errors can point
// into it.
type SourceMap struct {
	Filename   string
	Language   string // as GitHub's linguist names it
	Data       []byte
	Definition *pb.Definition // where the file came from; may be nil
}

// Info returns the file as the wire carries it.
func (sm *SourceMap) Info() *pb.SourceInfo {
	return &pb.SourceInfo{
		Filename:   sm.Filename,
		Language:   sm.Language,
		Data:       sm.Data,
		Definition: sm.Definition,
	}
}

// Location says that an operation was made from these ranges of the file. A
// nil SourceMap says nothing.
func (sm *SourceMap) Location(ranges []*pb.Range) ConstraintsOpt {
	return func(c *Constraints) {
		if sm != nil {
			c.locations = append(c.locations, location{sm, ranges})
		}
	}
}

type location struct {
	file   *SourceMap
	ranges []*pb.Range
}

// sourceCollector gathers the files and locations of a definition.
type sourceCollector struct {
	infos     []*pb.SourceInfo
	index     map[*SourceMap]int32
	locations map[string]*pb.Locations
}

func (c *sourceCollector) add(dgst digest.Digest, locs []location) {
	for _, l := range locs {
		i, ok := c.index[l.file]
		if !ok {
			i = c.addInfo(l.file.Info())
			if c.index == nil {
				c.index = map[*SourceMap]int32{}
			}
			c.index[l.file] = i
		}
		c.addLocation(string(dgst), &pb.Location{SourceIndex: i, Ranges: l.ranges})
	}
	if len(locs) == 0 {
		c.at(string(dgst))
	}
}

// addInfo returns the index of a file equal to info.
func (c *sourceCollector) addInfo(info *pb.SourceInfo) int32 {
	for i, old := range c.infos {
		if old.Filename == info.Filename && old.Language == info.Language &&
			bytes.Equal(old.Data, info.Data) && proto.Equal(old.Definition, info.Definition) {
			return int32(i)
		}
	}
	c.infos = append(c.infos, info)
	return int32(len(c.infos) - 1)
}

func (c *sourceCollector) addLocation(dgst string, l *pb.Location) {
	ll := c.at(dgst)
	ll.Locations = append(ll.Locations, l)
}

// at returns the locations of an op; every op has an entry, if an empty one.
func (c *sourceCollector) at(dgst string) *pb.Locations {
	if c.locations == nil {
		c.locations = map[string]*pb.Locations{}
	}
	ll, ok := c.locations[dgst]
	if !ok {
		ll = &pb.Locations{}
		c.locations[dgst] = ll
	}
	return ll
}

func (c *sourceCollector) toPB() *pb.Source {
	return &pb.Source{Infos: c.infos, Locations: c.locations}
}
