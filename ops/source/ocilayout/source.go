// Package ocilayout is the source of images in OCI layouts that clients offer:
// oci-layout://name@digest. Manifests and layers are read through the content
// service of a session; everything else is as for images in registries
// (package image).
package ocilayout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/image"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
)

const (
	scheme     = "oci-layout"
	blobScheme = "oci-layout+blob"
	// lookup bounds the wait for a session that is named but not there yet.
	lookup = 5 * time.Second
)

// Options are what a Source works with.
type Options struct {
	Cache    *cache.Manager
	Sessions *session.Manager
}

// Source serves oci-layout and oci-layout+blob.
type Source struct{ opts Options }

var _ ops.Source = (*Source)(nil)

// New returns a source.
func New(opts Options) *Source { return &Source{opts} }

// Schemes implements ops.Source.
func (s *Source) Schemes() []string { return []string{scheme, blobScheme} }

// Resolve implements ops.Source.
func (s *Source) Resolve(op *pb.SourceOp, platform ocispec.Platform) (ops.SourceInstance, error) {
	kind, name, _ := strings.Cut(op.Identifier, "://")
	o, err := s.origin(name, op.Attrs[pb.AttrOCILayoutSessionID], op.Attrs[pb.AttrOCILayoutStoreID])
	if err != nil {
		return nil, err
	}
	if kind == blobScheme {
		if o.store == "" {
			return nil, fmt.Errorf("%s: the attribute %s must name the client's store", op.Identifier, pb.AttrOCILayoutStoreID)
		}
		return image.NewBlob(s.opts.Cache, name, op.Attrs, o)
	}
	spec := image.Spec{Ref: o.ref, Platform: platform, Type: cache.TypeRegular}
	if v, ok := op.Attrs[pb.AttrOCILayoutLayerLimit]; ok {
		if spec.Limit, err = image.ParseLayerLimit(v); err != nil {
			return nil, fmt.Errorf("%s: %w", op.Identifier, err)
		}
	}
	return image.NewInstance(s.opts.Cache, spec, o), nil
}

// MetaRequest asks what an image in a layout is.
type MetaRequest struct {
	Ref       string // name@digest
	SessionID string // "" is any of Group
	StoreID   string // as the attribute oci.store
	Platform  ocispec.Platform
	Group     session.Group
}

// ResolveMeta finds out what req names, without any layer.
func (s *Source) ResolveMeta(ctx context.Context, req MetaRequest) (image.Meta, error) {
	o, err := s.origin(req.Ref, req.SessionID, req.StoreID)
	if err != nil {
		return image.Meta{}, err
	}
	return image.NewInstance(s.opts.Cache, image.Spec{Ref: o.ref, Platform: req.Platform}, o).Meta(ctx, req.Group)
}

// origin is a layout in a client's store.
type origin struct {
	sessions *session.Manager
	ref      string
	digest   digest.Digest
	session  string // "" is any
	store    string
}

func (s *Source) origin(ref, sessionID, storeID string) (*origin, error) {
	_, dgst, ok := strings.Cut(ref, "@")
	if !ok {
		return nil, fmt.Errorf("layout reference %q must have a digest", ref)
	}
	d, err := digest.Parse(dgst)
	if err != nil {
		return nil, fmt.Errorf("layout reference %q: %w", ref, err)
	}
	return &origin{sessions: s.opts.Sessions, ref: ref, digest: d, session: sessionID, store: storeID}, nil
}

// Resolve needs to ask nobody: the reference has the digest.
func (o *origin) Resolve(ctx context.Context, g session.Group) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{Digest: o.digest, Size: -1}, nil
}

// Open streams a blob of the client's store.
func (o *origin) Open(ctx context.Context, g session.Group, desc ocispec.Descriptor) (io.ReadCloser, error) {
	var r *reader
	err := o.with(ctx, g, func(ctx context.Context, c session.Caller) (err error) {
		r, err = open(ctx, c, "oci:"+o.store, desc.Digest)
		return err
	})
	if err != nil {
		return nil, o.explain(ctx, desc, err)
	}
	r.explain = func(err error) error { return o.explain(ctx, desc, err) }
	return r, nil
}

func (o *origin) explain(ctx context.Context, desc ocispec.Descriptor, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, session.ErrNoActiveSessions):
		return fmt.Errorf("%s: no client session is there to read the layout from", o.ref)
	case grpcerrors.Code(err) == codes.NotFound:
		return fmt.Errorf("%s: the client's layout %q has no blob %s: %w", o.ref, o.store, desc.Digest, errdefs.ErrNotFound)
	}
	return fmt.Errorf("%s: read %s from the client's layout %q: %w", o.ref, desc.Digest, o.store, err)
}

// with calls fn with the session that has the store.
func (o *origin) with(ctx context.Context, g session.Group, fn func(context.Context, session.Caller) error) error {
	if o.session == "" {
		if g == nil {
			return session.ErrNoActiveSessions
		}
		return o.sessions.Any(ctx, g, func(ctx context.Context, _ string, c session.Caller) error {
			return fn(ctx, c)
		})
	}
	wait, cancel := context.WithTimeout(ctx, lookup)
	c, err := o.sessions.Get(wait, o.session, false)
	cancel()
	if err != nil {
		return err
	}
	return fn(c.Context(ctx), c)
}
