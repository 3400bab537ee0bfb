package image

import (
	"context"
	"fmt"
	"io"

	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxManifest bounds manifests and configs; registries take half of that.
const maxManifest = 8 << 20

// Origin is where the bytes of an image are: a registry, or a client's store.
// It asks the sessions of whoever needs something. Bytes aren't verified.
type Origin interface {
	// Resolve says what the image's reference stands for.
	Resolve(ctx context.Context, g session.Group) (ocispec.Descriptor, error)
	// Open opens what desc names. A size of -1 is an unknown one.
	Open(ctx context.Context, g session.Group, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// owned is an Origin that can tell clients apart by what it uses of theirs.
type owned interface {
	// Owner is the same for clients on whose behalf the same place is asked
	// with the same credentials.
	Owner(ctx context.Context, g session.Group) (string, error)
}

// sharingKey is that of an ops.SharedSource: who can't be told apart from
// others by their credentials, because their own store is read, shares with
// nobody but the same sessions.
func sharingKey(ctx context.Context, o Origin, g session.Group) (string, error) {
	if ow, ok := o.(owned); ok {
		return ow.Owner(ctx, g)
	}
	return fmt.Sprintf("sessions %q", session.AllSessionIDs(g)), nil
}

// registryOrigin is a reference in a registry.
type registryOrigin struct {
	client   *registry.Client
	sessions *session.Manager
	ref      registry.Reference
}

func (o *registryOrigin) resolver(g session.Group) *registry.Resolver {
	return o.client.Resolver(registry.Access{Sessions: o.sessions, Group: g})
}

// Resolve asks the registry, about a digest, too: a manifest has to be asked for
// by its media type, and registries deny those that aren't named.
func (o *registryOrigin) Resolve(ctx context.Context, g session.Group) (ocispec.Descriptor, error) {
	desc, _, err := o.resolve(ctx, g)
	return desc, err
}

// resolve is Resolve that says whose credentials it took.
func (o *registryOrigin) resolve(ctx context.Context, g session.Group) (ocispec.Descriptor, []string, error) {
	r := o.resolver(g)
	_, desc, err := r.Resolve(ctx, o.ref.String())
	return desc, r.Readers(), err
}

// Owner names the repository, so that a client's pull doesn't go where another's
// would have gone, and whose credentials it uses.
func (o *registryOrigin) Owner(ctx context.Context, g session.Group) (string, error) {
	owners, err := o.client.Owners(ctx, registry.Access{Sessions: o.sessions, Group: g}, o.ref)
	if err != nil {
		return "", fmt.Errorf("%s: %w", o.ref, err)
	}
	return o.ref.Name() + " " + owners, nil
}

func (o *registryOrigin) Open(ctx context.Context, g session.Group, desc ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := o.resolver(g).Fetcher(ctx, o.ref.String())
	if err != nil {
		return nil, err
	}
	return f.Fetch(ctx, desc)
}

// blobSource opens layers with the sessions of those who wait for them.
type blobSource struct {
	origin Origin
	g      session.Group
}

func (s blobSource) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return s.origin.Open(ctx, s.g, desc)
}

// read returns the verified bytes of a manifest or config.
func read(ctx context.Context, g session.Group, o Origin, ref string, desc ocispec.Descriptor) (_ []byte, err error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%s names a blob with the digest %q: %w", ref, desc.Digest, err)
	}
	if desc.Size > maxManifest {
		return nil, fmt.Errorf("%s: %s has %d bytes, more than the %d that manifests and configs may have", ref, desc.Digest, desc.Size, maxManifest)
	}
	if desc.MediaType == "" { // of a layout, which keeps all blobs alike
		desc.MediaType = ocispec.MediaTypeImageIndex
	}
	rc, err := o.Open(ctx, g, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	data, err := io.ReadAll(io.LimitReader(rc, maxManifest+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxManifest {
		return nil, fmt.Errorf("%s: %s has more than the %d bytes that manifests and configs may have", ref, desc.Digest, maxManifest)
	}
	if got := desc.Digest.Algorithm().FromBytes(data); got != desc.Digest {
		return nil, fmt.Errorf("%s: asked for %s, got content with the digest %s", ref, desc.Digest, got)
	}
	return data, nil
}
