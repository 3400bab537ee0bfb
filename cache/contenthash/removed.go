package contenthash

import (
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/cache"
)

// removedKey is where a record keeps the names of what was last removed from
// it: what is gone has no other place where its name is known.
const removedKey = "contenthash.removed"

// maxRemoved bounds how many of them are kept.
const maxRemoved = 64

// Removed lists paths, as Walk gives them, that recorders have removed from
// ref's record: the last ones first, and only so many.
func Removed(ref *cache.Ref) []string {
	if ref == nil {
		return nil
	}
	return removed(refRecord{ref})
}

func removed(rec interface {
	Metadata(key string) ([]byte, bool)
}) []string {
	data, ok := rec.Metadata(removedKey)
	if !ok || len(data) == 0 {
		return nil
	}
	return strings.Split(string(data), "\x00")
}

// saveRemoved adds what r removed to what is kept beside u.
func (r *Recorder) saveRemoved(u mutableRecord) {
	if len(r.removed) == 0 {
		return
	}
	slices.Reverse(r.removed)
	all := append(r.removed, removed(u)...)
	u.SetMetadata(removedKey, []byte(strings.Join(all[:min(len(all), maxRemoved)], "\x00")))
}
