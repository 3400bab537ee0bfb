package image

import (
	"cmp"
	"encoding/json"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	bucket = "image.known"
	// maxKnown entries, of a few KB each, are kept; when there are more, the
	// older half goes.
	maxKnown = 4000
	// maxKnownSize keeps unusual documents out.
	maxKnownSize = 1 << 20
)

// known remembers manifests and configs by their digest, so that a reference
// with a digest needs no registry, and what tags stood for when last asked.
// An entry is only for the repository it was read from: knowing the digest of
// a private image doesn't give access to it by another name. Knowing its tag
// gives none at all: it is for clients with the credentials that it was read with.
type known struct {
	db *store.DB

	mu    sync.Mutex // guards count
	count int
}

// entry is a blob or, without Data, a tag.
type entry struct {
	Digest    digest.Digest
	MediaType string
	Size      int64
	Data      []byte `json:",omitempty"`
	// Public is a tag that was read with nobody's credentials, Readers are whose
	// they were, which only that process knows. Older daemons left both out.
	Public  bool     `json:",omitempty"`
	Readers []string `json:",omitempty"`
	Used    int64    // unix seconds, to the day
}

func openKnown(db *store.DB) *known {
	k := &known{db: db}
	db.Scan(bucket, "", func(string, []byte) bool { k.count++; return true })
	return k
}

func blobKey(name string, d digest.Digest) string { return "blob " + name + " " + d.String() }
func tagKey(ref string) string                    { return "tag " + ref }

// blob returns the bytes and descriptor of d as read from repository name.
func (k *known) blob(name string, d digest.Digest) ([]byte, ocispec.Descriptor, bool) {
	e, ok := k.get(blobKey(name, d))
	if !ok || d.Validate() != nil || d.Algorithm().FromBytes(e.Data) != d {
		return nil, ocispec.Descriptor{}, false
	}
	return e.Data, ocispec.Descriptor{Digest: d, MediaType: e.MediaType, Size: int64(len(e.Data))}, true
}

func (k *known) putBlob(name string, desc ocispec.Descriptor, data []byte) {
	if len(data) <= maxKnownSize {
		k.put(blobKey(name, desc.Digest), entry{Digest: desc.Digest, MediaType: desc.MediaType, Data: data})
	}
}

// tag returns what ref stood for when it was last resolved, and with whose
// credentials that was.
func (k *known) tag(ref string) (ocispec.Descriptor, []string, bool) {
	e, ok := k.get(tagKey(ref))
	ok = ok && (e.Public || len(e.Readers) > 0)
	return ocispec.Descriptor{Digest: e.Digest, MediaType: e.MediaType, Size: e.Size}, e.Readers, ok
}

func (k *known) putTag(ref string, desc ocispec.Descriptor, readers []string) {
	k.put(tagKey(ref), entry{Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size, Public: len(readers) == 0, Readers: readers})
}

const day = 24 * 60 * 60

func (k *known) get(key string) (entry, bool) {
	var e entry
	raw, ok := k.db.Get(bucket, key)
	if !ok || json.Unmarshal(raw, &e) != nil {
		return entry{}, false
	}
	if time.Now().Unix()-e.Used > day {
		k.put(key, e)
	}
	return e, true
}

func (k *known) put(key string, e entry) {
	e.Used = time.Now().Unix() / day * day
	raw, err := json.Marshal(e)
	if err != nil {
		panic("internal error: " + err.Error()) // strings, numbers and bytes always encode
	}
	old, ok := k.db.Get(bucket, key)
	if ok && string(old) == string(raw) {
		return
	}
	var b store.Batch
	b.Put(bucket, key, raw)
	k.mu.Lock()
	defer k.mu.Unlock()
	if !ok {
		k.count++
	}
	if k.count > maxKnown {
		k.pruneLocked(&b, key)
	}
	k.db.Write(&b)
}

// pruneLocked deletes the half of the entries that was used least recently.
func (k *known) pruneLocked(b *store.Batch, keep string) {
	type use struct {
		key  string
		used int64
	}
	var all []use
	k.db.Scan(bucket, "", func(key string, raw []byte) bool {
		var e entry
		if json.Unmarshal(raw, &e) != nil {
			e.Used = 0
		}
		if key != keep {
			all = append(all, use{key, e.Used})
		}
		return true
	})
	slices.SortFunc(all, func(a, b use) int { return cmp.Compare(a.used, b.used) })
	for _, u := range all[:len(all)/2] {
		b.Delete(bucket, u.key)
	}
	k.count -= len(all) / 2
}
