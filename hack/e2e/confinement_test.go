//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What steps shall be confined by and this machine doesn't have is refused when
// the daemon starts, or by the step: they never run without.
func TestMissingConfinement(t *testing.T) {
	refused := func(want []string, args ...string) {
		t.Helper()
		dir := t.TempDir()
		cmd := exec.Command(filepath.Join(env.bin, "kilnd"), append([]string{"--root", filepath.Join(dir, "state"), "--addr", "unix://" + filepath.Join(dir, "s")}, args...)...)
		runCommand(t, cmd).fails(t, want...)
	}
	refused([]string{"no-process-sandbox", "only a rootless daemon"}, "--oci-worker-no-process-sandbox")
	const profile = "kiln-e2e-missing"
	if enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || strings.TrimSpace(string(enabled)) != "Y" {
		refused([]string{`AppArmor profile "` + profile + `"`, "AppArmor"}, "--oci-worker-apparmor-profile", profile)
		return
	}
	d := newDaemon(t, "--oci-worker-apparmor-profile", profile)
	d.dockerfile("FROM BASE\nRUN true\n", nil).fails(t, profile, "is not loaded", "apparmor_parser -r")
}
