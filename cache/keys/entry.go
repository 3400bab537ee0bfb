package keys

import "github.com/kilnbuild/kiln/internal/store"

// kind is what an entry of the graph says.
type kind byte

const (
	links   kind = 'l' // K T K'
	backs   kind = 'b' // K' K T
	results kind = 'r' // K id
	byID    kind = 0   // id 0 K, in a bucket of its own
)

// entry is one of the graph; key is without its kind.
type entry struct {
	kind kind
	key  string
}

// at is where e is in the database. That of a key that is cut off is the prefix
// of all that begins so.
func (e entry) at() (bucket, key string) {
	switch {
	case e.kind == byID:
		return bucketByID, e.key
	case e.key == "": // of all kinds
		return bucketKeys, ""
	}
	return bucketKeys, e.key[:keyLen] + string(e.kind) + e.key[keyLen:]
}

// entryOf is the entry of that kind at key, if there is one. Its key is as long
// as that of such entries.
func entryOf(k kind, key string) (e entry, ok bool) {
	if k == byID {
		at := len(key) - keyLen - 1
		return entry{k, key}, at >= 0 && key[at] == 0
	}
	if len(key) <= keyLen || kind(key[keyLen]) != k {
		return entry{}, false
	}
	return entry{k, key[:keyLen] + key[keyLen+1:]}, k == results || len(key) == keyLen+1+tagLen+keyLen
}

// strays calls fn for all that is in the buckets and is no entry: damage that no
// page's sum shows.
func strays(in scanner, fn func(bucket, key string)) {
	in.Scan(bucketKeys, "", func(key string, value []byte) bool {
		_, link := entryOf(links, key)
		_, back := entryOf(backs, key)
		if _, result := entryOf(results, key); !link && !back && !(result && len(value) == stampLen) {
			fn(bucketKeys, key)
		}
		return true
	})
	in.Scan(bucketByID, "", func(key string, _ []byte) bool {
		if _, ok := entryOf(byID, key); !ok {
			fn(bucketByID, key)
		}
		return true
	})
}

func (s *Store) get(e entry) (value []byte, ok bool) { return s.db.Get(e.at()) }

// add adds e to b.
func add(b *store.Batch, e entry, value []byte) {
	bucket, key := e.at()
	b.Put(bucket, key, value)
}

// drop adds the removal of e to b.
func drop(b *store.Batch, e entry) { b.Delete(e.at()) }

// eachOf calls fn for every entry in the database of the kind that begins with
// prefix, which is empty or begins with a key, until it returns false.
func eachOf(in scanner, k kind, prefix string, fn func(key string, value []byte) bool) {
	bucket, begin := entry{k, prefix}.at()
	in.Scan(bucket, begin, func(key string, value []byte) bool {
		e, ok := entryOf(k, key)
		return !ok || fn(e.key, value)
	})
}
