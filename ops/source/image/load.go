package image

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/cache"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is what is known of an image before any layer is fetched.
type Image struct {
	Root   ocispec.Descriptor // what the reference stands for: an index or a manifest
	Config []byte
	Layers []cache.Layer
}

// maxDepth bounds indexes within indexes.
const maxDepth = 4

// loader reads the manifests of one image.
type loader struct {
	origin   Origin
	ref      string // for errors
	name     string // the repository, "" if manifests aren't remembered
	known    *known
	platform ocispec.Platform
}

// load reads what root stands for on the loader's platform.
func (l *loader) load(ctx context.Context, g session.Group, root ocispec.Descriptor) (*Image, error) {
	img, err := l.descend(ctx, g, root, 0)
	if err != nil {
		return nil, err
	}
	img.Root = root
	return img, nil
}

func (l *loader) descend(ctx context.Context, g session.Group, desc ocispec.Descriptor, depth int) (*Image, error) {
	if depth == maxDepth {
		return nil, fmt.Errorf("%s: its indexes are nested more than %d deep", l.ref, maxDepth)
	}
	if desc.MediaType == images.MediaTypeDockerSchema1Manifest {
		return nil, fmt.Errorf("%s: %w", l.ref, errSchema1)
	}
	data, err := l.read(ctx, g, desc)
	if err != nil {
		return nil, err
	}
	doc, err := parseDocument(data, desc.MediaType)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.ref, err)
	}
	if !doc.isIndex {
		return l.manifest(ctx, g, doc)
	}
	candidates, err := choose(doc.Manifests, l.platform)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.ref, err)
	}
	var have []string
	for _, c := range candidates {
		img, err := l.descend(ctx, g, c, depth+1)
		if err != nil {
			return nil, err
		}
		if c.Platform != nil {
			return img, nil
		}
		var p ocispec.Platform
		if err := json.Unmarshal(img.Config, &p); err != nil {
			return nil, fmt.Errorf("%s: its config isn't well-formed: %w", l.ref, err)
		}
		p = platforms.Normalize(p)
		if platforms.Only(l.platform).Match(p) {
			return img, nil
		}
		have = append(have, platforms.FormatAll(p))
	}
	return nil, fmt.Errorf("%s: %w", l.ref, noMatch(l.platform, have))
}

func (l *loader) manifest(ctx context.Context, g session.Group, m *document) (*Image, error) {
	config, err := l.read(ctx, g, m.Config)
	if err != nil {
		return nil, err
	}
	var parsed struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(config, &parsed); err != nil {
		return nil, fmt.Errorf("%s is not a container image: its config (%s) isn't one of an image: %w", l.ref, m.Config.MediaType, err)
	}
	diffIDs := parsed.RootFS.DiffIDs
	if len(diffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%s is not a valid image: its manifest has %d layers, its config (%s) has %d", l.ref, len(m.Layers), m.Config.MediaType, len(diffIDs))
	}
	img := &Image{Config: config}
	for i, blob := range m.Layers {
		if !images.IsLayerType(blob.MediaType) {
			return nil, fmt.Errorf("%s is not a container image: its layer %d has the media type %q", l.ref, i+1, blob.MediaType)
		}
		if err := blob.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("%s: layer %d has the digest %q: %w", l.ref, i+1, blob.Digest, err)
		}
		if blob.Size < 0 {
			return nil, fmt.Errorf("%s: layer %d has the size %d", l.ref, i+1, blob.Size)
		}
		if err := diffIDs[i].Validate(); err != nil {
			return nil, fmt.Errorf("%s: layer %d has the diff ID %q: %w", l.ref, i+1, diffIDs[i], err)
		}
		img.Layers = append(img.Layers, cache.Layer{Blob: blob, DiffID: diffIDs[i]})
	}
	return img, nil
}

// read returns the verified bytes of desc, from memory if it was read from the
// same repository before.
func (l *loader) read(ctx context.Context, g session.Group, desc ocispec.Descriptor) ([]byte, error) {
	if l.name != "" {
		if data, _, ok := l.known.blob(l.name, desc.Digest); ok {
			return data, nil
		}
	}
	data, err := read(ctx, g, l.origin, l.ref, desc)
	if err != nil {
		return nil, err
	}
	if l.name != "" {
		l.known.putBlob(l.name, desc, data)
	}
	return data, nil
}
