package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/rootless"
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

	filename       string
	perm, uid, gid int
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
	if v, ok := attrs[pb.AttrHTTPFilename]; ok {
		b.filename = safeName(v)
	}
	for attr, to := range map[string]*int{pb.AttrHTTPPerm: &b.perm, pb.AttrHTTPUID: &b.uid, pb.AttrHTTPGID: &b.gid} {
		if v, ok := attrs[attr]; ok {
			n, err := strconv.ParseInt(v, 0, 64)
			if err != nil || n < 0 || n > 1<<32-1 {
				return nil, fmt.Errorf("%s of blob %s: %q isn't a number in range", attr, ref, v)
			}
			*to = int(n)
		}
	}
	return b, nil
}

// safeName is what is left of a name once it can't lead anywhere.
func safeName(s string) string {
	name := path.Base(strings.TrimSpace(s))
	if name == "." || name == ".." || name == "/" || strings.ContainsFunc(name, unicode.IsControl) {
		return "download"
	}
	return name
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
	}{"v1", b.digest, b.filename, b.perm, b.uid, b.gid})
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

func (b *Blob) write(ctx context.Context, g session.Group, u *cache.Mutable) (err error) {
	defer progress.From(ctx).Begin("fetch " + b.digest.String())()
	view, err := u.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	root, err := os.OpenRoot(view.Path())
	if err != nil {
		return err
	}
	defer root.Close()

	name, perm := b.filename, os.FileMode(0o600)
	if name == "" {
		name = b.digest.Encoded()
	}
	if b.perm != 0 {
		perm = unixMode(b.perm)
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := b.copy(ctx, g, f); err != nil {
		return err
	}
	if err := f.Chown(b.uid, b.gid); err != nil {
		return rootless.Here().Explain(err, b.uid, b.gid)
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	return root.Chtimes(name, time.Unix(0, 0), time.Unix(0, 0))
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

// unixMode is the file mode of the permission bits that chmod knows.
func unixMode(bits int) os.FileMode {
	m := os.FileMode(bits & 0o777)
	if bits&0o4000 != 0 {
		m |= os.ModeSetuid
	}
	if bits&0o2000 != 0 {
		m |= os.ModeSetgid
	}
	if bits&0o1000 != 0 {
		m |= os.ModeSticky
	}
	return m
}
