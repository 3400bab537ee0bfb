//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// crashRounds is how often a crash test takes the daemon down: a few times here,
// KILN_CRASH_ROUNDS for more; make crash does it a thousand times.
func crashRounds(t *testing.T, few int) string {
	t.Helper()
	env := os.Getenv("KILN_CRASH_ROUNDS")
	if env == "" {
		return strconv.Itoa(few)
	}
	if n, err := strconv.Atoi(env); err != nil || n < 1 {
		t.Fatalf("KILN_CRASH_ROUNDS is %q, not a number of rounds", env)
	}
	return env
}

func crash(t *testing.T, args ...string) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "crash")
	if out, err := exec.Command("go", "build", "-o", bin, "../crash").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	before := survey(t)
	// How long a start or a commit takes says little where other tests run; make crash
	// wants 2 s and 1 s.
	args = append(args, "-kilnd", filepath.Join(env.bin, "kilnd"), "-start", harness.Patience.String(), "-bound", "10s")
	out, err := exec.Command(bin, args...).CombinedOutput()
	if err != nil {
		t.Errorf("crash %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	t.Log(tail(strings.TrimSpace(string(out)), 1))
	if left := survey(t).since(before); strings.Contains(left, "mount") {
		t.Errorf("left behind:\n%s", left)
	}
}

// kill -9 at random moments under parallel builds, and now and then a damaged or
// deleted database on top: fsck is clean, what was told is kept, nothing is left.
// compat: DMN-117, X-9
func TestCrashKill(t *testing.T) { crash(t, "-damage", "-n", crashRounds(t, 15), "-load", "300ms") }

// The same with power cuts of the disk. compat: DMN-117
func TestCrashPower(t *testing.T) { crash(t, "-power", "-n", crashRounds(t, 6), "-load", "300ms") }
