package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/source/onefile"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Blob is the source of one blob as a file (LLB-095, LLB-097): an
// ops.SourceInstance for whatever Origin.
type Blob struct {
	cache  *cache.Manager
	ref    string
	digest digest.Digest
	typ    cache.RecordType
	origin Origin

	file onefile.Attrs
}

// NewBlob returns a source of the blob that ref names by digest.
func NewBlob(c *cache.Manager, ref string, attrs map[string]string, origin Origin) (*Blob, error) {
	name, dgst, ok := strings.Cut(ref, "@")
	if !ok || strings.Contains(path.Base(name), ":") {
		return nil, fmt.Errorf("blob reference %q must name the blob by digest, without a tag", ref)
	}
	b := &Blob{cache: c, ref: ref, origin: origin}
	var err error
	if b.digest, err = digest.Parse(dgst); err != nil {
		return nil, fmt.Errorf("blob reference %q: %w", ref, err)
	}
	if b.typ, err = parseRecordType(attrs[pb.AttrImageRecordType]); err != nil {
		return nil, err
	}
	if b.file, err = onefile.ParseAttrs(attrs); err != nil {
		return nil, fmt.Errorf("blob %s: %w", ref, err)
	}
	return b, nil
}

// CacheKey is known without asking anyone. It is upstream's, byte for byte.
func (b *Blob) CacheKey(ctx context.Context, g session.Group, index int) (string, bool, error) {
	if index != 0 {
		return "", false, fmt.Errorf("internal error: key %d of blob %s, which has one", index, b.ref)
	}
	raw, err := json.Marshal(struct {
		Version        string
		Digest         digest.Digest
		Filename       string
		Perm, UID, GID int
	}{"v1", b.digest, b.file.Name, b.file.Perm, b.file.UID, b.file.GID})
	if err != nil {
		return "", false, fmt.Errorf("encode cache key: %w", err)
	}
	return digest.FromBytes(raw).String(), false, nil
}

// SharingKey implements ops.SharedSource.
func (b *Blob) SharingKey(ctx context.Context, g session.Group) (string, error) {
	return sharingKey(ctx, b.origin, g)
}

// Fetch writes the blob to a file, and verifies it.
func (b *Blob) Fetch(ctx context.Context, g session.Group) (_ *cache.Ref, err error) {
	u, err := b.cache.New(ctx, nil, cache.Options{Description: "blob " + b.ref, Type: b.typ})
	if err != nil {
		return nil, fmt.Errorf("make record for blob %s: %w", b.ref, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Discard(context.WithoutCancel(ctx)))
		}
	}()
	if err := b.write(ctx, g, u); err != nil {
		return nil, fmt.Errorf("blob %s: %w", b.ref, err)
	}
	ref, err := u.Commit(ctx)
	if err != nil {
		return nil, fmt.Errorf("commit blob %s: %w", b.ref, err)
	}
	return ref, nil
}

func (b *Blob) write(ctx context.Context, g session.Group, u *cache.Mutable) error {
	defer progress.From(ctx).Begin("fetch " + b.digest.String())()
	name := b.file.Name
	if name == "" {
		name = b.digest.Encoded()
	}
	return b.file.Write(ctx, u, name, time.Unix(0, 0), func(w io.Writer) error { return b.copy(ctx, g, w) })
}

func (b *Blob) copy(ctx context.Context, g session.Group, w io.Writer) (err error) {
	rc, err := b.origin.Open(ctx, g, ocispec.Descriptor{Digest: b.digest, Size: -1})
	if err != nil {
		return err
	}
	defer rc.Close()
	h := b.digest.Algorithm().Digester()
	if _, err := io.Copy(io.MultiWriter(w, h.Hash()), rc); err != nil {
		return err
	}
	if got := h.Digest(); got != b.digest {
		return fmt.Errorf("got content with the digest %s", got)
	}
	return nil
}
