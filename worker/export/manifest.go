package export

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// image is a result as an image: the root descriptor and where each blob comes
// from.
type image struct {
	root   ocispec.Descriptor
	config digest.Digest        // of the one platform; "" in an index
	layers []ocispec.Descriptor // of the one platform; nil in an index
	epoch  epoch                // of the result as a whole
	// blobs are everything below root and root itself, in an order in which
	// each comes after what it refers to.
	blobs []blob
}

// blob is bytes of an image: small ones in memory, layers in a ref.
type blob struct {
	desc  ocispec.Descriptor
	data  []byte
	owner *cache.Ref
}

func (b blob) open(ctx context.Context) (io.ReadCloser, error) {
	if b.owner == nil {
		return io.NopCloser(strings.NewReader(string(b.data))), nil
	}
	return b.owner.OpenBlob(ctx, b.desc)
}

// verify makes sure that the layers can be read to the end.
func (img *image) verify(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(runtime.GOMAXPROCS(0))
	for _, b := range img.blobs {
		if b.owner != nil {
			eg.Go(func() error { return b.owner.VerifyBlob(ctx, b.desc) })
		}
	}
	return eg.Wait()
}

// part is one platform of a result.
type part struct {
	id       string // as the frontend names it; "" for a result without platforms
	platform *ocispec.Platform
	ref      *cache.Ref
	inline   []byte // build cache for its config
}

// parts lists the platforms of src (EXP-140).
func parts(src Source) ([]part, bool, error) {
	var listed struct {
		Platforms []struct {
			ID       string
			Platform ocispec.Platform
		}
	}
	if raw, ok := src.Metadata["refs.platforms"]; ok {
		if err := json.Unmarshal(raw, &listed); err != nil {
			return nil, false, fmt.Errorf("refs.platforms of the result: %w", err)
		}
	}
	if src.Refs == nil {
		p := part{ref: src.Ref}
		switch len(listed.Platforms) {
		case 0:
		case 1:
			p.id, p.platform = listed.Platforms[0].ID, &listed.Platforms[0].Platform
		default:
			return nil, false, fmt.Errorf("the result is one, but says it is for %d platforms", len(listed.Platforms))
		}
		return []part{p}, false, nil
	}
	if len(listed.Platforms) == 0 {
		return nil, false, fmt.Errorf("the result is for several platforms, but refs.platforms doesn't list them")
	}
	var out []part
	for _, l := range listed.Platforms {
		ref, ok := src.Refs[l.ID]
		if !ok {
			return nil, false, fmt.Errorf("the result lists the platform %s, but has nothing for it", l.ID)
		}
		out = append(out, part{id: l.ID, platform: &l.Platform, ref: ref})
	}
	return out, true, nil
}

// assemble makes src an image.
func assemble(ctx context.Context, cfg Config, opts imageOptions, src Source) (*image, error) {
	src.Metadata = maps.Clone(src.Metadata)
	if src.Metadata == nil {
		src.Metadata = map[string][]byte{}
	}
	maps.Copy(src.Metadata, opts.metadata)
	all, isMap, err := parts(src)
	if err != nil {
		return nil, err
	}
	notes, err := opts.annotations.with(src.Metadata)
	if err != nil {
		return nil, err
	}
	ids := map[string]bool{}
	for _, p := range all {
		if p.platform != nil {
			ids[platforms.FormatAll(platforms.Normalize(*p.platform))] = true
		}
	}
	if err := notes.check(ids, isMap, opts.compression.OCI); err != nil {
		return nil, err
	}
	layers, err := layersOf(ctx, opts, all)
	if err != nil {
		return nil, err
	}
	if err := addInline(ctx, src, all); err != nil {
		return nil, err
	}
	img := &image{}
	if img.epoch, err = opts.epoch.or(src.Metadata, ""); err != nil {
		return nil, err
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Annotations: notes.at(onIndex, ""),
	}
	if !opts.compression.OCI {
		index.MediaType = images.MediaTypeDockerSchema2ManifestList
	}
	for i, p := range all {
		desc, err := img.addManifest(ctx, cfg, opts, notes, src.Metadata, p, layers[i])
		if err != nil {
			return nil, err
		}
		index.Manifests = append(index.Manifests, desc)
	}
	if !isMap {
		img.root = index.Manifests[0]
		return img, nil
	}
	img.config, img.layers = "", nil
	img.root, err = img.addJSON(ctx, "exporting manifest list ", index.MediaType, index)
	img.root.Annotations = notes.at(onIndexDescriptor, "")
	return img, err
}

// addInline makes the build cache that goes into the configs of all.
func addInline(ctx context.Context, src Source, all []part) (err error) {
	if src.Inline == nil {
		return nil
	}
	defer progress.From(ctx).Begin("preparing layers for inline cache")()
	for i := range all {
		if all[i].inline, err = src.Inline(ctx, all[i].ref); err != nil {
			return fmt.Errorf("make the inline cache: %w", err)
		}
	}
	return nil
}

// layersOf makes the layers of every platform blobs, side by side.
func layersOf(ctx context.Context, opts imageOptions, all []part) ([][]cache.Layer, error) {
	defer progress.From(ctx).Begin("exporting layers")()
	out := make([][]cache.Layer, len(all))
	eg, ctx := errgroup.WithContext(ctx)
	for i, p := range all {
		eg.Go(func() (err error) {
			out[i], err = p.ref.Layers(ctx, opts.compression)
			if err != nil {
				return fmt.Errorf("make layers of the result: %w", err)
			}
			return nil
		})
	}
	return out, eg.Wait()
}

// addManifest adds the layers, the config and the manifest of one platform.
func (img *image) addManifest(ctx context.Context, cfg Config, opts imageOptions, notes annotations, metadata map[string][]byte, p part, layers []cache.Layer) (ocispec.Descriptor, error) {
	config, ok := platformValue(metadata, "containerimage.config", p.id)
	if !ok || len(config) == 0 {
		var err error
		if config, err = defaultConfig(cmp.Or(p.platform, &cfg.Platform)); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	base, _ := platformValue(metadata, "containerimage.base.config", p.id)
	clamp, err := opts.epoch.or(metadata, p.id)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err = patchConfig(config, base, layers, origins(p.ref, len(layers)), clamp.time)
	if err == nil {
		config, err = withInline(config, p.inline)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	platform := ""
	if p.platform != nil {
		platform = platforms.FormatAll(platforms.Normalize(*p.platform))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Annotations: notes.at(onManifest, platform),
		Layers:      []ocispec.Descriptor{}, // where there is none, too, the specification wants a list
	}
	configType := ocispec.MediaTypeImageConfig
	if !opts.compression.OCI {
		m.MediaType, configType = images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2Config
	}
	for _, l := range layers {
		img.addBlob(blob{desc: l.Blob, owner: p.ref})
		m.Layers = append(m.Layers, publicLayer(l.Blob, opts.compression.OCI))
	}
	m.Config = img.add(ctx, "exporting config ", configType, config)
	img.config, img.layers = m.Config.Digest, m.Layers
	desc, err := img.addJSON(ctx, "exporting manifest ", m.MediaType, m)
	desc.Platform = p.platform
	desc.Annotations = notes.at(onManifestDescriptor, platform)
	return desc, err
}

// publicLayer leaves out annotations that are the daemon's own business
// (EXP-054).
func publicLayer(desc ocispec.Descriptor, oci bool) ocispec.Descriptor {
	out := ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size, URLs: desc.URLs}
	if !oci {
		return out
	}
	for k, v := range desc.Annotations {
		if k == "containerd.io/uncompressed" || k == "buildkit/createdat" || strings.HasPrefix(k, "containerd.io/distribution.source.") {
			continue
		}
		if out.Annotations == nil {
			out.Annotations = map[string]string{}
		}
		out.Annotations[k] = v
	}
	return out
}

func (img *image) add(ctx context.Context, what, mediaType string, data []byte) ocispec.Descriptor {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	progress.From(ctx).Begin(what + desc.Digest.String())()
	img.addBlob(blob{desc: desc, data: data})
	return desc
}

// addBlob adds b unless another platform has it too.
func (img *image) addBlob(b blob) {
	if !slices.ContainsFunc(img.blobs, func(o blob) bool { return o.desc.Digest == b.desc.Digest }) {
		img.blobs = append(img.blobs, b)
	}
}

func (img *image) addJSON(ctx context.Context, what, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode %s: %w", mediaType, err)
	}
	return img.add(ctx, what, mediaType, data), nil
}

// response is what clients are told of the image (EXP-059).
func (img *image) response(names []string, now time.Time) (map[string]string, ocispec.Descriptor, error) {
	desc := img.root
	desc.Annotations = maps.Clone(desc.Annotations)
	if desc.Annotations == nil {
		desc.Annotations = map[string]string{}
	}
	if _, ok := desc.Annotations[ocispec.AnnotationCreated]; !ok {
		desc.Annotations[ocispec.AnnotationCreated] = img.epoch.created(now).UTC().Format(time.RFC3339)
	}
	resp := map[string]string{"containerimage.digest": desc.Digest.String()}
	if img.config != "" {
		resp["containerimage.config.digest"] = img.config.String()
	}
	if len(names) > 0 {
		resp["image.name"] = strings.Join(names, ",")
	}
	raw, err := json.Marshal(desc)
	if err != nil {
		return nil, desc, fmt.Errorf("encode the image's descriptor: %w", err)
	}
	resp["containerimage.descriptor"] = base64.StdEncoding.EncodeToString(raw)
	return resp, desc, nil
}
