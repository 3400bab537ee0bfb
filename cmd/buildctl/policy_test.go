package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	spb "github.com/moby/buildkit/sourcepolicy/pb"
)

func TestSourcePolicyFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "policy.json")
	read := func(text string) (*spb.Policy, error) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return sourcePolicy(file)
	}
	p, err := read(`{"rules": [{"action": "CONVERT", "selector": {"identifier": "a", "match_type": "REGEX", "constraints": [{"key": "k", "condition": "MATCHES"}]}, "updates": {"attrs": {"b": "c"}}}]}`)
	if err != nil || len(p.Rules) != 1 {
		t.Fatalf("%v, error %v", p, err)
	}
	r := p.Rules[0]
	if r.Action != spb.PolicyAction_CONVERT || r.Selector.MatchType != spb.MatchType_REGEX || r.Selector.Constraints[0].Condition != spb.AttrMatch_MATCHES || r.Updates.Attrs["b"] != "c" {
		t.Errorf("%v", p)
	}
	for text, want := range map[string]string{
		`{"rules": [{"action": "FORBID"}]}`: `value "FORBID"`,
		`{"rules": [{"action": "DENY", "selector": {"identifier": "a", "matchType": "EXACT"}}]}`: `unknown field "matchType"`,
		`rules`: "invalid character",
	} {
		if p, err := read(text); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v, error %v", text, p, err)
		}
	}
	if _, err := sourcePolicy(file + ".none"); err == nil {
		t.Error("a file that isn't there is a policy")
	}
	if p, err := sourcePolicy(""); p != nil || err != nil {
		t.Errorf("no file: %v, error %v", p, err)
	}
}
