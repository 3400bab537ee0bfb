package registrytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image describes an image to make.
type Image struct {
	Platform ocispec.Platform
	Layers   []map[string]string // path to content
	Env      []string
	// Put stores blobs; nil only computes them.
	Put func(mediaType string, data []byte)
}

// Layer returns a gzipped layer tar of files and its diff ID.
func Layer(t testing.TB, files map[string]string) ([]byte, digest.Digest) {
	t.Helper()
	var plain, packed bytes.Buffer
	tw := tar.NewWriter(&plain)
	for name, content := range files {
		hdr := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if err := tw.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	zw := gzip.NewWriter(&packed)
	if _, err := zw.Write(plain.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes(), digest.FromBytes(plain.Bytes())
}

// Make returns the manifest of an image and its descriptor, after putting its
// config and layers.
func Make(t testing.TB, img Image) ([]byte, ocispec.Descriptor) {
	t.Helper()
	put := func(mediaType string, data []byte) ocispec.Descriptor {
		if img.Put != nil {
			img.Put(mediaType, data)
		}
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	}
	config := ocispec.Image{Platform: img.Platform, Config: ocispec.ImageConfig{Env: img.Env}}
	config.RootFS.Type = "layers"
	config.RootFS.DiffIDs = []digest.Digest{}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{}}
	for _, files := range img.Layers {
		blob, diffID := Layer(t, files)
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayerGzip, blob))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
	}
	m.Config = put(ocispec.MediaTypeImageConfig, JSON(t, config))
	raw := JSON(t, m)
	platform := img.Platform
	return raw, ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw)), Platform: &platform}
}

// JSON encodes v.
func JSON(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// Push makes images, and an index if there are several, under repo:tag.
func (r *Registry) Push(t testing.TB, repo, tag string, images ...Image) ocispec.Descriptor {
	t.Helper()
	var index ocispec.Index
	index.SchemaVersion = 2
	index.MediaType = ocispec.MediaTypeImageIndex
	for _, img := range images {
		img.Put = func(mediaType string, data []byte) { r.Blob(repo, mediaType, data) }
		raw, desc := Make(t, img)
		if len(images) == 1 {
			return r.Manifest(repo, tag, desc.MediaType, raw)
		}
		r.Manifest(repo, "", desc.MediaType, raw)
		index.Manifests = append(index.Manifests, desc)
	}
	return r.Manifest(repo, tag, index.MediaType, JSON(t, index))
}
