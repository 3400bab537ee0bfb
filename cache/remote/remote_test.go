package remote

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var made = time.Unix(1700000000, 123456789).UTC()

func dgst(s string) digest.Digest { return digest.FromString(s) }

func layerNamed(name string) cache.Layer {
	return cache.Layer{
		Blob:   ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: dgst("blob " + name), Size: int64(len(name))},
		DiffID: dgst("diff " + name),
	}
}

func stackOf(names ...string) Stack {
	s := Stack{CreatedAt: made}
	for _, n := range names {
		s.Blobs = append(s.Blobs, Describe(layerNamed(n), made))
	}
	return s
}

// project is a build of four steps: a source, a step on it, a copy of a file out
// of that, matched by content, and a step that has no result.
func project() (steps []*Step, results map[*Step]Stack) {
	source := &Step{Digest: digestOf(solver.RootKey(dgst("source"), 0))}
	content := &Step{Digest: digestOf(solver.ContentKey(dgst("content")))}
	run := &Step{Digest: digestOf(solver.RootKey(dgst("run"), 1)), Inputs: [][]Use{{{"", source}}}}
	file := &Step{Digest: digestOf(solver.RootKey(dgst("copy"), 0)), Inputs: [][]Use{{{dgst("selector"), run}, {"", content}}, {{"", source}}}}
	idle := &Step{Digest: digestOf(solver.RootKey(dgst("idle"), 0)), Inputs: [][]Use{{{"", file}}}}
	return []*Step{source, content, run, file, idle}, map[*Step]Stack{run: stackOf("base", "run"), file: stackOf("base", "copy")}
}

// blobs are what Form.Write has made, for Read.
type blobs map[digest.Digest][]byte

func (b blobs) add(list ...Blob) ocispec.Descriptor {
	for _, blob := range list {
		b[blob.Descriptor.Digest] = blob.Data
	}
	return list[len(list)-1].Descriptor
}

func (b blobs) read(desc ocispec.Descriptor) ([]byte, error) {
	if data, ok := b[desc.Digest]; ok {
		return data, nil
	}
	return nil, fmt.Errorf("no blob %s", desc.Digest)
}

// find returns the layers' diff IDs of what is found.
func find(t *testing.T, x *Index, l solver.Lookup) (keys []solver.Key, layers []digest.Digest) {
	t.Helper()
	found, err := x.Lookup(l)
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Records) == 0 {
		return found.Keys, nil
	}
	if !found.Records[0].CreatedAt.Equal(made) {
		t.Errorf("made at %s", found.Records[0].CreatedAt)
	}
	list, err := x.Layers(found.Records[0].Result)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range list {
		layers = append(layers, l.DiffID)
		if !CreatedAt(l.Blob).Equal(made) {
			t.Errorf("a layer made at %s", CreatedAt(l.Blob))
		}
	}
	return found.Keys, layers
}

// What one daemon writes, another finds: by definition, by content, by outputs
// and selectors, and nothing else; in every form.
// compat: EXP-090, EXP-091, EXP-092, EXP-093, EXP-094, EXP-096, EXP-100
func TestWriteAndRead(t *testing.T) {
	for name, form := range map[string]Form{
		"image manifest": {OCI: true}, "index": {Index: true, OCI: true}, "manifest list": {Index: true},
	} {
		t.Run(name, func(t *testing.T) {
			steps, results := project()
			c, descs := Encode(steps, results)
			if len(c.Records) != 4 || len(c.Layers) != 3 || len(descs) != 3 {
				t.Errorf("%d records, %d layers, %d blobs; want 4, 3, 3", len(c.Records), len(c.Layers), len(descs))
			}
			config, manifest, err := form.Write(c, descs)
			if err != nil {
				t.Fatal(err)
			}
			if config.Descriptor.MediaType != ConfigType {
				t.Errorf("the config is %s", config.Descriptor.MediaType)
			}
			b := blobs{}
			x, err := Read(b.add(config, manifest), b.read)
			if err != nil {
				t.Fatal(err)
			}
			checkProject(t, x)
		})
	}
}

func checkProject(t *testing.T, x *Index) {
	t.Helper()
	source := []solver.InputKey{{Key: solver.RootKey(dgst("source"), 0)}}
	run, layers := find(t, x, solver.Lookup{Op: dgst("run"), Output: 1, Inputs: [][]solver.InputKey{source}})
	if want := []digest.Digest{dgst("diff base"), dgst("diff run")}; !slices.Equal(layers, want) || len(run) != 1 {
		t.Errorf("run has %v under %d keys", layers, len(run))
	}
	byDefinition := []solver.InputKey{{Key: run[0], Selector: dgst("selector")}}
	byContent := []solver.InputKey{{Key: solver.ContentKey(dgst("content"))}}
	for _, way := range [][]solver.InputKey{byDefinition, byContent, append(byDefinition, byContent...)} {
		_, layers := find(t, x, solver.Lookup{Op: dgst("copy"), Inputs: [][]solver.InputKey{way, source}})
		if want := []digest.Digest{dgst("diff base"), dgst("diff copy")}; !slices.Equal(layers, want) {
			t.Errorf("copy has %v", layers)
		}
	}
	for what, l := range map[string]solver.Lookup{
		"another op":       {Op: dgst("walk"), Output: 1, Inputs: [][]solver.InputKey{source}},
		"another output":   {Op: dgst("run"), Output: 0, Inputs: [][]solver.InputKey{source}},
		"another selector": {Op: dgst("copy"), Inputs: [][]solver.InputKey{{{Key: run[0]}}, source}},
		"an input less":    {Op: dgst("copy"), Inputs: [][]solver.InputKey{byContent, nil}},
		"turned round":     {Op: dgst("copy"), Inputs: [][]solver.InputKey{source, byContent}},
	} {
		if _, layers := find(t, x, l); layers != nil {
			t.Errorf("%s finds %v", what, layers)
		}
	}
}

// compat: EXP-095, EXP-097, EXP-098
func TestInline(t *testing.T) {
	steps, _ := project()
	records, err := EncodeInline(steps, map[*Step]Place{steps[2]: {[]int{0, 1}, made}, steps[3]: {[]int{0, 2}, made}})
	if err != nil {
		t.Fatal(err)
	}
	var layers []ocispec.Descriptor
	var diffIDs []digest.Digest
	var history []ocispec.History
	for _, name := range []string{"base", "run", "copy"} {
		l := layerNamed(name)
		layers, diffIDs = append(layers, l.Blob), append(diffIDs, l.DiffID)
		history = append(history, ocispec.History{EmptyLayer: true}, ocispec.History{Created: &made})
	}
	image := func(cache []byte) (config, manifest Blob) {
		config, err := encode(ocispec.MediaTypeImageConfig, map[string]any{
			"rootfs": ocispec.RootFS{DiffIDs: diffIDs}, "history": history, InlineField: cache,
		})
		if err != nil {
			t.Fatal(err)
		}
		manifest, err = encode(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config.Descriptor, Layers: layers})
		if err != nil {
			t.Fatal(err)
		}
		return config, manifest
	}
	b := blobs{}
	config, manifest := image(records)
	root := b.add(config, manifest)
	x, err := Read(root, b.read)
	if err != nil {
		t.Fatal(err)
	}
	checkProject(t, x)

	config, manifest = image(nil)
	without := b.add(config, manifest)
	if _, err := Read(without, b.read); !errors.Is(err, ErrNone) {
		t.Errorf("an image without a cache: %v", err)
	}
	index, err := encode(ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{without, root}})
	if err != nil {
		t.Fatal(err)
	}
	if x, err = Read(b.add(index), b.read); err != nil {
		t.Fatal(err)
	}
	checkProject(t, x)

	if records, err := EncodeInline(steps, nil); records != nil || err != nil {
		t.Errorf("a cache of nothing: %s, %v", records, err)
	}
}

// The order in which steps are given, and vertices that are the same step twice,
// change nothing. compat: EXP-096
func TestSameBytes(t *testing.T) {
	var first string
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		steps, results := project()
		twins, more := project()
		for s, stack := range more {
			results[s] = stack
		}
		// Sources may come in any order, and vertices in any that has inputs first.
		for _, list := range [][]*Step{steps, twins} {
			if r.IntN(2) == 0 {
				list[0], list[1] = list[1], list[0]
			}
		}
		if r.IntN(2) == 0 {
			steps, twins = twins, steps
		}
		n := r.IntN(len(steps) + 1)
		steps = slices.Concat(steps[:n], twins, steps[n:])
		c, descs := Encode(steps, results)
		_, manifest, err := Form{OCI: true}.Write(c, descs)
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = string(manifest.Data)
		}
		if string(manifest.Data) != first || len(c.Records) != 4 {
			t.Fatalf("%d records:\n%s\nbefore:\n%s", len(c.Records), manifest.Data, first)
		}
	}
}

func TestEncodeOfNothing(t *testing.T) {
	steps, _ := project()
	if c, blobs := Encode(steps, nil); len(c.Records)+len(c.Layers)+len(blobs) != 0 {
		t.Errorf("%v", c)
	}
}

// What makes no sense is refused by an error that says where.
func TestNonsense(t *testing.T) {
	good := string(dgst("x"))
	for want, text := range map[string]string{
		"isn't well-formed":        `{`,
		"layer 0 is its own":       `{"layers":[{"blob":"b"}]}`,
		"layer 1 is its own":       `{"layers":[{"blob":"b","parent":-1},{"parent":2},{"parent":1}]}`,
		"has the parent 7 of 1":    `{"layers":[{"parent":7}]}`,
		"has the parent -2 of 1":   `{"layers":[{"parent":-2}]}`,
		`digest "nonsense"`:        `{"records":[{"digest":"nonsense"}]}`,
		"isn't one of sha256":      `{"records":[{"digest":"` + digest.SHA512.FromString("x").String() + `"}]}`,
		"cache record 1: nothing":  `{"records":[{"digest":"GOOD"},{"digest":"GOOD","inputs":[[]]}]}`,
		"input 1 is record 9 of 1": `{"records":[{"digest":"GOOD","inputs":[[{"link":0}],[{"link":9}]]}]}`,
		"is record -1 of 1":        `{"records":[{"digest":"GOOD","inputs":[[{"link":-1}]]}]}`,
		"is layer 0 of 0":          `{"records":[{"digest":"GOOD","layers":[{"layer":0}]}]}`,
		"is layer -1 of 1":         `{"layers":[{"parent":-1}],"records":[{"digest":"GOOD","layers":[{"layer":-1}]}]}`,
		"is layer 3 of 1":          `{"layers":[{"parent":-1}],"records":[{"digest":"GOOD","chains":[{"layers":[0,3]}]}]}`,
		"1 cache records are":      `{"records":[{"digest":"GOOD","inputs":[[{"link":0}]]}]}`,
		"2 cache records are":      `{"records":[{"digest":"GOOD"},{"digest":"GOOD","inputs":[[{"link":0},{"link":2}]]},{"digest":"GOOD","inputs":[[{"link":1}]]}]}`,
	} {
		b := blobs{}
		config := Blob{Data: []byte(strings.ReplaceAll(text, "GOOD", good))}
		config.Descriptor = ocispec.Descriptor{MediaType: ConfigType, Digest: digest.FromBytes(config.Data), Size: int64(len(config.Data))}
		manifest, err := encode(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config.Descriptor})
		if err != nil {
			t.Fatal(err)
		}
		x, err := Read(b.add(config, manifest), b.read)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
		if x != nil && (len(x.links) > 0 || x.Results() > 0) {
			t.Errorf("%s: something of it is in the index", text)
		}
	}
}

// A result of which a layer isn't there, or isn't named with its diff ID, is none;
// unknown fields don't matter. compat: EXP-099
func TestIncomplete(t *testing.T) {
	text := `{"new":1,"layers":[{"blob":"A","parent":-1,"x":{}},{"blob":"B","parent":0},{"blob":"C","parent":1}],"records":[` +
		`{"digest":"R","layers":[{"layer":0,"createdat":"2023-11-14T22:13:20.123456789Z"},{"layer":2}],"chains":[{"layers":[0,1]},{"layers":[]},{"layers":[2,0]}],"new":[]}]}`
	text = strings.NewReplacer("A", dgst("blob a").String(), "B", dgst("blob b").String(), "C", dgst("blob c").String(), `"R"`, `"`+digestOf(solver.RootKey(dgst("op"), 0)).String()+`"`).Replace(text)
	var c Config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	x := newIndex()
	if err := x.Add(c, []ocispec.Descriptor{Describe(layerNamed("a"), made), Describe(layerNamed("c"), made)}); err != nil {
		t.Fatal(err)
	}
	found, err := x.Lookup(solver.Lookup{Op: dgst("op"), Roots: []solver.Key{solver.RootKey(dgst("op"), 0)}})
	if err != nil {
		t.Fatal(err)
	}
	var got []int
	for _, r := range found.Records {
		layers, err := x.Layers(r.Result)
		if err != nil && !errors.Is(err, solver.ErrNoResult) {
			t.Error(err)
		}
		got = append(got, len(layers))
	}
	// The newest first: layer 0; then 2 without its parent; then the chain 2, 0.
	if !reflect.DeepEqual(got, []int{1, 0, 2}) {
		t.Errorf("results have %v layers", got)
	}
	for _, id := range []string{"", "x", "-1", "99"} {
		if _, err := x.Layers(id); !errors.Is(err, solver.ErrNoResult) {
			t.Errorf("result %q: %v", id, err)
		}
	}
}

// Whatever a config says, reading it, asking it and taking results out of it ends
// without harm; what is accepted can be asked for everything in it.
func FuzzRead(f *testing.F) {
	steps, results := project()
	c, _ := Encode(steps, results)
	seed, err := json.Marshal(c)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte(`{"layers":[{"parent":0}],"records":[{"digest":"sha256:00","inputs":[[{"link":0}]]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data)
		if err != nil {
			return
		}
		x := newIndex()
		var there []ocispec.Descriptor
		for i, l := range c.Layers {
			if i%3 != 2 {
				there = append(there, ocispec.Descriptor{Digest: l.Blob})
			}
		}
		if err := x.Add(c, there); err != nil {
			if x.Results() > 0 || len(x.links) > 0 {
				t.Fatal("something of it is in the index")
			}
			return
		}
		for i := range x.Results() {
			if _, err := x.Layers(fmt.Sprint(i)); err != nil && !errors.Is(err, solver.ErrNoResult) {
				t.Fatal(err)
			}
		}
		for from, links := range x.links {
			for by := range links {
				l := solver.Lookup{Op: digest.Digest("no such op"), Inputs: make([][]solver.InputKey, by.input+1)}
				l.Inputs[by.input] = []solver.InputKey{{Key: from, Selector: by.selector}}
				if _, err := x.Lookup(l); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
