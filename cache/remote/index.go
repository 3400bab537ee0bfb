package remote

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Index is the key graph of one or more configs: a solver.KeyIndex. The records
// that it finds are named for Layers. Once it is filled, its methods may be
// called at once.
type Index struct {
	links   map[solver.Key]map[link][]solver.Key
	records map[solver.Key][]solver.Record
	results []result // by name
	blobs   []ocispec.Descriptor
}

var _ solver.KeyIndex = (*Index)(nil)

// link tells the links of a key apart.
type link struct {
	step     solver.Key // that a record's digest stands for
	selector digest.Digest
	input    int
}

// result is a layer with its parents, or layers one by one.
type result struct {
	top   *layer
	chain []*layer
}

type layer struct {
	blob   ocispec.Descriptor
	parent *layer
}

// newIndex returns an empty one.
func newIndex() *Index {
	return &Index{links: map[solver.Key]map[link][]solver.Key{}, records: map[solver.Key][]solver.Record{}}
}

// Add adds what c says. blobs are those that are there; a result that needs
// others is left out. It is an error if c makes no sense, and nothing of it is
// added then.
func (x *Index) Add(c Config, blobs []ocispec.Descriptor) error {
	order, err := c.check()
	if err != nil {
		return err
	}
	layers := layersOf(c, blobs)
	keys := make([]solver.Key, len(c.Records))
	for _, i := range order {
		keys[i] = x.addRecord(c.Records[i], keys)
		x.addResults(keys[i], c.Records[i], layers)
	}
	x.blobs = append(x.blobs, blobs...)
	return nil
}

// layersOf are the layers of c that can be had, nil for the others.
func layersOf(c Config, blobs []ocispec.Descriptor) []*layer {
	there := map[digest.Digest]ocispec.Descriptor{}
	for _, b := range blobs {
		there[b.Digest] = b
	}
	out := make([]*layer, len(c.Layers))
	for i, l := range c.Layers {
		if desc, ok := there[l.Blob]; ok {
			out[i] = &layer{blob: desc}
		}
	}
	for i, l := range c.Layers {
		if l.Parent >= 0 && out[i] != nil {
			out[i].parent = out[l.Parent]
			if out[i].parent == nil {
				out[i].parent = missing
			}
		}
	}
	return out
}

// missing is the parent of layers that can't be had with their parents.
var missing = &layer{}

// addRecord adds the links to r, whose inputs have been added, and returns its
// key.
func (x *Index) addRecord(r Record, keys []solver.Key) solver.Key {
	step, _ := keyOf(r.Digest) // was checked
	if len(r.Inputs) == 0 {
		return step
	}
	key := name(step, r.Inputs, keys)
	for i, alternatives := range r.Inputs {
		for _, l := range alternatives {
			from, by := keys[l.Record], link{step, digest.Digest(l.Selector), i}
			if x.links[from] == nil {
				x.links[from] = map[link][]solver.Key{}
			}
			if !slices.Contains(x.links[from][by], key) {
				x.links[from][by] = append(x.links[from][by], key)
			}
		}
	}
	return key
}

// name is the key of a record with inputs: the same for the same record, however
// the config that it stands in is ordered.
func name(step solver.Key, inputs [][]Link, keys []solver.Key) solver.Key {
	h := sha256.New()
	h.Write([]byte("imported\x00"))
	h.Write(step[:])
	for i, alternatives := range inputs {
		var sums []string
		for _, l := range alternatives {
			sums = append(sums, string(keys[l.Record][:])+l.Selector)
		}
		slices.Sort(sums)
		for _, s := range slices.Compact(sums) {
			var frame [16]byte
			binary.BigEndian.PutUint64(frame[:], uint64(i))
			binary.BigEndian.PutUint64(frame[8:], uint64(len(s)))
			h.Write(frame[:])
			h.Write([]byte(s))
		}
	}
	return solver.Key(h.Sum(nil))
}

func (x *Index) addResults(key solver.Key, r Record, layers []*layer) {
	add := func(res result, created time.Time) {
		x.records[key] = append(x.records[key], solver.Record{Result: strconv.Itoa(len(x.results)), CreatedAt: created})
		x.results = append(x.results, res)
	}
	for _, res := range r.Results {
		if l := layers[res.Layer]; l != nil {
			add(result{top: l}, res.CreatedAt)
		}
	}
	for _, c := range r.Chains {
		var chain []*layer
		for _, i := range c.Layers {
			chain = append(chain, layers[i])
		}
		if len(chain) > 0 && !slices.Contains(chain, nil) {
			add(result{chain: chain}, c.CreatedAt)
		}
	}
}

// Lookup implements solver.KeyIndex.
func (x *Index) Lookup(l solver.Lookup) (solver.Found, error) {
	step := solver.RootKey(l.Op, l.Output)
	return keygraph.Resolve(l, func(input int, from solver.InputKey) []solver.Key {
		return x.links[from.Key][link{step, from.Selector, input}]
	}, func(k solver.Key) []solver.Record { return x.records[k] }), nil
}

// Layers returns those of a record that Lookup has found, lowest first;
// solver.ErrNoResult if they can't be had.
func (x *Index) Layers(id string) ([]cache.Layer, error) {
	n, err := strconv.Atoi(id)
	if err != nil || n < 0 || n >= len(x.results) {
		return nil, solver.ErrNoResult
	}
	chain := x.results[n].chain
	for l := x.results[n].top; l != nil; l = l.parent {
		if l == missing {
			return nil, solver.ErrNoResult
		}
		chain = append(chain, l)
	}
	if x.results[n].top != nil {
		slices.Reverse(chain)
	}
	out := make([]cache.Layer, len(chain))
	for i, l := range chain {
		out[i] = cache.Layer{Blob: l.blob, DiffID: digest.Digest(l.blob.Annotations[labels.LabelUncompressed])}
	}
	return out, nil
}

// Blobs are those that the results are made of, and maybe others.
func (x *Index) Blobs() []digest.Digest {
	out := make([]digest.Digest, len(x.blobs))
	for i, b := range x.blobs {
		out[i] = b.Digest
	}
	return out
}

// Results is how many results there are.
func (x *Index) Results() int { return len(x.results) }

// createdAt is how a layer's descriptor says when it was made.
const createdAt = "buildkit/createdat"

// CreatedAt is when the layer was made, as far as its descriptor says so.
func CreatedAt(blob ocispec.Descriptor) (t time.Time) {
	if err := t.UnmarshalText([]byte(blob.Annotations[createdAt])); err != nil {
		return time.Time{}
	}
	return t
}
