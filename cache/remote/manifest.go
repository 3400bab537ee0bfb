package remote

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Form is how a cache is laid out in a registry.
type Form struct {
	// Index makes it an index whose manifests are layers, which is the older
	// way, rather than an image manifest.
	Index bool
	OCI   bool // OCI rather than Docker media types, which image manifests have always
}

// Blob is a small blob with its bytes.
type Blob struct {
	Descriptor ocispec.Descriptor
	Data       []byte
}

// Write returns the config's blob and the manifest, which names it and blobs, in
// that order.
func (f Form) Write(c Config, blobs []ocispec.Descriptor) (config, manifest Blob, err error) {
	if config, err = encode(ConfigType, c); err != nil {
		return config, manifest, err
	}
	v := specs.Versioned{SchemaVersion: 2}
	switch {
	case !f.Index:
		manifest, err = encode(ocispec.MediaTypeImageManifest, ocispec.Manifest{
			Versioned: v, MediaType: ocispec.MediaTypeImageManifest, Config: config.Descriptor, Layers: blobs,
		})
	default:
		mediaType := ocispec.MediaTypeImageIndex
		if !f.OCI {
			mediaType = images.MediaTypeDockerSchema2ManifestList
		}
		list := append(append([]ocispec.Descriptor{}, blobs...), config.Descriptor)
		manifest, err = encode(mediaType, ocispec.Index{Versioned: v, MediaType: mediaType, Manifests: list})
	}
	return config, manifest, err
}

func encode(mediaType string, v any) (Blob, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return Blob{}, fmt.Errorf("encode %s: %w", mediaType, err)
	}
	return Blob{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data}, nil
}

// ErrNone says that there is no cache in what was read.
var ErrNone = errors.New("it holds no build cache")

// Reader reads a manifest or config, whose digest it verifies.
type Reader func(desc ocispec.Descriptor) ([]byte, error)

// Read returns the cache that root stands for: a manifest or index of a cache,
// or an image, or an index of images, with a cache inside. ErrNone if there is
// none.
func Read(root ocispec.Descriptor, read Reader) (*Index, error) {
	x := newIndex()
	doc, err := readDocument(root, read)
	if err != nil {
		return nil, err
	}
	if config, blobs, ok := doc.cache(); ok {
		data, err := read(config)
		if err != nil {
			return nil, err
		}
		c, err := parseConfig(data)
		if err != nil {
			return nil, err
		}
		return x, x.Add(c, blobs)
	}
	found, err := x.addInline(doc, read, 0)
	if err == nil && !found {
		err = ErrNone
	}
	return x, err
}

// document is a manifest or an index.
type document struct {
	MediaType string               `json:"mediaType"`
	Config    *ocispec.Descriptor  `json:"config"`
	Layers    []ocispec.Descriptor `json:"layers"`
	Manifests []ocispec.Descriptor `json:"manifests"`
}

func readDocument(desc ocispec.Descriptor, read Reader) (d document, err error) {
	data, err := read(desc)
	if err != nil {
		return d, err
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%s isn't a well-formed manifest: %w", desc.Digest, err)
	}
	if d.Config != nil && d.Manifests != nil {
		return d, fmt.Errorf("%s is a manifest and an index at once", desc.Digest)
	}
	return d, nil
}

// cache takes apart what Form.Write has put together.
func (d document) cache() (config ocispec.Descriptor, blobs []ocispec.Descriptor, ok bool) {
	if d.Config != nil {
		return *d.Config, d.Layers, d.Config.MediaType == ConfigType
	}
	for _, m := range d.Manifests {
		if m.MediaType == ConfigType {
			config, ok = m, true
		} else {
			blobs = append(blobs, m)
		}
	}
	return config, blobs, ok
}
