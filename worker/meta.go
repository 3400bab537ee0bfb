package worker

import (
	"context"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/ops/source/git"
	"github.com/kilnbuild/kiln/ops/source/http"
	"github.com/kilnbuild/kiln/ops/source/image"
	"github.com/kilnbuild/kiln/ops/source/ocilayout"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// MetaRequest asks a source what it stands for.
type MetaRequest struct {
	Op          *pb.SourceOp
	Platform    *ocispec.Platform // nil is the worker's default
	ResolveMode string            // default, pull or local
	NoConfig    bool
	GitObjects  bool                  // fetch the commit and the tag, too
	Checksum    *http.ChecksumRequest // of a download; nil for none
	Group       session.Group
}

// Meta is what a source says of itself.
type Meta struct {
	Op     *pb.SourceOp  // with its identifier in full
	Digest digest.Digest // of an image's root; "" for other sources
	Config []byte        // of an image, for the platform
	Git    *git.Meta     // nil for other sources
	HTTP   *http.Meta    // likewise
}

// SourceMeta asks the source that serves req.Op. Sources that have nothing to
// say of themselves are returned as they are.
func (w *Worker) SourceMeta(ctx context.Context, req MetaRequest) (Meta, error) {
	id := req.Op.GetIdentifier()
	scheme, name, ok := strings.Cut(id, "://")
	if !ok {
		return Meta{}, status.Errorf(codes.InvalidArgument, "source %q is not of the form scheme://name", id)
	}
	switch scheme {
	case "docker-image", "oci-layout":
		return w.imageMeta(ctx, scheme, name, req)
	case "local":
		return Meta{Op: req.Op}, nil
	case "git":
		m, err := w.git.ResolveMeta(ctx, git.MetaRequest{Op: req.Op, Objects: req.GitObjects, Group: req.Group})
		return Meta{Op: req.Op, Git: &m}, err
	case "http", "https":
		m, err := w.http.ResolveMeta(ctx, http.MetaRequest{Op: req.Op, Checksum: req.Checksum, Group: req.Group})
		return Meta{Op: req.Op, HTTP: &m}, err
	}
	return Meta{}, status.Errorf(codes.Unimplemented, "source %s: this daemon has no %s sources", id, scheme)
}

func (w *Worker) imageMeta(ctx context.Context, scheme, name string, req MetaRequest) (Meta, error) {
	platform := w.platforms[0]
	if req.Platform != nil {
		platform = *req.Platform
	}
	var meta image.Meta
	var err error
	if scheme == "docker-image" {
		meta, err = w.image.ResolveMeta(ctx, image.MetaRequest{
			Ref: name, Platform: platform, Mode: req.ResolveMode, NoConfig: req.NoConfig, Group: req.Group,
		})
	} else {
		meta, err = w.layout.ResolveMeta(ctx, ocilayout.MetaRequest{
			Ref: name, SessionID: req.Op.Attrs[pb.AttrOCILayoutSessionID], StoreID: req.Op.Attrs[pb.AttrOCILayoutStoreID],
			Platform: platform, Group: req.Group,
		})
	}
	if err != nil {
		return Meta{}, err
	}
	out := proto.CloneOf(req.Op)
	out.Identifier = fmt.Sprintf("%s://%s", scheme, meta.Ref)
	return Meta{Op: out, Digest: meta.Digest, Config: meta.Config}, nil
}
