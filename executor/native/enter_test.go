//go:build linux && (amd64 || arm64)

package native

import (
	"os"
	"testing"
)

// A kernel without a kind of namespace has one of it for all processes.
func TestElsewhere(t *testing.T) {
	for _, name := range []string{"net", "no-such-kind"} {
		if differs, err := elsewhere(os.Getpid(), name); differs || err != nil {
			t.Errorf("%s namespace of this process: %v, %v", name, differs, err)
		}
	}
	const nobody = 1 << 30 // more than there can be
	if _, err := elsewhere(nobody, "net"); err == nil {
		t.Error("a process that is gone is in this namespace")
	}
}
