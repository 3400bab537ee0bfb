package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// imageExporter makes an image of the result, whose layers are the cache's, and
// pushes it. There is no store of images beside the cache, for which store, unpack
// and name-canonical would be (EXP-015).
type imageExporter struct {
	cfg  Config
	opts imageOptions
}

func (e *imageExporter) Name() string { return "exporting to image" }

func (e *imageExporter) Export(ctx context.Context, src Source, req Request) (Done, error) {
	names, err := e.opts.fullNames(src.Metadata)
	if err != nil {
		return Done{}, err
	}
	if e.opts.push && len(names) == 0 {
		return Done{}, errors.New("push needs a name for the image: name=HOST/NAME")
	}
	img, err := assemble(ctx, e.cfg, e.opts, src)
	if err != nil {
		return Done{}, err
	}
	named := e.withDangling(names, img.root.Digest)
	resp, desc, err := img.response(named, time.Now())
	if err != nil {
		return Done{}, err
	}
	done := Done{Response: resp, Descriptor: &desc}
	if e.opts.push {
		done.Finalize = func(ctx context.Context) error { return e.push(ctx, img, names, req) }
	}
	return done, nil
}

// withDangling adds the name that images get for being kept (EXP-016, -017).
func (e *imageExporter) withDangling(names []string, dgst digest.Digest) []string {
	out := slices.Clone(names)
	if p := e.opts.danglingPrefix; p != "" && (len(names) == 0 || !e.opts.danglingIfEmpty) {
		out = append(out, p+"@"+dgst.String())
	}
	return out
}

func untagged(name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name // names were checked when the exporter was made
	}
	return named.Name()
}

// pushesAtOnce bounds the blobs of one image on their way at the same time;
// the registry client bounds what all builds do with one host.
const pushesAtOnce = 6

// push uploads the image under each of its names: layers and configs side by
// side, then manifests, then the root (EXP-058).
func (e *imageExporter) push(ctx context.Context, img *image, names []string, req Request) error {
	r := e.cfg.Registry.Resolver(registry.Access{Sessions: e.cfg.Sessions, Group: req.Group, Insecure: e.opts.insecure})
	for _, name := range names {
		if err := e.pushAs(ctx, r, img, name); err != nil {
			return fmt.Errorf("push %s: %w", name, err)
		}
	}
	return nil
}

func (e *imageExporter) pushAs(ctx context.Context, r *registry.Resolver, img *image, name string) error {
	root := name
	if e.opts.pushByDigest {
		root = untagged(name) + "@" + img.root.Digest.String()
	}
	byDigest := untagged(name)
	scope := progress.From(ctx)
	layersDone := scope.Begin("pushing layers")
	eg, egctx := errgroup.WithContext(ctx)
	eg.SetLimit(pushesAtOnce)
	var manifests []blob
	for _, b := range img.blobs {
		if isManifest(b.desc.MediaType) {
			manifests = append(manifests, b)
			continue
		}
		eg.Go(func() error { return pushBlob(egctx, r, byDigest+"@"+b.desc.Digest.String(), b) })
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	layersDone()
	for _, b := range manifests {
		to := byDigest + "@" + b.desc.Digest.String()
		if b.desc.Digest == img.root.Digest {
			to = root
		}
		done := scope.Begin("pushing manifest for " + to)
		if err := pushBlob(ctx, r, to, b); err != nil {
			return err
		}
		done()
	}
	return nil
}

// pushBlob uploads b. A layer whose bytes aren't here is fetched only if the
// registry neither has it nor can mount it.
func pushBlob(ctx context.Context, r *registry.Resolver, ref string, b blob) error {
	_, err := r.Push(ctx, ref, b.desc, func(ctx context.Context) (io.ReadCloser, error) { return b.open(ctx) })
	return err
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == ocispec.MediaTypeImageIndex ||
		strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.")
}
