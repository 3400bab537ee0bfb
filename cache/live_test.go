package cache

import (
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

// named is a record of a test, with what it needs by name.
type named struct {
	id    string
	needs []string
	fact
}

func TestLiveness(t *testing.T) {
	d := func(s string) digest.Digest { return digest.FromString(s) }
	tests := map[string]struct {
		in            []named
		images        []Image
		holds         []digest.Digest
		alive, inUse  []string
		shared        []string
		broken, blobs []string // blobs as "blob=owner"
	}{
		"nothing keeps it": {in: []named{{id: "a"}}},
		"a key's result keeps it and what is below": {
			in:    []named{{id: "a"}, {id: "b", needs: []string{"a"}, fact: fact{kept: true}}, {id: "c", needs: []string{"b"}}},
			alive: []string{"a", "b"},
		},
		"a handle makes all below in use": { // compat: CTL-104
			in:    []named{{id: "a", fact: fact{kept: true}}, {id: "b", needs: []string{"a"}, fact: fact{kept: true}}, {id: "c", needs: []string{"b"}, fact: fact{held: true}}, {id: "d", needs: []string{"a"}, fact: fact{kept: true}}},
			alive: []string{"a", "b", "c", "d"}, inUse: []string{"a", "b", "c"},
		},
		"broken takes what builds on it along": {
			in:    []named{{id: "a", fact: fact{kept: true, broken: true}}, {id: "b", needs: []string{"a"}, fact: fact{kept: true}}, {id: "c", fact: fact{kept: true}}},
			alive: []string{"c"}, broken: []string{"a", "b"},
		},
		"a missing parent breaks": {
			in:     []named{{id: "b", needs: []string{"a"}, fact: fact{kept: true}}},
			broken: []string{"b"},
		},
		"an image shares and keeps": { // compat: CTL-105
			in:     []named{{id: "a"}, {id: "b", needs: []string{"a"}}, {id: "c", fact: fact{kept: true}}},
			images: []Image{{Refs: []string{"b", "none"}}},
			alive:  []string{"a", "b", "c"}, shared: []string{"a", "b"},
		},
		"the oldest living record accounts for a blob": {
			in:     []named{{id: "dead", fact: fact{blobs: []digest.Digest{d("x")}}}, {id: "a", fact: fact{kept: true, blobs: []digest.Digest{d("x")}}}, {id: "b", fact: fact{kept: true, blobs: []digest.Digest{d("x"), d("y")}}}},
			images: []Image{{Blobs: []digest.Digest{d("y"), d("z")}}},
			holds:  []digest.Digest{d("h")},
			alive:  []string{"a", "b"}, blobs: []string{"h=", "x=a", "y=b", "z="},
		},
	}
	names := map[digest.Digest]string{d("x"): "x", d("y"): "y", d("z"): "z", d("h"): "h"}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			at := func(id string) int { return slices.IndexFunc(tc.in, func(n named) bool { return n.id == id }) }
			var c contents
			for _, n := range tc.in {
				for _, need := range n.needs {
					n.fact.needs = append(n.fact.needs, at(need))
				}
				c.records = append(c.records, n.fact)
			}
			c.mark(tc.images, tc.holds, at)
			v := liveness(c)
			sorted := func(marked []bool) (ids []string) {
				for i, n := range tc.in {
					if marked[i] {
						ids = append(ids, n.id)
					}
				}
				return ids
			}
			var blobs []string
			for b, owner := range v.owner {
				text := names[b] + "="
				if owner != nobody {
					text += tc.in[owner].id
				}
				blobs = append(blobs, text)
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
