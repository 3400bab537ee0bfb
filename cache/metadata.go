package cache

import (
	"strings"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
)

// longestKey is from where on metadata is stored under its key's digest: the
// store refuses very long keys.
const longestKey = 512

// metadataKey is where metadata of the record born as birth is stored.
func metadataKey(birth, key string) string {
	if len(key) > longestKey {
		key = digest.FromString(key).String()
	}
	return birth + "/" + key
}

// metaValue is metadata that is not in the store yet; nil data is a removal.
type metaValue struct{ data []byte }

func (m *Manager) metadata(r *record, key string) ([]byte, bool) {
	m.mu.Lock()
	v, ok := r.meta[key]
	birth := r.birth
	m.mu.Unlock()
	if ok {
		return v.data, v.data != nil
	}
	return m.db.Get(bucketMetadata, metadataKey(birth, key))
}

func (m *Manager) setMetadata(r *record, key string, value []byte) {
	m.mu.Lock()
	if r.meta == nil {
		r.meta = map[string]*metaValue{}
	}
	r.meta[key] = &metaValue{value}
	if r.state == mutable {
		r.open = true
	}
	m.changedLocked(r)
	m.mu.Unlock()
	m.flush(flushChanged)
}

func (m *Manager) hasMetadata(r *record) bool {
	m.mu.Lock()
	found := len(r.meta) > 0
	birth := r.birth
	m.mu.Unlock()
	if !found {
		m.db.Scan(bucketMetadata, birth+"/", func(string, []byte) bool {
			found = true
			return false
		})
	}
	return found
}

// deleteMetadata adds to b the removal of everything that is stored beside the
// records of these births.
func (m *Manager) deleteMetadata(b *store.Batch, births ...string) {
	m.db.Read(func(in *store.Reader) {
		for _, birth := range births {
			in.Scan(bucketMetadata, birth+"/", func(key string, _ []byte) bool {
				b.Delete(bucketMetadata, key)
				return true
			})
		}
	})
}

// DropStrayMetadata removes metadata that belongs to no record, of which there is
// none unless the database was damaged, and returns how much it was. Nothing else
// may use the cache at the time.
func (m *Manager) DropStrayMetadata() (dropped int) {
	b := &store.Batch{}
	m.strayMetadata(func(key string) {
		dropped++
		b.Delete(bucketMetadata, key)
	})
	m.db.Write(b)
	return dropped
}

func (m *Manager) strayMetadata(fn func(key string)) {
	births := map[string]bool{}
	m.mu.Lock()
	for _, r := range m.records {
		births[r.birth] = true
	}
	m.mu.Unlock()
	m.db.Scan(bucketMetadata, "", func(key string, _ []byte) bool {
		if birth, _, _ := strings.Cut(key, "/"); !births[birth] {
			fn(key)
		}
		return true
	})
}
