//go:build e2e

package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Builds on a disk that fails, or is full, end with the right result or an error that
// says so; afterwards the daemon builds on, and its store is clean. Here a few times
// for each kind of work; make fault does it at every request of the disk.
func TestDiskOfDaemonFails(t *testing.T) {
	if env.user != nil {
		t.Fatal("this test mounts a disk: it needs root's daemon")
	}
	bin := filepath.Join(t.TempDir(), "fault")
	if out, err := exec.Command("go", "build", "-o", bin, "../fault").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	before := survey(t)
	out, err := exec.Command(bin, "-kilnd", filepath.Join(env.bin, "kilnd"), "-quick", "-v").CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	t.Log(tail(strings.TrimSpace(string(out)), 1))
	if left := survey(t).since(before); strings.Contains(left, "mount") {
		t.Errorf("left behind:\n%s", left)
	}
}
