package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Spec describes an image as a source.
type Spec struct {
	Ref      string // in full, as users know it
	Platform ocispec.Platform
	Limit    *int          // take only so many layers
	Checksum digest.Digest // expected of the root, "" for any
	Type     cache.RecordType
	// Annotate adds to the annotations of layers; may be nil.
	Annotate func(map[string]string) map[string]string
}

// Instance is one image source op: an ops.SourceInstance for whatever Origin.
// Manifests are read when its key is first asked for, layers not before their
// content is needed.
type Instance struct {
	cache  *cache.Manager
	spec   Spec
	origin Origin
	loader loader
	find   func(context.Context, session.Group) (ocispec.Descriptor, error)

	turn  chan struct{} // held while reading or setting image
	image *Image
}

// NewInstance returns a source of what spec names at origin.
func NewInstance(c *cache.Manager, spec Spec, origin Origin) *Instance {
	return &Instance{
		cache: c, spec: spec, origin: origin,
		loader: loader{origin: origin, ref: spec.Ref, platform: spec.Platform},
		find:   origin.Resolve,
		turn:   make(chan struct{}, 1),
	}
}

// load reads manifest and config, once. A failure isn't remembered.
func (i *Instance) load(ctx context.Context, g session.Group) (*Image, error) {
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if i.image != nil {
		return i.image, nil
	}
	defer progress.From(ctx).Begin("resolve " + i.spec.Ref)()
	root, err := i.find(ctx, g)
	if err != nil {
		return nil, err
	}
	if want := i.spec.Checksum; want != "" && root.Digest != want {
		return nil, fmt.Errorf("image digest %s for %s does not match expected checksum %s", root.Digest, i.spec.Ref, want)
	}
	img, err := i.loader.load(ctx, g, root)
	if err != nil {
		return nil, err
	}
	if n := i.spec.Limit; n != nil {
		if *n > len(img.Layers) {
			return nil, fmt.Errorf("layer limit %d is greater than the number of layers in the image %s, %d", *n, i.spec.Ref, len(img.Layers))
		}
		img.Layers = img.Layers[:*n]
	}
	i.image = img
	return img, nil
}

// CacheKey identifies the image by its root digest, the platform and the layer
// limit (LLB-155). The diff IDs of its config are no further key: nobody has
// verified them before the layers are unpacked, and a config that claims those
// of another image must not get in that image's place.
//
// compat: LLB-155 no: the second key, of the config's diff IDs, is left out
func (i *Instance) CacheKey(ctx context.Context, g session.Group, index int) (string, bool, error) {
	if index != 0 {
		return "", false, fmt.Errorf("internal error: key %d of image %s, which has one", index, i.spec.Ref)
	}
	img, err := i.load(ctx, g)
	if err != nil {
		return "", false, err
	}
	key, err := manifestKey(img.Root.Digest, i.spec.Platform, i.spec.Limit)
	return key, false, err
}

// manifestKey is upstream's, byte for byte, so that registry caches are shared.
func manifestKey(root digest.Digest, p ocispec.Platform, limit *int) (string, error) {
	raw, err := json.Marshal(struct {
		Digest     digest.Digest
		OS         string
		Arch       string
		Variant    string   `json:",omitempty"`
		OSVersion  string   `json:",omitempty"`
		OSFeatures []string `json:",omitempty"`
		Limit      *int     `json:",omitempty"`
	}{root, p.OS, p.Architecture, p.Variant, p.OSVersion, p.OSFeatures, limit})
	if err != nil {
		return "", fmt.Errorf("encode cache key: %w", err)
	}
	return digest.FromBytes(raw).String(), nil
}

// SharingKey implements ops.SharedSource.
func (i *Instance) SharingKey(ctx context.Context, g session.Group) (string, error) {
	return sharingKey(ctx, i.origin, g)
}

// Fetch returns the image's record, nil if it has no layers. Nothing is
// fetched yet: layers are, with the sessions of g, when they are needed.
func (i *Instance) Fetch(ctx context.Context, g session.Group) (*cache.Ref, error) {
	img, err := i.load(ctx, g)
	if err != nil {
		return nil, err
	}
	src := blobSource{i.origin, g}
	opts := cache.Options{Description: "pulled from " + i.spec.Ref, Type: i.spec.Type}
	var ref *cache.Ref
	for _, layer := range img.Layers {
		if i.spec.Annotate != nil {
			layer.Blob.Annotations = i.spec.Annotate(layer.Blob.Annotations)
		}
		next, err := i.cache.GetByBlob(ctx, layer, ref, src, opts)
		ref.Release()
		if err != nil {
			return nil, fmt.Errorf("layer %s of %s: %w", layer.Blob.Digest, i.spec.Ref, err)
		}
		ref = next
	}
	return ref, nil
}

// annotator notes that layers are known to be in ref's repository.
func annotator(ref registry.Reference) func(map[string]string) map[string]string {
	return func(a map[string]string) map[string]string { return registry.SourceAnnotations(a, ref) }
}
