package store

import (
	"slices"
	"strings"
	"testing"
)

// A range of what is pending is what begins with the prefix, however long that is,
// in order, and with what came since the last look.
func TestPendingRanges(t *testing.T) {
	const stem = "0123456789abcdef" // of headLen bytes
	if len(stem) != headLen {
		t.Fatalf("the stem has %d bytes, a head %d", len(stem), headLen)
	}
	keys := []string{"0", stem[:15], stem, stem + "g", stem + "gh", stem[:15] + "x", stem[:15] + "xy", "z" + stem}
	p := newGroup()
	for n, key := range slices.Backward(keys) {
		p.put("bucket", key, entry{value: []byte(key)})
		for _, whole := range keys {
			for i := range len(whole) + 1 {
				prefix := whole[:i]
				var got, want []string
				for _, f := range p.scan("bucket", prefix) {
					got = append(got, f.key)
				}
				for _, k := range keys[n:] {
					if strings.HasPrefix(k, prefix) {
						want = append(want, k)
					}
				}
				slices.Sort(want)
				if !slices.Equal(got, want) {
					t.Fatalf("with %q, those that begin with %q are %q, want %q", keys[n:], prefix, got, want)
				}
			}
		}
	}
}
