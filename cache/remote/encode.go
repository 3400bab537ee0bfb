package remote

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/kilnbuild/kiln/cache"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Stack is the result of a step: its layers, lowest first, and when it was made.
type Stack struct {
	Blobs     []ocispec.Descriptor // as Describe makes them
	CreatedAt time.Time
}

// Describe is how a cache names a layer that was made at a time.
func Describe(l cache.Layer, made time.Time) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: l.Blob.MediaType, Digest: l.Blob.Digest, Size: l.Blob.Size, URLs: l.Blob.URLs}
	d.Annotations = map[string]string{labels.LabelUncompressed: l.DiffID.String()}
	if !made.IsZero() {
		d.Annotations[createdAt] = made.UTC().Format(time.RFC3339Nano)
	}
	return d
}

// Encode makes a config of steps, inputs first, and the results that there are,
// and returns the blobs that it names. Records that lead to no result are left
// out. The same steps and results give the same bytes, whatever their order.
func Encode(steps []*Step, results map[*Step]Stack) (Config, []ocispec.Descriptor) {
	records, place := arrange(steps, func(s *Step) bool { return len(results[s].Blobs) > 0 })
	layers := newLayerTable()
	for s, stack := range results {
		for _, b := range stack.Blobs {
			layers.blobs[b.Digest] = b
		}
		if i, ok := place[s]; ok && len(stack.Blobs) > 0 {
			records[i].Results = append(records[i].Results, Result{layers.add(stack.Blobs), stack.CreatedAt.UTC()})
		}
	}
	c := Config{Records: records}
	var moved []int
	c.Layers, moved = layers.sorted()
	for i := range records {
		for n, r := range records[i].Results {
			records[i].Results[n].Layer = moved[r.Layer]
		}
		records[i].Results = newest(records[i].Results)
	}
	blobs := slices.SortedFunc(maps.Values(layers.blobs), func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	return c, blobs
}

// newest leaves the last result of a step that several vertices stand for.
func newest(results []Result) []Result {
	if len(results) < 2 {
		return results
	}
	return []Result{slices.MaxFunc(results, func(a, b Result) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.Layer, b.Layer))
	})}
}

// Place is the result of a step by the layers of an image, lowest first.
type Place struct {
	Layers    []int
	CreatedAt time.Time
}

// EncodeInline makes what stands in InlineField, as JSON, of steps, inputs first,
// and those results that an image has the layers of; nil if there are none.
func EncodeInline(steps []*Step, results map[*Step]Place) ([]byte, error) {
	records, place := arrange(steps, func(s *Step) bool { return len(results[s].Layers) > 0 })
	if len(records) == 0 {
		return nil, nil
	}
	for s, p := range results {
		i, ok := place[s]
		if !ok || len(p.Layers) == 0 {
			continue
		}
		// Of several vertices that are the same step any will do: the image has it.
		records[i].Results, records[i].Chains = nil, nil
		if inOrder(p.Layers) {
			records[i].Results = []Result{{len(p.Layers) - 1, p.CreatedAt.UTC()}}
		} else {
			records[i].Chains = []Chain{{p.Layers, p.CreatedAt.UTC()}}
		}
	}
	data, err := json.Marshal(records)
	if err != nil {
		return nil, fmt.Errorf("encode the inline cache: %w", err)
	}
	return data, nil
}

// inOrder reports whether layers are an image's, from the lowest up.
func inOrder(layers []int) bool {
	for i, l := range layers {
		if l != i {
			return false
		}
	}
	return true
}

// arrange makes records of the steps that lead to one with a result, and tells
// where each is.
func arrange(steps []*Step, hasResult func(*Step) bool) (records []Record, place map[*Step]int) {
	useful := map[*Step]bool{}
	for _, s := range slices.Backward(steps) {
		if !useful[s] && !hasResult(s) {
			continue
		}
		useful[s] = true
		for _, alternatives := range s.Inputs {
			for _, u := range alternatives {
				useful[u.Step] = true
			}
		}
	}
	steps = slices.DeleteFunc(slices.Clone(steps), func(s *Step) bool { return !useful[s] })
	identity := identities(steps)
	sorted := slices.Clone(steps)
	slices.SortFunc(sorted, func(a, b *Step) int {
		return cmp.Or(cmp.Compare(a.Digest, b.Digest), strings.Compare(identity[a], identity[b]))
	})
	place = map[*Step]int{}
	var first []*Step // of those that are the same record
	for i, s := range sorted {
		if i == 0 || identity[s] != identity[sorted[i-1]] {
			first = append(first, s)
		}
		place[s] = len(first) - 1
	}
	for _, s := range first {
		records = append(records, Record{Digest: s.Digest, Inputs: linksOf(s, place)})
	}
	return records, place
}

func linksOf(s *Step, place map[*Step]int) (out [][]Link) {
	for _, alternatives := range s.Inputs {
		var links []Link
		for _, u := range alternatives {
			links = append(links, Link{string(u.Selector), place[u.Step]})
		}
		slices.SortFunc(links, func(a, b Link) int {
			return cmp.Or(cmp.Compare(a.Record, b.Record), cmp.Compare(a.Selector, b.Selector))
		})
		out = append(out, slices.Compact(links))
	}
	return out
}

// identities are the same for steps that are the same record.
func identities(steps []*Step) map[*Step]string {
	out := make(map[*Step]string, len(steps))
	for _, s := range steps {
		h := sha256.New()
		fmt.Fprintf(h, "%s\n", s.Digest)
		for i, alternatives := range s.Inputs {
			var sums []string
			for _, u := range alternatives {
				sums = append(sums, fmt.Sprintf("%d %x %q\n", i, out[u.Step], u.Selector))
			}
			slices.Sort(sums)
			for _, sum := range slices.Compact(sums) {
				h.Write([]byte(sum))
			}
		}
		out[s] = string(h.Sum(nil))
	}
	return out
}

// layerTable collects layers.
type layerTable struct {
	blobs  map[digest.Digest]ocispec.Descriptor
	index  map[Layer]int
	layers []Layer
	stacks []string // what each layer stands on, itself included, hashed
}

func newLayerTable() *layerTable {
	return &layerTable{blobs: map[digest.Digest]ocispec.Descriptor{}, index: map[Layer]int{}}
}

// add returns the index of the topmost layer of a stack.
func (t *layerTable) add(stack []ocispec.Descriptor) int {
	at, below := -1, ""
	for _, b := range stack {
		l := Layer{Blob: b.Digest, Parent: at}
		i, ok := t.index[l]
		if !ok {
			i = len(t.layers)
			t.index[l] = i
			t.layers = append(t.layers, l)
			sum := sha256.Sum256([]byte(below + b.Digest.String()))
			t.stacks = append(t.stacks, string(sum[:]))
		}
		at, below = i, t.stacks[i]
	}
	return at
}

// sorted returns the layers in an order that doesn't depend on that in which they
// were added, and where each has gone.
func (t *layerTable) sorted() (layers []Layer, moved []int) {
	order := make([]int, len(t.layers))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(t.layers[a].Blob, t.layers[b].Blob), strings.Compare(t.stacks[a], t.stacks[b]))
	})
	moved = make([]int, len(order))
	for to, from := range order {
		moved[from] = to
	}
	for _, from := range order {
		l := t.layers[from]
		if l.Parent >= 0 {
			l.Parent = moved[l.Parent]
		}
		layers = append(layers, l)
	}
	return layers, moved
}
