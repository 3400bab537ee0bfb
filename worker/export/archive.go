package export

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
)

// archiveExporter sends the image to the client as one tar: an OCI layout, with
// a manifest.json for docker load if docker is set.
type archiveExporter struct {
	cfg    Config
	opts   imageOptions
	docker bool
}

func (e *archiveExporter) Name() string {
	if e.docker {
		return "exporting to docker image format"
	}
	return "exporting to oci image format"
}

func (e *archiveExporter) Export(ctx context.Context, src Source, req Request) (Done, error) {
	if e.docker && src.Refs != nil {
		return Done{}, errors.New("docker archives hold one platform; use type=oci for several")
	}
	names, err := e.opts.fullNames(src.Metadata)
	if err != nil {
		return Done{}, err
	}
	img, err := assemble(ctx, e.cfg, e.opts, src)
	if err != nil {
		return Done{}, err
	}
	resp, desc, err := img.response(names, time.Now())
	if err != nil {
		return Done{}, err
	}
	caller, err := e.cfg.caller(ctx, req)
	if err != nil {
		return Done{}, err
	}
	// What the client has got can't be taken back.
	if err := img.verify(ctx); err != nil {
		return Done{}, err
	}
	w, err := filesync.CopyFileWriter(ctx, resp, req.Index, caller)
	if err != nil {
		return Done{}, fmt.Errorf("open the client's output: %w", err)
	}
	done := progress.From(ctx).Begin("sending tarball")
	err = sendArchive(ctx, w, archive{image: img, desc: desc, names: names, docker: e.docker})
	// A receiver that has the image already says so; that is success (EXP-061).
	if err != nil && grpcerrors.Code(err) != codes.AlreadyExists {
		return Done{}, fmt.Errorf("send the image to the client: %w", err)
	}
	done()
	return Done{Response: resp, Descriptor: &desc}, nil
}

func sendArchive(ctx context.Context, w io.WriteCloser, a archive) error {
	if err := a.write(ctx, w); err != nil {
		return errors.Join(err, w.Close())
	}
	return w.Close()
}

// archive is an image as a tar. The same image gives the same bytes.
type archive struct {
	image  *image
	desc   ocispec.Descriptor
	names  []string
	docker bool
}

func (a archive) write(ctx context.Context, w io.Writer) error {
	tw := tar.NewWriter(w)
	if err := a.writeBlobs(ctx, tw); err != nil {
		return err
	}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: a.tagged()}
	if err := a.writeJSON(tw, ocispec.ImageIndexFile, index); err != nil {
		return err
	}
	if a.docker {
		if err := a.writeJSON(tw, "manifest.json", a.dockerManifest()); err != nil {
			return err
		}
	}
	if err := a.writeJSON(tw, ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}); err != nil {
		return err
	}
	return tw.Close()
}

func (a archive) writeBlobs(ctx context.Context, tw *tar.Writer) error {
	if err := a.header(tw, ocispec.ImageBlobsDir+"/", tar.TypeDir, 0); err != nil {
		return err
	}
	if err := a.header(tw, ocispec.ImageBlobsDir+"/sha256/", tar.TypeDir, 0); err != nil {
		return err
	}
	blobs := slices.Clone(a.image.blobs)
	slices.SortFunc(blobs, func(x, y blob) int { return cmp.Compare(x.desc.Digest, y.desc.Digest) })
	for _, b := range blobs {
		if err := a.writeBlob(ctx, tw, b); err != nil {
			return fmt.Errorf("%s: %w", b.desc.Digest, err)
		}
	}
	return nil
}

func (a archive) writeBlob(ctx context.Context, tw *tar.Writer, b blob) error {
	r, err := b.open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := a.header(tw, blobPath(b.desc.Digest), tar.TypeReg, b.desc.Size); err != nil {
		return err
	}
	n, err := io.Copy(tw, r)
	if err == nil && n != b.desc.Size {
		err = fmt.Errorf("%d bytes instead of %d", n, b.desc.Size)
	}
	return err
}

func blobPath(dgst digest.Digest) string {
	return path.Join(ocispec.ImageBlobsDir, dgst.Algorithm().String(), dgst.Encoded())
}

func (a archive) header(tw *tar.Writer, name string, typ byte, size int64) error {
	h := &tar.Header{Name: name, Typeflag: typ, Size: size, Mode: 0o444}
	if typ == tar.TypeDir {
		h.Mode = 0o755
	}
	if t := a.image.epoch.time; t != nil {
		h.ModTime = *t
	}
	return tw.WriteHeader(h)
}

func (a archive) writeJSON(tw *tar.Writer, name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := a.header(tw, name, tar.TypeReg, int64(len(data))); err != nil {
		return err
	}
	_, err = tw.Write(data)
	return err
}

// tagged is the root once for every name (EXP-057).
func (a archive) tagged() []ocispec.Descriptor {
	if len(a.names) == 0 {
		return []ocispec.Descriptor{a.desc}
	}
	var out []ocispec.Descriptor
	for _, n := range a.names {
		d := a.desc
		d.Annotations = maps.Clone(a.desc.Annotations) // which has a creation time at least
		d.Annotations["io.containerd.image.name"] = n
		if parsed, err := reference.ParseNormalizedNamed(n); err == nil {
			if t, ok := parsed.(reference.Tagged); ok {
				d.Annotations[ocispec.AnnotationRefName] = t.Tag()
			}
		}
		out = append(out, d)
	}
	return out
}

// dockerManifest is what docker load reads.
func (a archive) dockerManifest() any {
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var e entry
	for _, n := range a.names {
		parsed, err := reference.ParseNormalizedNamed(n)
		if err != nil {
			continue // names were checked when the exporter was made
		}
		e.RepoTags = append(e.RepoTags, reference.FamiliarString(parsed))
	}
	e.Config = blobPath(a.image.config)
	for _, l := range a.image.layers {
		e.Layers = append(e.Layers, blobPath(l.Digest))
	}
	return []entry{e}
}
