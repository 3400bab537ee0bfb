package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"

	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// annotationDiffID is how a layer's descriptor carries its diff ID between
// caches. It isn't meant for manifests.
const annotationDiffID = "containerd.io/uncompressed"

// blobKey names a blob that is being made.
type blobKey struct {
	r           *record
	compression string
	level       int
}

// Layers returns the stack of layers, lowest first, as blobs. Blobs that don't
// exist are made in one pass (tar, diff ID, compressor, digest), side by side.
// Lazy layers stay lazy: their descriptors are returned without fetching, and
// EnsureBlob or OpenBlob gets their bytes.
//
// A layer that exists in the wanted compression is given in that; one that
// exists in others only is given as it came, or converted if c.Force is set.
// The descriptors carry the diff ID as the annotation containerd.io/uncompressed.
func (r *Ref) Layers(ctx context.Context, c Compression) ([]Layer, error) {
	c, err := c.normalise()
	if err != nil || r == nil {
		return nil, err
	}
	var out []Layer
	err = r.m.WithRoom(ctx, func() (err error) {
		out, err = r.pack(ctx, c)
		return err
	})
	return out, err
}

// pack makes the layers that aren't blobs yet.
func (r *Ref) pack(ctx context.Context, c Compression) ([]Layer, error) {
	m, stack := r.m, r.r.stack()
	out := make([]Layer, len(stack))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, l := range stack {
		g.Go(func() (err error) {
			out[i], err = m.layer(gctx, l, c)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	m.refreshChainLocked(r.r)
	m.mu.Unlock()
	return out, nil
}

// layer returns l as a blob.
func (m *Manager) layer(ctx context.Context, l *record, c Compression) (Layer, error) {
	desc, ok := m.existing(l, c)
	if !ok {
		key := blobKey{l, c.Type, defaultLevel}
		if c.Level != nil {
			key.level = *c.Level
		}
		err := m.making.do(ctx, key, func(ctx context.Context) error {
			if _, ok := m.existing(l, c); ok {
				return nil
			}
			if desc.Digest != "" {
				return m.convert(ctx, l, desc, c)
			}
			return m.make(ctx, l, c)
		})
		if err != nil {
			return Layer{}, err
		}
		if desc, ok = m.existing(l, c); !ok {
			return Layer{}, fmt.Errorf("%w: the %s blob of %s went as soon as it was made", ErrLost, c.Type, l.id)
		}
	}
	m.mu.Lock()
	diffID := l.diffID
	m.mu.Unlock()
	desc.MediaType = retype(desc.MediaType, c.OCI)
	desc.Annotations = maps.Clone(desc.Annotations)
	if desc.Annotations == nil {
		desc.Annotations = map[string]string{}
	}
	desc.Annotations[annotationDiffID] = diffID.String()
	return Layer{Blob: desc, DiffID: diffID}, nil
}

// existing returns the blob of l that serves c; if there is none, the one to
// convert, if there is one.
func (m *Manager) existing(l *record, c Compression) (desc ocispec.Descriptor, ok bool) {
	for _, b := range m.usable(l) {
		kind := compressionOf(b.MediaType)
		if kind == c.Type {
			return b, true
		}
		if desc.Digest == "" {
			desc = b
			ok = !c.Force || kind == ""
		}
	}
	return desc, ok
}

// usable returns the blobs of l that are stored or can be fetched. A blob that
// is neither, of a layer that has files, is made again from them.
func (m *Manager) usable(l *record) (out []ocispec.Descriptor) {
	m.mu.Lock()
	descs := make([]ocispec.Descriptor, len(l.blobs))
	for i, b := range l.blobs {
		descs[i] = b.desc
	}
	fetchable := len(l.sources) > 0 || l.snap == ""
	m.mu.Unlock()
	for i, d := range descs {
		// Only the first form is known to sources.
		if m.stored(l, d.Digest) || i == 0 && fetchable {
			out = append(out, d)
		}
	}
	return out
}

// make packs the files of l.
func (m *Manager) make(ctx context.Context, l *record, c Compression) error {
	snap := m.snapOf(l)
	if snap == "" {
		return m.lose(l, fmt.Errorf("%w: %s has neither files nor a blob", ErrLost, l.id))
	}
	err := m.pack(l, c, func(w io.Writer) error { return snapshot.WriteDiff(ctx, m.snapshots, snap, w) })
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrLost):
		// The files are there: who stands on them has to be told.
		err = fmt.Errorf("make %s blob of %s: %w", c.Type, l.id, err)
		m.distrustSnapshot(snap, err)
		return err
	}
	return m.lostSnapshot(ctx, l, fmt.Errorf("make %s blob of %s: %w", c.Type, l.id, err))
}

// convert packs what the stored or fetched blob from holds.
func (m *Manager) convert(ctx context.Context, l *record, from ocispec.Descriptor, c Compression) error {
	if err := m.ensureBlob(ctx, l, from, nil); err != nil {
		return err
	}
	rc, err := m.openStored(ctx, from)
	if err != nil {
		return err
	}
	defer rc.Close()
	err = m.pack(l, c, func(w io.Writer) error {
		tar, err := decompress(rc)
		if err != nil {
			return err
		}
		defer tar.Close()
		_, err = io.Copy(w, &interruptible{ctx, tar})
		return err
	})
	if err != nil {
		// Bytes that can't be unpacked are the wrong ones, or not: their digest
		// tells, once all are read.
		if _, rest := io.Copy(io.Discard, &interruptible{ctx, rc}); errors.Is(rest, ErrLost) {
			err = rest
		}
		return fmt.Errorf("convert layer %s to %s: %w", from.Digest, c.Type, err)
	}
	return nil
}

// pack stores what fill writes, compressed, as a blob of l. The bytes must be
// those that l's diff ID names, if that is known.
func (m *Manager) pack(l *record, c Compression, fill func(io.Writer) error) error {
	w, err := m.blobs.Create()
	if err != nil {
		return err
	}
	defer w.Close()
	m.mu.Lock()
	known := l.diffID
	m.mu.Unlock()
	desc := ocispec.Descriptor{MediaType: layerType{compression: c.Type}.mediaType(true)}
	if c.Type == uncompressed && known == "" {
		if err := fill(w); err != nil {
			return err
		}
		err := m.storeBlob(l, w, desc, "")
		return err
	}
	algorithm := digest.Canonical
	if known != "" {
		algorithm = known.Algorithm()
	}
	diffID := algorithm.Digester()
	err = compress(c, w, func(z io.Writer) error { return fill(io.MultiWriter(diffID.Hash(), z)) })
	if err != nil {
		return err
	}
	if got := diffID.Digest(); known != "" && got != known {
		return fmt.Errorf("%w: its files no longer give the diff ID %s but %s", ErrLost, known, got)
	}
	err = m.storeBlob(l, w, desc, diffID.Digest())
	return err
}

// interruptible ends reading when its context does.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i *interruptible) Read(p []byte) (int, error) {
	if i.ctx.Err() != nil {
		return 0, context.Cause(i.ctx)
	}
	return i.r.Read(p)
}
