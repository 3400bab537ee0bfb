package cache

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
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

	written store.Mark
}

func (i Image) equal(other Image) bool {
	return reflect.DeepEqual(i.Descriptor, other.Descriptor) && slices.Equal(i.Blobs, other.Blobs) && slices.Equal(i.Refs, other.Refs)
}

const longestName = 4096

// SetImage names an image, or moves the name to another. All its blobs must be
// stored, or the error is ErrLost, and the caller keeps them (by handles or Hold)
// until SetImage returns.
// Records that don't exist are left out. Nothing is written if the name is that of
// the same image already.
func (m *Manager) SetImage(name string, img Image) error {
	if name == "" || len(name) > longestName {
		return fmt.Errorf("name image %.60q: the name has %d characters, not 1 to %d", name, len(name), longestName)
	}
	img.Blobs = slices.Compact(slices.Sorted(slices.Values(img.Blobs)))
	for _, d := range img.Blobs {
		if _, err := m.blobs.Stat(d); err != nil {
			return fmt.Errorf("%w: name image %q: blob %s: %w", ErrLost, name, d, err)
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
	if old, there := m.Image(name); there && old.equal(img) {
		return nil
	}
	value, err := json.Marshal(img)
	if err != nil {
		return fmt.Errorf("name image %q: %w", name, err)
	}
	b.Put(bucketImages, name, value)
	return m.swapImage(b, name, &img)
}

// AwaitImage waits until the image of that name is on the disk. The error is
// ErrLost if the disk has lost it, or a record of it: it can be made again.
func (m *Manager) AwaitImage(ctx context.Context, name string) error {
	m.blobsMu.Lock() // until it is written
	img, there := m.Image(name)
	m.blobsMu.Unlock()
	if there {
		if err := m.db.Durable(ctx, img.written); err != nil {
			return fmt.Errorf("store image %q: %w", name, err)
		}
		now, still := m.Image(name) // what is lost loses its name
		there = still && now.Descriptor.Digest == img.Descriptor.Digest
	}
	if !there {
		return fmt.Errorf("%w: image %q isn't stored any more", ErrLost, name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range img.Refs {
		if r := m.records[id]; r == nil || r.lost != nil {
			return fmt.Errorf("%w: record %s of image %q", ErrLost, id, name)
		}
	}
	return nil
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
	mark := m.db.Write(b)
	if img != nil {
		m.mu.Lock()
		img.written = mark
		m.images[name] = *img
		m.mu.Unlock()
	}
	return joinProblems(fmt.Sprintf("replace image %q", name), problems)
}
