package cache

import (
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"
)

// Offer lets lazy layers get the blobs from src, whichever record they are of: one
// that an earlier build has made, too, whose sources ended with that build. It
// holds until release is called.
func (m *Manager) Offer(blobs []digest.Digest, src BlobSource) (release func()) {
	blobs = slices.Compact(slices.Sorted(slices.Values(blobs)))
	m.mu.Lock()
	for _, d := range blobs {
		m.offers[d] = append(m.offers[d], src)
	}
	m.mu.Unlock()
	return sync.OnceFunc(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, d := range blobs {
			m.offers[d] = slices.DeleteFunc(slices.Clone(m.offers[d]), func(s BlobSource) bool { return s == src })
			if len(m.offers[d]) == 0 {
				delete(m.offers, d)
			}
		}
	})
}
