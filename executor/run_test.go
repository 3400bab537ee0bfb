//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"strings"
	"testing"
)

func TestHello(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "echo out; echo err >&2; exit 7")
		r := run(t, e, p)
		var exit *ExitError
		if !errors.As(r.err, &exit) || exit.Code != 7 {
			t.Fatalf("error %v", r.err)
		}
		if r.stdout != "out\n" || strings.TrimSpace(r.stderr) != "err" {
			t.Errorf("stdout %q, stderr %q", r.stdout, r.stderr)
		}
	})
}
