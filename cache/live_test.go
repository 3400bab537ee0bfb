package cache

import (
	"maps"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestLiveness(t *testing.T) {
	d := func(s string) digest.Digest { return digest.FromString(s) }
	tests := map[string]struct {
		in            contents
		alive, inUse  []string
		shared        []string
		broken, blobs []string // blobs as "blob=owner"
	}{
		"nothing keeps it": {in: contents{records: []fact{{id: "a"}}}},
		"a key's result keeps it and what is below": {
			in:    contents{records: []fact{{id: "a"}, {id: "b", needs: []string{"a"}, kept: true}, {id: "c", needs: []string{"b"}}}},
			alive: []string{"a", "b"},
		},
		"a handle makes all below in use": { // compat: CTL-104
			in:    contents{records: []fact{{id: "a", kept: true}, {id: "b", needs: []string{"a"}, kept: true}, {id: "c", needs: []string{"b"}, held: true}, {id: "d", needs: []string{"a"}, kept: true}}},
			alive: []string{"a", "b", "c", "d"}, inUse: []string{"a", "b", "c"},
		},
		"broken takes what builds on it along": {
			in:    contents{records: []fact{{id: "a", kept: true, broken: true}, {id: "b", needs: []string{"a"}, kept: true}, {id: "c", kept: true}}},
			alive: []string{"c"}, broken: []string{"a", "b"},
		},
		"a missing parent breaks": {
			in:     contents{records: []fact{{id: "b", needs: []string{"a"}, kept: true}}},
			broken: []string{"b"},
		},
		"an image shares and keeps": { // compat: CTL-105
			in: contents{
				records: []fact{{id: "a"}, {id: "b", needs: []string{"a"}}, {id: "c", kept: true}},
				images:  map[string]Image{"i": {Refs: []string{"b", "none"}}},
			},
			alive: []string{"a", "b", "c"}, shared: []string{"a", "b"},
		},
		"the oldest living record accounts for a blob": {
			in: contents{
				records: []fact{{id: "dead", blobs: []digest.Digest{d("x")}}, {id: "a", kept: true, blobs: []digest.Digest{d("x")}}, {id: "b", kept: true, blobs: []digest.Digest{d("x"), d("y")}}},
				images:  map[string]Image{"i": {Blobs: []digest.Digest{d("y"), d("z")}}},
				holds:   map[digest.Digest]int{d("h"): 1},
			},
			alive: []string{"a", "b"}, blobs: []string{"h=", "x=a", "y=b", "z="},
		},
	}
	names := map[digest.Digest]string{d("x"): "x", d("y"): "y", d("z"): "z", d("h"): "h"}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			v := liveness(tc.in)
			sorted := func(m map[string]bool) []string { return slices.Sorted(maps.Keys(m)) }
			var blobs []string
			for b, owner := range v.owner {
				blobs = append(blobs, names[b]+"="+owner)
			}
			slices.Sort(blobs)
			for what, pair := range map[string][2][]string{
				"alive": {sorted(v.alive), tc.alive}, "in use": {sorted(v.inUse), tc.inUse},
				"shared": {sorted(v.shared), tc.shared}, "broken": {sorted(v.broken), tc.broken}, "blobs": {blobs, tc.blobs},
			} {
				if !slices.Equal(pair[0], pair[1]) {
					t.Errorf("%s: got %v, want %v", what, pair[0], pair[1])
				}
			}
		})
	}
}
