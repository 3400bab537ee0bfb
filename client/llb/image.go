package llb

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// ImageOption is an option of Image.
type ImageOption interface{ applyImage(*source) }

type imageOption func(*source)

func (o imageOption) applyImage(s *source) { o(s) }

// Image is the file system of an image in a registry. A reference without a
// tag or digest means the tag latest.
func Image(ref string, opts ...ImageOption) State {
	named, err := reference.ParseNormalizedNamed(ref)
	if err == nil {
		ref = reference.TagNameOnly(named).String()
	}
	s := &source{id: "docker-image://" + ref, attrs: map[string]string{}}
	if err != nil {
		s.fail(fmt.Errorf("parse image reference %q: %w", ref, err))
	}
	for _, o := range opts {
		o.applyImage(s)
	}
	return s.state(pb.CapSourceImage)
}

// ResolveMode says whether the registry is asked about a reference that is
// known locally.
type ResolveMode int

// The resolve modes.
const (
	ResolveModeDefault ResolveMode = iota
	ResolveModeForcePull
	ResolveModePreferLocal
)

// String returns the mode as attributes carry it.
func (m ResolveMode) String() string {
	switch m {
	case ResolveModeForcePull:
		return pb.AttrImageResolveModeForcePull
	case ResolveModePreferLocal:
		return pb.AttrImageResolveModePreferLocal
	}
	return pb.AttrImageResolveModeDefault
}

func (m ResolveMode) applyImage(s *source) {
	switch m {
	case ResolveModeDefault:
		s.set(pb.AttrImageResolveMode, "")
	case ResolveModeForcePull:
		// The only mode that a daemon must not ignore.
		s.set(pb.AttrImageResolveMode, m.String(), pb.CapSourceImageResolveMode)
	default:
		s.set(pb.AttrImageResolveMode, m.String())
	}
}

// MarkImageInternal keeps the image out of what users see in the cache.
var MarkImageInternal ImageOption = imageOption(func(s *source) { s.set(pb.AttrImageRecordType, "internal") })

// LayerLimit takes only the first n layers.
func LayerLimit(n int) ImageOption {
	return imageOption(func(s *source) {
		s.set(pb.AttrImageLayerLimit, strconv.Itoa(n), pb.CapSourceImageLayerLimit)
	})
}

// ImageChecksum is the digest that the reference must resolve to.
func ImageChecksum(dgst digest.Digest) ImageOption {
	return imageOption(func(s *source) { s.set(pb.AttrImageChecksum, string(dgst), pb.CapSourceImageChecksum) })
}

// OCILayoutOption is an option of OCILayout.
type OCILayoutOption interface{ applyOCILayout(*source) }

type ociLayoutOption func(*source)

func (o ociLayoutOption) applyOCILayout(s *source) { o(s) }

// OCILayout is the file system of an image in an OCI layout of the client;
// ref must hold a digest.
func OCILayout(ref string, opts ...OCILayoutOption) State {
	s := &source{id: "oci-layout://" + ref, attrs: map[string]string{}}
	for _, o := range opts {
		o.applyOCILayout(s)
	}
	return s.state(pb.CapSourceOCILayout)
}

// OCIStore names the session and the store of the layout.
func OCIStore(sessionID, storeID string) OCILayoutOption {
	return ociLayoutOption(func(s *source) { s.setStore(sessionID, storeID) })
}

// OCILayerLimit takes only the first n layers.
func OCILayerLimit(n int) OCILayoutOption {
	return ociLayoutOption(func(s *source) { s.set(pb.AttrOCILayoutLayerLimit, strconv.Itoa(n)) })
}

func (s *source) setStore(sessionID, storeID string) {
	s.set(pb.AttrOCILayoutSessionID, sessionID)
	s.set(pb.AttrOCILayoutStoreID, storeID)
}

// BlobOption is an option of ImageBlob and OCILayoutBlob.
type BlobOption interface{ applyBlob(*source) }

type blobOption func(*source)

func (o blobOption) applyBlob(s *source) { o(s) }

// ImageBlob is one blob of a registry as a file; ref must hold a digest and no
// tag.
func ImageBlob(ref string, opts ...BlobOption) State {
	return blob("docker-image+blob://", ref, opts)
}

// OCILayoutBlob is one blob of an OCI layout of the client as a file.
func OCILayoutBlob(ref string, opts ...BlobOption) State {
	return blob("oci-layout+blob://", ref, opts)
}

// BlobOCIStore names the session and the store of an OCILayoutBlob.
func BlobOCIStore(sessionID, storeID string) BlobOption {
	return blobOption(func(s *source) { s.setStore(sessionID, storeID) })
}

func blob(scheme, ref string, opts []BlobOption) State {
	s := &source{attrs: map[string]string{}}
	for _, o := range opts {
		o.applyBlob(s)
	}
	named, err := blobReference(ref)
	if err != nil {
		s.fail(fmt.Errorf("blob reference %q: %w", ref, err))
	}
	s.id = scheme + named
	return s.state(pb.CapSourceImageBlob)
}

func blobReference(ref string) (string, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return "", err
	}
	if _, ok := named.(reference.Tagged); ok {
		return "", errors.New("a tag is not allowed")
	}
	if _, ok := named.(reference.Digested); !ok {
		return "", errors.New("a digest is needed")
	}
	return named.String(), nil
}
