package remotecache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Exporter keeps the cache of a build somewhere.
type Exporter struct {
	// Inline says that the cache goes into the images that the build makes: Inline
	// makes it, not Export.
	Inline bool
	// IgnoreError says that a build doesn't fail because the export does.
	IgnoreError bool

	name        string
	store       store
	form        remote.Form
	compression cache.Compression
	max         bool // all results rather than those that the build's results are made of
}

// NewExporter returns the exporter of the given type (EXP-070 to -073). Unknown
// types and bad attributes are errors that name them; other attributes have no
// effect.
func NewExporter(cfg Config, typ string, attrs map[string]string) (*Exporter, error) {
	e := &Exporter{compression: cache.Compression{OCI: true}}
	var err error
	switch typ {
	case "inline":
		e.name, e.Inline = "exporting inline cache", true
		return e, nil
	case "registry":
		e.name = "exporting cache to registry"
		e.store, err = newInRegistry(cfg, attrs)
	case "local":
		if attrs["dest"] == "" {
			err = errors.New("dest is missing: dest=DIR")
		}
		e.name = "exporting cache to client directory"
		e.store = &inDirectory{sessions: cfg.Sessions, dir: attrs["dest"]}
	default:
		err = unknown(typ, "export", "registry, local and inline")
	}
	if err != nil {
		return nil, err
	}
	return e, e.parse(attrs)
}

func (e *Exporter) parse(attrs map[string]string) error {
	c := &e.compression
	image, given := true, attrs["image-manifest"] != ""
	err := flags(attrs, map[string]*bool{
		"oci-mediatypes": &c.OCI, "image-manifest": &image, "force-compression": &c.Force, "ignore-error": &e.IgnoreError,
	})
	if err != nil {
		return err
	}
	switch {
	case !c.OCI && image && given:
		return errors.New("image-manifest=true needs oci-mediatypes=true")
	case !c.OCI:
		image = false
	}
	e.form = remote.Form{Index: !image, OCI: c.OCI}
	switch mode := attrs["mode"]; mode {
	case "", "min":
	case "max":
		e.max = true
	default:
		return fmt.Errorf("mode: %q is neither min nor max", mode)
	}
	c.Type = attrs["compression"]
	if v, ok := attrs["compression-level"]; ok {
		level, err := strconv.Atoi(v)
		if err != nil {
			return fmt.Errorf("compression-level: %q is not a number", v)
		}
		c.Level = &level
	}
	if c.Type == "zstd" && !c.OCI {
		return errors.New("compression zstd needs oci-mediatypes=true: Docker's media types don't know it")
	}
	return c.Check()
}

// Name is shown as the export's vertex.
func (e *Exporter) Name() string { return e.name }

// Build is what there is to export.
type Build struct {
	Client Client
	Steps  []*remote.Step // inputs first
	// Results are what the build was for; they stay the caller's.
	Results []*cache.Ref
	// Load returns what a record of a step names.
	Load func(context.Context, solver.Record) (*cache.Ref, error)
}

// Export writes the cache of b, and returns what the client is told (EXP-081).
// ctx carries the vertex's progress.Scope. Results that are lost are left out.
func (e *Exporter) Export(ctx context.Context, b Build) (map[string]string, error) {
	x := &export{Exporter: e, build: b, found: map[*remote.Step]found{}, layers: map[string]packed{}, lost: map[digest.Digest]bool{}}
	defer x.release()
	done := progress.From(ctx).Begin("preparing build cache for export")
	if err := x.find(ctx); err != nil {
		return nil, err
	}
	if err := x.pack(ctx); err != nil {
		return nil, err
	}
	done()
	defer progress.From(ctx).Begin("sending cache export")()
	if err := x.sendLayers(ctx); err != nil {
		return nil, err
	}
	return x.sendConfig(ctx)
}

// export is one run of an Exporter.
type export struct {
	*Exporter
	build  Build
	found  map[*remote.Step]found
	order  []*remote.Step // those that something was found of
	layers map[string]packed

	mu   sync.Mutex // guards lost
	lost map[digest.Digest]bool
}

// found is a result of a step.
type found struct {
	ref    *cache.Ref
	record solver.Record
	ids    []string // of its layers, lowest first
}

// packed is a layer as a blob.
type packed struct {
	layer cache.Layer
	desc  ocispec.Descriptor // as caches name it
	owner *cache.Ref
}

func (x *export) release() {
	for _, f := range x.found {
		f.ref.Release()
	}
}

// find looks for a result of each step that can be had.
func (x *export) find(ctx context.Context) error {
	wanted := idsOf(x.build.Results)
	for _, s := range x.build.Steps {
		for _, rec := range s.Results {
			ref, err := x.build.Load(ctx, rec)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				continue // it is gone, and makes room for the next
			}
			f := found{ref: ref, record: rec, ids: ids(ref)}
			if len(f.ids) == 0 || !x.max && !within(f.ids, wanted) {
				ref.Release()
				break
			}
			x.found[s] = f
			x.order = append(x.order, s)
			break
		}
	}
	return nil
}

func ids(ref *cache.Ref) (out []string) {
	for _, o := range ref.Origins() {
		out = append(out, o.ID)
	}
	return out
}

// idsOf numbers the layers of refs, lowest first.
func idsOf(refs []*cache.Ref) map[string]int {
	out := map[string]int{}
	for _, r := range refs {
		for i, id := range ids(r) {
			if _, ok := out[id]; !ok {
				out[id] = i
			}
		}
	}
	return out
}

func within(ids []string, in map[string]int) bool {
	return !slices.ContainsFunc(ids, func(id string) bool { _, ok := in[id]; return !ok })
}

// pack makes the layers blobs. Most results are made of others, so few have to be
// asked; those of one that turns out lost are asked one by one.
func (x *export) pack(ctx context.Context) error {
	bad := map[*cache.Ref]bool{}
	for {
		var refs []*cache.Ref
		covered := map[string]int{}
		for _, s := range slices.Backward(x.order) {
			f := x.found[s]
			if bad[f.ref] || within(f.ids, covered) || x.packed(f.ids) {
				continue
			}
			refs = append(refs, f.ref)
			for i, id := range f.ids {
				covered[id] = i
			}
		}
		if len(refs) == 0 {
			return nil
		}
		if err := x.packAll(ctx, refs, bad); err != nil {
			return err
		}
	}
}

func (x *export) packed(ids []string) bool {
	return !slices.ContainsFunc(ids, func(id string) bool { _, ok := x.layers[id]; return !ok })
}

func (x *export) packAll(ctx context.Context, refs []*cache.Ref, bad map[*cache.Ref]bool) error {
	var mu sync.Mutex // guards bad and layers
	eg, egctx := errgroup.WithContext(ctx)
	for _, ref := range refs {
		eg.Go(func() error {
			layers, err := ref.Layers(egctx, x.compression)
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, cache.ErrLost) {
				bad[ref] = true
				return nil
			}
			if err != nil {
				return fmt.Errorf("make layers of the cache: %w", err)
			}
			for i, o := range ref.Origins() {
				x.layers[o.ID] = packed{layers[i], remote.Describe(layers[i], o.CreatedAt), ref}
			}
			return nil
		})
	}
	return eg.Wait()
}

// sendAtOnce bounds the blobs on their way at the same time; the registry client
// bounds what all builds do with one host.
const sendAtOnce = 6

// sendLayers stores the layers that aren't there yet. One that is lost is left
// out.
func (x *export) sendLayers(ctx context.Context) error {
	eg, egctx := errgroup.WithContext(ctx)
	eg.SetLimit(sendAtOnce)
	sent := map[digest.Digest]bool{}
	for _, id := range slices.Sorted(maps.Keys(x.layers)) {
		l := x.layers[id]
		blob := l.layer.Blob
		if sent[blob.Digest] {
			continue
		}
		sent[blob.Digest] = true
		eg.Go(func() error {
			done := progress.From(ctx).Begin("writing layer " + blob.Digest.String())
			err := x.store.put(egctx, x.build.Client, blob, func(ctx context.Context) (io.ReadCloser, error) {
				rc, err := l.owner.OpenBlob(ctx, blob)
				if errors.Is(err, cache.ErrLost) {
					x.lose(blob.Digest)
				}
				if err != nil {
					return nil, err
				}
				return lossy{rc, func() { x.lose(blob.Digest) }}, nil
			})
			if err != nil && !x.isLost(blob.Digest) {
				return err
			}
			done()
			return nil
		})
	}
	return eg.Wait()
}

// lossy is a stored blob that may turn out changed while it is read.
type lossy struct {
	io.ReadCloser
	lost func()
}

func (l lossy) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if errors.Is(err, cache.ErrLost) {
		l.lost()
	}
	return n, err
}

func (x *export) lose(d digest.Digest) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.lost[d] = true
}

func (x *export) isLost(d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.lost[d]
}

// sendConfig stores what says how the layers are found.
func (x *export) sendConfig(ctx context.Context) (map[string]string, error) {
	config, blobs := remote.Encode(x.build.Steps, x.results())
	if len(blobs) == 0 {
		progress.From(ctx).Begin("skipping cache export for empty result")()
		return nil, nil
	}
	c, m, err := x.form.Write(config, blobs)
	if err != nil {
		return nil, err
	}
	manifest := "writing cache image manifest "
	if x.form.Index {
		manifest = "writing cache manifest "
	}
	for _, part := range []struct {
		what string
		blob remote.Blob
		put  func(context.Context, Client, ocispec.Descriptor, opener) error
	}{{"writing config ", c, x.store.put}, {manifest, m, x.store.putRoot}} {
		done := progress.From(ctx).Begin(part.what + part.blob.Descriptor.Digest.String())
		err := part.put(ctx, x.build.Client, part.blob.Descriptor, func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(part.blob.Data)), nil
		})
		if err != nil {
			return nil, err
		}
		done()
	}
	desc, err := json.Marshal(m.Descriptor)
	if err != nil {
		return nil, fmt.Errorf("encode the cache's descriptor: %w", err)
	}
	return map[string]string{"cache.manifest": string(desc)}, nil
}

// results are those of which every layer was stored.
func (x *export) results() map[*remote.Step]remote.Stack {
	out := map[*remote.Step]remote.Stack{}
	for s, f := range x.found {
		if !x.packed(f.ids) {
			continue
		}
		stack := remote.Stack{CreatedAt: f.record.CreatedAt}
		for _, id := range f.ids {
			if d := x.layers[id].desc; !x.isLost(d.Digest) {
				stack.Blobs = append(stack.Blobs, d)
			}
		}
		if len(stack.Blobs) == len(f.ids) {
			out[s] = stack
		}
	}
	return out
}
