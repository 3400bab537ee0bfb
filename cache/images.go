package cache

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is a user's mark: its blobs stay until it is removed, and its records
// are shared, which a prune without All leaves alone (CTL-105, -108).
type Image struct {
	Descriptor ocispec.Descriptor `json:"d"`
	Blobs      []digest.Digest    `json:"b,omitempty"` // all that it is made of, the manifest included
	Refs       []string           `json:"r,omitempty"` // records that hold its content
}

const longestName = 4096

// SetImage names an image, or moves the name to another. All its blobs must be
// stored, and the caller keeps them (by handles or Hold) until SetImage returns.
// Records that don't exist are left out.
func (m *Manager) SetImage(name string, img Image) error {
	if name == "" || len(name) > longestName {
		return fmt.Errorf("name image %.60q: the name has %d characters, not 1 to %d", name, len(name), longestName)
	}
	img.Blobs = slices.Compact(slices.Sorted(slices.Values(img.Blobs)))
	for _, d := range img.Blobs {
		if _, err := m.blobs.Stat(d); err != nil {
			return fmt.Errorf("name image %q: blob %s: %w", name, d, err)
		}
	}
	b := &store.Batch{}
	for _, d := range img.Blobs {
		if err := m.blobs.Persist(b, d); err != nil {
			return fmt.Errorf("name image %q: blob %s: %w", name, d, err)
		}
	}
	var refs []*Ref
	defer func() {
		for _, r := range refs {
			r.Release()
		}
	}()
	m.mu.Lock()
	for _, id := range img.Refs {
		if r := m.records[id]; r != nil && r.state == immutable {
			r.handles++
			refs = append(refs, m.newRef(r))
		}
	}
	m.mu.Unlock()
	img.Refs = nil
	for _, r := range refs {
		if err := r.Persist(b); err != nil {
			return fmt.Errorf("name image %q: %w", name, err)
		}
		img.Refs = append(img.Refs, r.ID())
	}
	value, err := json.Marshal(img)
	if err != nil {
		return fmt.Errorf("name image %q: %w", name, err)
	}
	b.Put(bucketImages, name, value)
	return m.swapImage(b, name, &img)
}

// Image returns the image of that name.
func (m *Manager) Image(name string) (Image, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	img, ok := m.images[name]
	return img, ok
}

// Images returns the names of all images, sorted.
func (m *Manager) Images() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.images))
}

// RemoveImage forgets the name. What only it kept goes; its records are left
// to the prune policies. A missing name is fine.
func (m *Manager) RemoveImage(name string) error {
	b := &store.Batch{}
	b.Delete(bucketImages, name)
	return m.swapImage(b, name, nil)
}

// swapImage replaces the image of that name in memory and writes b.
func (m *Manager) swapImage(b *store.Batch, name string, img *Image) error {
	m.blobsMu.Lock()
	defer m.blobsMu.Unlock()
	var free []digest.Digest
	m.mu.Lock()
	old := m.images[name]
	delete(m.images, name)
	if img != nil {
		m.images[name] = *img
		for _, d := range img.Blobs {
			m.blobUse[d]++
		}
	}
	for _, d := range old.Blobs {
		free = m.unuseBlobLocked(free, d)
	}
	m.mu.Unlock()
	problems := m.removeBlobs(b, free)
	m.db.Write(b)
	return joinProblems(fmt.Sprintf("replace image %q", name), problems)
}
