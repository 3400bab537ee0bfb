package cache

import "github.com/opencontainers/go-digest"

// Totals sum up the cache.
type Totals struct {
	Records map[RecordType]int
	// Bytes are those of blobs, and of snapshots that were measured already.
	Bytes      int64
	Unmeasured int // records whose snapshot wasn't
	// Evictions are those since the start, and EvictedBytes what they freed.
	Evictions, EvictedBytes int64
}

// Totals counts records as they are. It reads no files, unlike DiskUsage.
func (m *Manager) Totals() Totals {
	t := Totals{Records: map[RecordType]int{}, Evictions: m.evictions.Load(), EvictedBytes: m.evictedBytes.Load()}
	blobs := map[digest.Digest]struct{}{}
	m.eachRecord(func(r *record) {
		t.Records[r.opts.Type]++
		switch {
		case !r.owns(), r.state == mutable && r.handles > 0:
		case r.snapSize == sizeUnknown:
			t.Unmeasured++
		default:
			t.Bytes += r.snapSize
		}
		for _, b := range r.blobs {
			if _, counted := blobs[b.desc.Digest]; b.stored && !counted {
				blobs[b.desc.Digest] = struct{}{}
				t.Bytes += b.disk
			}
		}
	})
	return t
}
