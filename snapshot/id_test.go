package snapshot

import (
	"strings"
	"testing"
)

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "0": true, "Az9_.-": true, strings.Repeat("x", maxID): true,
		"": false, ".": false, "..": false, ".a": false, "-a": false, "_a": false, "a/b": false, "a b": false, "a\x00": false, "a\n": false, "ä": false,
		strings.Repeat("x", maxID+1): false,
	} {
		if got := validID(id); got != want {
			t.Errorf("%q: %t, want %t", id, got, want)
		}
	}
}
