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
		alive, inUse  []string
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
		"the oldest living record accounts for a blob": {
			in:    []named{{id: "dead", fact: fact{blobs: []digest.Digest{d("x")}}}, {id: "a", fact: fact{kept: true, blobs: []digest.Digest{d("x")}}}, {id: "b", fact: fact{kept: true, blobs: []digest.Digest{d("x"), d("y")}}}},
			alive: []string{"a", "b"}, blobs: []string{"x=a", "y=b"},
		},
	}
	names := map[digest.Digest]string{d("x"): "x", d("y"): "y"}
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
				blobs = append(blobs, names[b]+"="+tc.in[owner].id)
			}
			slices.Sort(blobs)
			for what, pair := range map[string][2][]string{
				"alive": {sorted(v.alive), tc.alive}, "in use": {sorted(v.inUse), tc.inUse},
				"broken": {sorted(v.broken), tc.broken}, "blobs": {blobs, tc.blobs},
			} {
				if !slices.Equal(pair[0], pair[1]) {
					t.Errorf("%s: got %v, want %v", what, pair[0], pair[1])
				}
			}
		})
	}
}
