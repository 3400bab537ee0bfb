package main

import (
	"bytes"
	"os/exec"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
)

// TestPrints runs the program as users do: what it prints is a definition of
// the ops it claims: image, command, one op with two file actions, merge and
// the target.
func TestPrints(t *testing.T) {
	const base = "example.com/base:1"
	cmd := exec.CommandContext(t.Context(), "go", "run", ".", base)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	def, err := llb.ReadFrom(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	if len(def.Def) != 5 {
		t.Errorf("%d ops, want 5", len(def.Def))
	}
	want, err := hello(base).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	printed, err := llb.Head(def)
	if err != nil {
		t.Fatal(err)
	}
	made, err := llb.Head(want)
	if err != nil {
		t.Fatal(err)
	}
	if printed != made || printed == "" {
		t.Errorf("printed %s, want %s", printed, made)
	}
}
