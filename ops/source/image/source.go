// Package image is the source of images: docker-image:// from registries, and
// what the sources of other places where images are (Origin) share with it.
//
// An image is resolved when its cache key is asked for: a tag costs one
// request a build, a digest whose manifest was seen before costs none. Layers are
// promises until something mounts them (package cache).
package image

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	scheme     = "docker-image"
	blobScheme = "docker-image+blob"
)

// Options are what a Source works with.
type Options struct {
	Cache    *cache.Manager
	Store    *store.DB // remembers manifests and configs
	Registry *registry.Client
	Sessions *session.Manager
}

// Source serves docker-image and docker-image+blob.
type Source struct {
	opts  Options
	known *known
}

var (
	_ ops.Source       = (*Source)(nil)
	_ ops.SharedSource = (*Instance)(nil)
	_ ops.SharedSource = (*Blob)(nil)
)

// New returns a source.
func New(opts Options) *Source {
	return &Source{opts: opts, known: openKnown(opts.Store)}
}

// Schemes implements ops.Source.
func (s *Source) Schemes() []string { return []string{scheme, blobScheme} }

// Resolve implements ops.Source.
func (s *Source) Resolve(op *pb.SourceOp, platform ocispec.Platform) (ops.SourceInstance, error) {
	kind, name, _ := strings.Cut(op.Identifier, "://")
	ref, err := registry.ParseReference(name)
	if err != nil {
		return nil, err
	}
	origin := &registryOrigin{s.opts.Registry, s.opts.Sessions, ref}
	if kind == blobScheme {
		return NewBlob(s.opts.Cache, name, op.Attrs, origin)
	}
	spec := Spec{Ref: ref.String(), Platform: platform, Annotate: annotator(ref)}
	mode, err := spec.readAttrs(op.Attrs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op.Identifier, err)
	}
	i := NewInstance(s.opts.Cache, spec, origin)
	s.remember(i, origin, mode)
	return i, nil
}

// remember makes i use and extend what is known of manifests.
func (s *Source) remember(i *Instance, o *registryOrigin, m mode) {
	i.loader.name, i.loader.known = o.ref.Name(), s.known
	i.find = func(ctx context.Context, g session.Group) (ocispec.Descriptor, error) { return s.find(ctx, g, o, m) }
}

// find says what o's reference stands for. Content named by its digest is the
// same wherever it is; a tag is looked up, once a build, unless the mode prefers
// what is known, and the registry has told it to clients with the same
// credentials.
func (s *Source) find(ctx context.Context, g session.Group, o *registryOrigin, m mode) (ocispec.Descriptor, error) {
	ref := o.ref
	if ref.Digest != "" {
		if _, desc, ok := s.known.blob(ref.Name(), ref.Digest); ok {
			return desc, nil
		}
		return o.Resolve(ctx, g)
	}
	if m == modeLocal {
		if desc, readers, ok := s.known.tag(ref.String()); ok {
			ok, err := o.resolver(g).MayRead(ctx, ref, readers)
			if ok || err != nil {
				return desc, err
			}
		}
	}
	return ops.Once(ctx, g, tag(ref.String()), func() (ocispec.Descriptor, error) {
		desc, readers, err := o.resolve(ctx, g)
		if err == nil {
			s.known.putTag(ref.String(), desc, readers)
		}
		return desc, err
	})
}

// tag is what a build asks registries about, once: it stands for one image on all
// platforms.
type tag string

// mode is image.resolvemode (LLB-091).
type mode string

const (
	modeDefault mode = pb.AttrImageResolveModeDefault
	modePull    mode = pb.AttrImageResolveModeForcePull
	modeLocal   mode = pb.AttrImageResolveModePreferLocal
)

func parseMode(v string) (mode, error) {
	switch m := mode(v); m {
	case "":
		return modeDefault, nil
	case modeDefault, modePull, modeLocal:
		return m, nil
	}
	return "", fmt.Errorf("invalid resolvemode: %q is none of default, pull and local", v)
}

func (spec *Spec) readAttrs(attrs map[string]string) (m mode, err error) {
	if m, err = parseMode(attrs[pb.AttrImageResolveMode]); err != nil {
		return "", err
	}
	if spec.Type, err = parseRecordType(attrs[pb.AttrImageRecordType]); err != nil {
		return "", err
	}
	if v, ok := attrs[pb.AttrImageLayerLimit]; ok {
		if spec.Limit, err = ParseLayerLimit(v); err != nil {
			return "", err
		}
	}
	if v, ok := attrs[pb.AttrImageChecksum]; ok {
		if spec.Checksum, err = digest.Parse(v); err != nil {
			return "", fmt.Errorf("invalid image checksum %q: %w", v, err)
		}
	}
	return m, nil
}

// ParseLayerLimit reads a number of layers, at least one.
func ParseLayerLimit(v string) (*int, error) {
	n, err := strconv.Atoi(v)
	if err != nil || n <= 0 {
		return nil, fmt.Errorf("invalid layer limit %q: it must be a number above zero", v)
	}
	return &n, nil
}

func parseRecordType(v string) (cache.RecordType, error) {
	switch t := cache.RecordType(v); t {
	case "":
		return cache.TypeRegular, nil
	case cache.TypeRegular, cache.TypeInternal, cache.TypeFrontend:
		return t, nil
	}
	return "", fmt.Errorf("invalid record type %q: it is none of regular, internal and frontend", v)
}

// MetaRequest asks what an image is.
type MetaRequest struct {
	Ref      string
	Platform ocispec.Platform
	Mode     string // as image.resolvemode
	NoConfig bool   // only the digest
	Group    session.Group
}

// Meta is what an image is.
type Meta struct {
	Ref    string        // in full
	Digest digest.Digest // of the index or manifest that the reference stands for
	Config []byte        // for the platform; nil if it wasn't asked for
}

// ResolveMeta finds out what req names, without any layer.
func (s *Source) ResolveMeta(ctx context.Context, req MetaRequest) (Meta, error) {
	ref, err := registry.ParseReference(req.Ref)
	if err != nil {
		return Meta{}, err
	}
	m, err := parseMode(req.Mode)
	if err != nil {
		return Meta{}, err
	}
	origin := &registryOrigin{s.opts.Registry, s.opts.Sessions, ref}
	if req.NoConfig {
		defer progress.From(ctx).Begin("resolve " + ref.String())()
		root, err := s.find(ctx, req.Group, origin, m)
		return Meta{Ref: ref.String(), Digest: root.Digest}, err
	}
	i := NewInstance(s.opts.Cache, Spec{Ref: ref.String(), Platform: req.Platform}, origin)
	s.remember(i, origin, m)
	return i.Meta(ctx, req.Group)
}

// Meta says what the image is, without any layer.
func (i *Instance) Meta(ctx context.Context, g session.Group) (Meta, error) {
	img, err := i.load(ctx, g)
	if err != nil {
		return Meta{}, err
	}
	return Meta{Ref: i.spec.Ref, Digest: img.Root.Digest, Config: img.Config}, nil
}
