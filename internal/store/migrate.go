package store

import (
	"slices"

	"go.etcd.io/bbolt"
)

// joinKeys moves what layout 2 had in a bucket for each kind of entry of the key
// graph into one: behind the key that an entry begins with comes its kind now.
func joinKeys(tx *bbolt.Tx, found finding) (at position, err error) {
	const keyLen = 32
	at = found.position
	joined, err := tx.CreateBucketIfNotExists([]byte("key"))
	if err != nil {
		return at, err
	}
	to := hashBucket("key")
	for _, old := range []struct {
		bucket string
		kind   byte
	}{{"key.link", 'l'}, {"key.back", 'b'}, {"key.result", 'r'}} {
		b := tx.Bucket([]byte(old.bucket))
		if b == nil {
			continue
		}
		from := hashBucket(old.bucket)
		if err := b.ForEach(func(k, v []byte) error {
			at.sum -= from.record(k, v)
			if len(k) <= keyLen {
				return nil // nobody's
			}
			key, value := slices.Insert(slices.Clone(k), keyLen, old.kind), append([]byte{}, v...)
			at.sum += to.record(key, value)
			return joined.Put(key, value)
		}); err != nil {
			return at, err
		}
		if err := tx.DeleteBucket([]byte(old.bucket)); err != nil {
			return at, err
		}
	}
	at.seq++
	return at, nil
}

// dropImages deletes what layout 3 had of images.
func dropImages(tx *bbolt.Tx, found finding) (at position, err error) {
	at = found.position
	name := []byte("image")
	b := tx.Bucket(name)
	if b == nil {
		return at, nil
	}
	from := hashBucket("image")
	if err := b.ForEach(func(k, v []byte) error {
		at.sum -= from.record(k, v)
		return nil
	}); err != nil {
		return at, err
	}
	at.seq++
	return at, tx.DeleteBucket(name)
}
