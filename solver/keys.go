package solver

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Key is a node of the key graph: the identity of one output of a step on
// given inputs, across builds.
type Key [sha256.Size]byte

// String is the key in hex.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// RootKey identifies the output of an op without inputs. Its preimage is that
// of the protocol's cache records, "<op digest>@<output>" (EXP-100).
func RootKey(op digest.Digest, output int) Key {
	return sha256.Sum256(append(append([]byte(op), '@'), itoa(output)...))
}

// ContentKey identifies an input by what is in it, whatever made it. Its preimage
// is that of the protocol's cache records, too: a step that has only one output,
// the one that comes before the first.
func ContentKey(content digest.Digest) Key {
	return sha256.Sum256([]byte(content + "@-1"))
}

// rootKeys identify the output of an op without inputs, by each of its cache
// maps.
func rootKeys(ops []digest.Digest, output int) []Key {
	keys := make([]Key, len(ops))
	for i, op := range ops {
		keys[i] = RootKey(op, output)
	}
	return keys
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

// newKeys are what a result is saved under if its inputs lead to no key yet.
// Of each input the last candidate counts: by content, if it was digested.
func (l Lookup) newKeys() []Key {
	if len(l.Inputs) == 0 {
		return l.Roots
	}
	text := make([]byte, 0, 1024) // enough for most, without allocating
	text = append(text, l.Op...)
	text = binary.BigEndian.AppendUint64(text, uint64(l.Output))
	for _, candidates := range l.Inputs {
		var last InputKey
		if len(candidates) > 0 {
			last = candidates[len(candidates)-1]
		}
		text = append(text, last.Key[:]...)
		text = append(text, last.Selector...)
		text = append(text, 0)
	}
	return []Key{sha256.Sum256(text)}
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

// matched reports whether input i's candidates lead anywhere.
func (f *Found) matched(i int) bool { return i < len(f.Matched) && f.Matched[i] }

// add joins what an import found to f. Its records come after those that are
// there: what the daemon has itself needs no transfer.
func (f *Found) add(other Found, importNumber int) {
	for _, k := range other.Keys {
		if !slices.Contains(f.Keys, k) {
			f.Keys = append(slices.Clip(f.Keys), k)
		}
	}
	for i, matched := range other.Matched {
		f.Matched[i] = f.Matched[i] || matched
	}
	for _, r := range other.Records {
		r.Import = importNumber
		f.Records = append(slices.Clip(f.Records), r)
	}
}

// Record is a result in a ResultStore that a key leads to.
type Record struct {
	Result    string
	CreatedAt time.Time
	// Import is the number of the build's import that has it, from 1; 0 is the
	// daemon's own store.
	Import int
}

// String names the record within a build.
func (r Record) String() string {
	if r.Import == 0 {
		return r.Result
	}
	return "import" + itoa(r.Import) + ":" + r.Result
}

// Save makes a result findable: it hangs it off every key, and links every
// candidate key of every input to those keys. Without a result it only links,
// and only to keys that lead to a result: a key that doesn't isn't kept.
type Save struct {
	Lookup
	Keys   []Key
	Result Result // nil: links only
}

// KeyIndex can be asked what a step's identity leads to. Root keys and content
// keys are the same in all of them; the others are names that only their own
// index has to know.
type KeyIndex interface {
	Lookup(Lookup) (Found, error)
}

// KeyStore holds the key graph. Methods are safe for concurrent use; reads
// don't write.
type KeyStore interface {
	KeyIndex
	// Save is one change: after a crash all of it is there or none.
	Save(Save) error
	// Drop forgets the results with these ids, which turned out to be lost, and
	// every key and link that leads to no result without them.
	Drop(results []string) error
}
