package main

import "testing"

// The picture in ARCHITECTURE.md is what go list says.
func TestImportsKeepTheRows(t *testing.T) {
	problems, err := check()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Error(p)
	}
}

func TestBelow(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"solver", "internal/store", true},
		{"solver", "snapshot", false},
		{"snapshot", "cache", false},
		{"ops", "ops/source/registry", false},
		{"ops", "ops/filetree", true},
		{"ops/filetree", "ops", false},
		{"ops/source/image", "ops/source/registry", true},
		{"ops/source/image", "ops", true},
		{"cache/keys", "cache", true},
		{"cache", "cache/keys", false},
		{"frontend/dockerfile", "client/llb", true},
		{"frontend/dockerfile", "client", false},
		{"control", "control/build", true},
		{"control/build", "control", false},
		{"cmd/kilnd", "control", true},
		{"client", "cmd/kilnd", false},
	} {
		if got := below(c.from, c.to); got != c.want {
			t.Errorf("%s may import %s: %v, want %v", c.from, c.to, got, c.want)
		}
	}
}
