//go:build e2e

package oci

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// result is what a validation program found.
type result struct {
	passed int
	failed []string // each in its words
}

func (r result) String() string { return fmt.Sprintf("%d/%d", r.passed, len(r.failed)) }

// parse reads a program's output, which is in the Test Anything Protocol.
// Besides checks that are "not ok", it may have errors in blocks of their own.
func parse(out string) (r result, err error) {
	var block []string
	inBlock, ofCheck := false, false
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		switch {
		case inBlock && line == "...":
			text, err := blockError(strings.Join(block, "\n"))
			if err != nil {
				return r, err
			}
			if text != "" && !ofCheck {
				r.failed = append(r.failed, text)
			}
			inBlock, ofCheck = false, false
		case inBlock:
			block = append(block, line)
		case line == "---":
			inBlock, block = true, nil
		case strings.HasPrefix(line, "not ok ") && strings.Contains(line, "# TODO"):
		case strings.HasPrefix(line, "not ok "):
			r.failed = append(r.failed, withoutNumber(line[len("not ok "):]))
			ofCheck = true
		case strings.HasPrefix(line, "ok "):
			ofCheck = true
			if !strings.Contains(line, "# SKIP") {
				r.passed++
			}
		case !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "Refer to: "): // those go on with a check's words
			ofCheck = false
		}
	}
	return r, nil
}

// blockError is the error that a block of diagnostics tells, if it does.
func blockError(text string) (string, error) {
	var fields map[string]any
	if err := json.Unmarshal([]byte(text), &fields); err != nil {
		return "", fmt.Errorf("diagnostics %q: %w", text, err)
	}
	told, _ := fields["error"].(string) //nolint:errcheck // anything else is none
	return strings.TrimSpace(told), nil
}

func withoutNumber(text string) string {
	_, after, _ := strings.Cut(text, " - ")
	return after
}

func TestParse(t *testing.T) {
	out := `TAP version 13
ok 1 - fine
Refer to: https://example.com
  ---
  {
    "error": "this is of a check that passed"
  }
  ...
ok 2 - left out # SKIP
not ok 3 - one - two
  ---
  {"error": "of a check that is counted"}
  ...
not ok 4 - # TODO later
# a remark
  ---
  {"stdout": "not ok 1 - in a block"}
  ...
  ---
  {
    "error": "alone\n"
  }
  ...
1..4
`
	got, err := parse(out)
	if err != nil || got.passed != 1 || !slices.Equal(got.failed, []string{"one - two", "alone"}) {
		t.Errorf("%+v, error %v", got, err)
	}
	if _, err := parse("---\nno\n...\n"); err == nil {
		t.Error("a block that isn't JSON is read")
	}
}
