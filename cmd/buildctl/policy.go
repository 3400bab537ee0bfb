package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	spb "github.com/moby/buildkit/sourcepolicy/pb"
)

// sourcePolicy reads the file of --source-policy-file; "" is no policy. A word
// that isn't understood is an error: what it was to forbid would be allowed.
func sourcePolicy(file string) (*spb.Policy, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--source-policy-file: %w", err)
	}
	policy := &spb.Policy{}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(policy); err != nil {
		return nil, fmt.Errorf("--source-policy-file %s: %w", file, err)
	}
	return policy, nil
}
