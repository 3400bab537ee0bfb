package store

import (
	"encoding/binary"
	"fmt"

	"github.com/cespare/xxhash/v2"
)

// position says which commit a database stands at: the number of commits so
// far, and the sum of the hashes of all records there are then. The sum doesn't
// depend on the order in which records came, so that a commit updates it with
// what it changes, and whoever reads all records can prove that they are
// complete and unchanged.
type position struct{ seq, sum uint64 }

// encode is what positionKey of metaBucket holds: both numbers, and their hash.
func (p position) encode() []byte {
	be := binary.BigEndian
	out := be.AppendUint64(be.AppendUint64(make([]byte, 0, 24), p.seq), p.sum)
	return be.AppendUint64(out, xxhash.Sum64(out))
}

func decodePosition(b []byte) (position, error) {
	be := binary.BigEndian
	if len(b) != 24 || be.Uint64(b[16:]) != xxhash.Sum64(b[:16]) {
		return position{}, damagedf("the number of its last commit is %x", b)
	}
	return position{be.Uint64(b), be.Uint64(b[8:])}, nil
}

// bucketHash is what the name of a bucket adds to the hashes of its records.
type bucketHash uint64

func hashBucket(name string) bucketHash { return bucketHash(xxhash.Sum64String(name)) }

// record is the hash of a record in the bucket.
func (h bucketHash) record(key, value []byte) uint64 {
	var parts [24]byte
	binary.LittleEndian.PutUint64(parts[:], uint64(h))
	binary.LittleEndian.PutUint64(parts[8:], xxhash.Sum64(key))
	binary.LittleEndian.PutUint64(parts[16:], xxhash.Sum64(value))
	return xxhash.Sum64(parts[:])
}

// formatCheck shows that a layout's version is what was written.
func formatCheck(text string) string { return fmt.Sprintf("%016x", xxhash.Sum64String("format "+text)) }
