package executor

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A runtime that a crash left running is ended, and nobody else's.
func TestStrays(t *testing.T) {
	dir := t.TempDir()
	start := func(state string) *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sh", "-c", "read line", "runc", "--root", state, "run")
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	state := filepath.Join(dir, "runc")
	if err := os.Mkdir(state, 0o711); err != nil {
		t.Fatal(err)
	}
	own, other := start(state), start(state+"2")
	if err := killStrays(state); err != nil {
		t.Fatal(err)
	}
	if err := own.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("the stray ended with %v", err)
	}
	if err := other.Process.Kill(); err != nil {
		t.Errorf("another's has ended: %v", err)
	}
	other.Wait() // killed
}
