package solver

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/opencontainers/go-digest"
)

// Key is a node of the key graph: the identity of one output of a step on
// given inputs, across builds.
type Key [sha256.Size]byte

// RootKey identifies the output of an op without inputs. Its preimage is that
// of the protocol's cache records, "<op digest>@<output>" (EXP-100).
func RootKey(op digest.Digest, output int) Key {
	return sha256.Sum256(append(append([]byte(op), '@'), itoa(output)...))
}

// ContentKey identifies an input by what is in it, whatever made it.
func ContentKey(content digest.Digest) Key {
	return sha256.Sum256([]byte("content:" + content))
}

// derivedKey identifies the output of an op on inputs.
func derivedKey(op digest.Digest, output int, inputs []InputKey) Key {
	h := sha256.New()
	h.Write([]byte(op))
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(output))
	h.Write(n[:])
	for _, in := range inputs {
		h.Write(in.Key[:])
		h.Write([]byte(in.Selector))
		h.Write([]byte{0})
	}
	var k Key
	h.Sum(k[:0])
	return k
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + string(rune('0'+n%10))
}

// InputKey is a key of an input as a step sees it: keys by definition are
// qualified by the step's selector, keys by content are not (LLB-171).
type InputKey struct {
	Key      Key
	Selector digest.Digest
}

// Lookup asks what is known of one output of a step.
type Lookup struct {
	Op     digest.Digest
	Output int
	// Roots are the keys of a step without inputs; Inputs are, for other
	// steps, the candidate keys of each input.
	Roots  []Key
	Inputs [][]InputKey
}

// Found answers a Lookup.
type Found struct {
	// Keys are those that the candidates of every input lead to; for a step
	// without inputs, its Roots.
	Keys []Key
	// Matched tells for each input whether its candidates lead anywhere.
	Matched []bool
	// Records are what hangs off Keys, newest first.
	Records []Record
}

// Record is a result in a ResultStore that a key leads to.
type Record struct {
	Result    string
	CreatedAt time.Time
}

// Save makes a result findable: it hangs it off every key, and links every
// candidate key of every input to those keys.
type Save struct {
	Lookup
	Keys   []Key
	Result Result // nil: links only
}

// KeyStore holds the key graph. Methods are safe for concurrent use; reads
// don't write.
type KeyStore interface {
	Lookup(Lookup) (Found, error)
	// Save is one change: after a crash all of it is there or none.
	Save(Save) error
	// Drop forgets the results with these ids, which turned out to be lost.
	Drop(results []string) error
}
