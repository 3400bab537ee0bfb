package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// OpenBlob opens one of the blobs named by Layers. A lazy one is fetched into
// the blob store first. It is verified while it is read, unless that was done,
// or the blob was stored, a moment ago and the file is the same: its last Read
// returns ErrLost if the bytes have changed.
func (r *Ref) OpenBlob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := r.EnsureBlob(ctx, desc); err != nil {
		return nil, err
	}
	rc, err := r.m.openStored(ctx, desc)
	if err != nil {
		return nil, err
	}
	return rc, nil
}

// VerifyBlob makes sure that OpenBlob will give the right bytes to the last one:
// it fetches a lazy blob, and reads one that OpenBlob would verify. ErrLost if
// they have changed; the next Layers makes the blob anew.
func (r *Ref) VerifyBlob(ctx context.Context, desc ocispec.Descriptor) error {
	rc, err := r.OpenBlob(ctx, desc)
	if err != nil {
		return err
	}
	defer rc.Close()
	if b := rc.(*blobReader); b.verifier == nil {
		return nil
	}
	_, err = io.Copy(io.Discard, &interruptible{ctx, rc})
	return err
}

// openStored opens a blob that is in the store.
func (m *Manager) openStored(ctx context.Context, desc ocispec.Descriptor) (*blobReader, error) {
	ra, err := m.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest})
	if errors.Is(err, snapshot.ErrNotFound) {
		return nil, fmt.Errorf("%w: open blob %s: %w", ErrLost, desc.Digest, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", desc.Digest, err)
	}
	if desc.Size > 0 && ra.Size() != desc.Size {
		size := ra.Size()
		ra.Close()
		why := fmt.Errorf("%w: stored blob %s has %d bytes instead of %d", ErrLost, desc.Digest, size, desc.Size)
		m.dropBlob(desc.Digest, why)
		return nil, why
	}
	v := &blobReader{Reader: io.NewSectionReader(ra, 0, ra.Size()), Closer: ra, m: m, digest: desc.Digest}
	info, err := m.blobs.Stat(desc.Digest)
	if err != nil { // or it went meanwhile, and is read to its end nevertheless
		info = snapshot.BlobInfo{}
	}
	m.mu.Lock()
	p := m.proven[desc.Digest]
	m.mu.Unlock()
	if v.version = info.Version; !p.holds(v.version) {
		v.verifier = desc.Digest.Verifier()
	}
	return v, nil
}

// proof is that a stored blob had the right bytes: as the file was, and when.
type proof struct {
	version snapshot.FileVersion
	at      time.Time
}

// proofAge is how long a proof holds. Any write to the file ends it sooner. What
// a bad disk does leaves no trace, but what was written or read a moment ago
// comes from memory.
const proofAge = time.Minute

func (p proof) holds(now snapshot.FileVersion) bool {
	return now != (snapshot.FileVersion{}) && p.version == now && time.Since(p.at) < proofAge
}

// blobReader reads a stored blob and, when it has a verifier and is read from
// start to end, verifies it.
type blobReader struct {
	io.Reader
	io.Closer
	m        *Manager
	digest   digest.Digest
	version  snapshot.FileVersion
	verifier digest.Verifier
}

func (v *blobReader) Read(p []byte) (int, error) {
	n, err := v.Reader.Read(p)
	if v.verifier == nil {
		return n, err
	}
	v.verifier.Write(p[:n])
	if err != io.EOF {
		return n, err
	}
	if !v.verifier.Verified() {
		why := fmt.Errorf("%w: stored blob %s doesn't match its digest", ErrLost, v.digest)
		v.m.dropBlob(v.digest, why)
		v.verifier = nil
		return n, why
	}
	v.verifier = nil
	v.m.mu.Lock()
	v.m.proven[v.digest] = proof{v.version, time.Now()}
	v.m.mu.Unlock()
	return n, io.EOF
}
