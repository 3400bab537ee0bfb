//go:build e2e && vm

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// Tests of what only a machine with systemd, cgroup version 2 and AppArmor has:
// hack/vmtest runs them in one, whose users and profiles they change.

// as runs a command as the machine's root and returns what it prints.
func as(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Each runtime gives steps the profile, but not insecure ones.
func TestAppArmorProfile(t *testing.T) {
	const profile = "kiln-e2e"
	file := filepath.Join(t.TempDir(), profile)
	// As Docker's: almost everything, but for some files.
	text := "profile " + profile + " flags=(attach_disconnected,mediate_deleted) {\n network,\n capability,\n file,\n umount,\n signal,\n deny /denied/** rwklx,\n deny @{PROC}/sysrq-trigger rwklx,\n}\n"
	if err := os.WriteFile(file, []byte("@{PROC}=/proc/\n"+text), 0o644); err != nil {
		t.Fatal(err)
	}
	as(t, "apparmor_parser", "--replace", "--skip-cache", file)
	t.Cleanup(func() { as(t, "apparmor_parser", "--remove", file) })
	const confined = `RUN [ "$(cat /proc/self/attr/apparmor/current)" = "` + profile + ` (enforce)" ] && mkdir /denied && ! touch /denied/f && touch /f` + "\n"
	for name, runtime := range map[string]string{"BuiltIn": "", "Runc": "runc", "Kilnrun": filepath.Join(env.bin, "kilnrun")} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t, "--oci-worker-apparmor-profile", profile, "--oci-worker-binary", runtime, "--allow-insecure-entitlement", "security.insecure")
			d.dockerfile("FROM BASE\n"+confined, nil).must(t)
			d.dockerfile("FROM BASE\nRUN --security=insecure cat /proc/self/attr/apparmor/current >&2; mkdir /denied && touch /denied/f\n", nil, "--allow", "security.insecure").must(t)
			if r := d.buildctl("debug", "workers", "--verbose").must(t); !strings.Contains(r.stdout, profile) {
				t.Errorf("the worker's labels don't name the profile:\n%s", r.stdout)
			}
		})
	}
	t.Run("Rootless", func(t *testing.T) {
		asUser(t, 65536)
		newDaemon(t, "--oci-worker-apparmor-profile", profile).dockerfile("FROM BASE\n"+confined, nil).must(t)
	})
}

// A rootless daemon that a user's systemd started, as docs/executor.md says, has
// limits for its steps.
func TestRootlessWithUsersSystemd(t *testing.T) {
	asUser(t, 65536)
	id := fmt.Sprint(harness.UnprivilegedID)
	as(t, "useradd", "--uid", id, "--home-dir", "/", "--no-create-home", "kiln-systemd")
	t.Cleanup(func() { as(t, "userdel", "kiln-systemd") })
	as(t, "loginctl", "enable-linger", "kiln-systemd")
	t.Cleanup(func() {
		as(t, "loginctl", "disable-linger", "kiln-systemd")
		as(t, "systemctl", "stop", "user@"+id)
	})
	as(t, "systemctl", "start", "user@"+id)
	// The command itself becomes the daemon; its own directories come after it.
	env.inside = []string{"env", "XDG_RUNTIME_DIR=/run/user/" + id, "systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes"}
	t.Cleanup(func() { env.inside = nil })
	d := newDaemon(t)
	if strings.Contains(d.log.String(), "no cgroup is delegated") {
		t.Errorf("the log says that there is no cgroup:\n%s", d.log)
	}
	for range 2 {
		d.dockerfile(`FROM BASE
RUN cd /sys/fs/cgroup && cat memory.max memory.swap.max cpu.max cpu.weight && [ "$(cat memory.max)" = 67108864 ] && [ "$(cat cpu.max)" = "50000 100000" ] && [ "$(cat cpu.weight)" -lt 100 ]
`, nil, "--no-cache", "--opt", "memory=67108864", "--opt", "memswap=67108864", "--opt", "cpuquota=50000", "--opt", "cpuperiod=100000", "--opt", "cpushares=512").must(t)
		d.dockerfile("FROM BASE\nRUN dd if=/dev/zero of=/dev/null bs=200M count=1\n", nil, "--no-cache", "--opt", "memory=33554432", "--opt", "memswap=33554432").
			fails(t, memoryRanOut(t)...)
		d.kill() // and again, in a scope of its own beside that of the supervisor
		d.start()
	}
}
