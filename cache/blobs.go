package cache

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// keptSources bounds how many builds' sources a record remembers.
const keptSources = 4

// GetByBlob returns a handle on the record of layer on top of parent (nil for
// none). It looks for the same blob chain, then the same chain, and makes a
// new record otherwise. Nothing is fetched before the content is needed; src
// is then asked, and before any source that the record had. A record that was
// lost because its blob couldn't be fetched is good again.
//
// The same chain with another compressed form is a record of its own, which
// exports its own blob and shares the other's snapshot.
func (m *Manager) GetByBlob(ctx context.Context, layer Layer, parent *Ref, src BlobSource, opts Options) (*Ref, error) {
	if err := checkLayer(&layer); err != nil {
		return nil, err
	}
	var parents []*record
	if parent != nil {
		parents = []*record{parent.r}
	}
	r := newRecord(immutable, parents, opts)
	r.diffID = layer.DiffID
	r.blobs = []blob{{desc: layer.Blob}}

	m.mu.Lock()
	if parent != nil {
		m.refreshChainLocked(parent.r)
	}
	r.chain, r.blobChain = chains(r)
	known := m.byBlobChain[r.blobChain]
	if known == nil || r.blobChain == "" {
		m.shareLocked(r)
		if src != nil {
			r.sources = []BlobSource{src}
		}
		m.addLocked(r)
		m.mu.Unlock()
		m.flush(flushChanged)
		return m.newRef(r), nil
	}
	known.handles++
	known.lost = nil
	if src != nil {
		known.sources = append([]BlobSource{src}, known.sources...)
		known.sources = known.sources[:min(len(known.sources), keptSources)]
	}
	changed := mergeAnnotations(&known.blobs[0].desc, layer.Blob.Annotations)
	if changed {
		m.changedLocked(known)
	}
	m.mu.Unlock()
	if changed {
		m.flush(flushChanged)
	}
	return m.newRef(known), nil
}

func checkLayer(l *Layer) error {
	if err := l.Blob.Digest.Validate(); err != nil {
		return fmt.Errorf("layer blob digest %q: %w", l.Blob.Digest, err)
	}
	if l.DiffID == "" && compressionOf(l.Blob.MediaType) == uncompressed {
		l.DiffID = l.Blob.Digest
	}
	if err := l.DiffID.Validate(); err != nil {
		return fmt.Errorf("diff ID %q of layer %s: %w", l.DiffID, l.Blob.Digest, err)
	}
	if l.Blob.Size < 0 {
		return fmt.Errorf("layer %s has the size %d", l.Blob.Digest, l.Blob.Size)
	}
	return nil
}

// distributionSource is how annotations say which repositories of a registry
// have a blob, as a list with commas.
const distributionSource = "containerd.io/distribution.source."

// mergeAnnotations adds what is new in more to desc and reports whether
// anything was.
func mergeAnnotations(desc *ocispec.Descriptor, more map[string]string) bool {
	merged := maps.Clone(desc.Annotations)
	if merged == nil {
		merged = map[string]string{}
	}
	for k, v := range more {
		if old := merged[k]; strings.HasPrefix(k, distributionSource) && old != "" {
			repos := strings.Split(old, ",")
			for repo := range strings.SplitSeq(v, ",") {
				if !slices.Contains(repos, repo) {
					repos = append(repos, repo)
				}
			}
			v = strings.Join(repos, ",")
		}
		merged[k] = v
	}
	if maps.Equal(merged, desc.Annotations) {
		return false
	}
	desc.Annotations = merged
	return true
}

// shareLocked lets r use the snapshot of another record of its chain, and
// reports whether there is one.
func (m *Manager) shareLocked(r *record) bool {
	owner := m.byChain[r.chain]
	if r.chain == "" || owner == nil || owner == r {
		return false
	}
	if owner.twin != nil {
		owner = owner.twin
	}
	r.twin, r.snap = owner, owner.snap
	return true
}

// unuseBlobsLocked lowers the counts of blobs and returns those that nothing
// points at any more. The caller holds blobsMu, and passes them to removeBlobs
// before it lets go of it.
func (m *Manager) unuseBlobsLocked(blobs []blob) (free []digest.Digest) {
	for i := range blobs {
		free = m.unuseBlobLocked(free, blobs[i].desc.Digest)
	}
	return free
}

func (m *Manager) unuseBlobLocked(free []digest.Digest, d digest.Digest) []digest.Digest {
	m.blobUse[d]--
	if m.blobUse[d] > 0 {
		return free
	}
	delete(m.blobUse, d)
	delete(m.proven, d)
	return append(free, d)
}

// removeBlobs adds the removal of blobs to b.
func (m *Manager) removeBlobs(b *store.Batch, digests []digest.Digest) (problems []error) {
	for _, d := range digests {
		if err := m.blobs.Remove(b, d); err != nil {
			problems = append(problems, fmt.Errorf("remove blob %s: %w", d, err))
		}
	}
	return problems
}

// storeBlob ends an ingest and makes the blob r's. desc is what it must be
// like; a digest and size that it lacks are filled in. diffID is that of the
// bytes, "" if they aren't compressed.
func (m *Manager) storeBlob(r *record, w *snapshot.BlobWriter, desc ocispec.Descriptor, diffID digest.Digest) error {
	m.blobsMu.RLock()
	info, err := w.Commit(desc.Size, desc.Digest)
	if err == nil {
		desc.Digest, desc.Size = info.Digest, info.Size
		m.mu.Lock()
		if r.diffID == "" {
			r.diffID = cmp.Or(diffID, info.Digest)
		}
		m.attachLocked(r, desc, info.Disk)
		r.sources = nil // lost again, the record gets a new one
		m.proven[info.Digest] = proof{info.Version, time.Now()}
		m.mu.Unlock()
	}
	m.blobsMu.RUnlock()
	if err != nil {
		return err
	}
	m.flush(flushChanged)
	m.grown()
	return nil
}

// attachLocked notes that the stored blob desc, which takes disk bytes, is a
// form of r.
func (m *Manager) attachLocked(r *record, desc ocispec.Descriptor, disk int64) {
	if b := r.findBlob(desc.Digest); b != nil {
		if !b.stored {
			b.stored, b.desc.Size, b.disk = true, desc.Size, disk
			m.changedLocked(r)
		}
		return
	}
	r.blobs = append(r.blobs, blob{desc: desc, stored: true, disk: disk})
	m.blobUse[desc.Digest]++
	m.indexChainLocked(r)
	m.changedLocked(r)
}

// stored reports whether the blob is in the store. r lists it, so that it stays
// there: one that is about to go with the last record that listed it before r did
// has gone.
func (m *Manager) stored(r *record, d digest.Digest) bool {
	m.blobsMu.RLock()
	info, err := m.blobs.Stat(d)
	m.blobsMu.RUnlock()
	found := err == nil
	m.mu.Lock()
	b := r.findBlob(d)
	changed := b != nil && b.stored != found
	if changed {
		b.stored, b.disk = found, info.Disk
		m.changedLocked(r)
	}
	m.mu.Unlock()
	if changed && !found {
		m.log.Warn("stored blob is gone", "blob", d, "record", r.id, "description", r.opts.Description, "error", err)
	}
	if changed {
		m.flush(flushChanged)
	}
	return found
}

// dropBlob removes a stored blob that turned out corrupt.
func (m *Manager) dropBlob(d digest.Digest, why error) {
	m.writes.Lock()
	defer m.writes.Unlock()
	m.blobsMu.Lock()
	defer m.blobsMu.Unlock()
	m.mu.Lock()
	for _, r := range m.records {
		if b := r.findBlob(d); b != nil && b.stored {
			b.stored = false
			m.changedLocked(r)
		}
	}
	delete(m.proven, d)
	m.mu.Unlock()
	m.log.Warn("stored blob is corrupt or gone, removed it", "blob", d, "error", why)
	b := &store.Batch{}
	if err := joinProblems("remove corrupt blob", m.removeBlobs(b, []digest.Digest{d})); err != nil {
		m.log.Error("remove corrupt blob", "blob", d, "error", err)
	}
	m.putLocked(b, flushChanged, nil)
	m.db.Write(b)
}

// EnsureBlob makes sure that one of the blobs named by Layers is in the blob
// store, where it stays while the handle is held: a lazy one is fetched.
// ErrLost if it can't be had.
func (r *Ref) EnsureBlob(ctx context.Context, desc ocispec.Descriptor) error {
	if r == nil {
		return fmt.Errorf("blob %s isn't a layer of an empty record", desc.Digest)
	}
	for _, l := range r.r.stack() {
		r.m.mu.Lock()
		b := l.findBlob(desc.Digest)
		var d ocispec.Descriptor
		if b != nil {
			d = b.desc
		}
		r.m.mu.Unlock()
		if b != nil {
			return r.m.ensureBlob(ctx, l, d, nil)
		}
	}
	return fmt.Errorf("blob %s isn't a layer of %s", desc.Digest, r.r.id)
}
