//go:build e2e

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// kiln builds kiln on a Debian base, with this machine's Go and modules, and
// what comes out runs.
func TestKilnBuildsKiln(t *testing.T) {
	out, tmp := t.TempDir(), t.TempDir()
	before := survey(t, tmp)
	cmd := exec.Command("./hack/self", out)
	cmd.Dir = filepath.Dir(env.bin)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	r := runCommand(t, cmd).must(t)
	if left := survey(t, tmp).since(before); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	if strings.Count(r.stdout, "github.com/kilnbuild/kiln v0.33.1+kiln.") != 2 {
		t.Errorf("the programs say %q", r.stdout)
	}
	dir := files{"Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}.write(t)
	saved := env.bin
	env.bin = out
	t.Cleanup(func() { env.bin = saved }) // after the daemon's own, which runs fsck from there
	d := newDaemon(t)
	res := t.TempDir()
	d.kiln("build", "-o", res, dir).must(t)
	readFile(t, res, "Dockerfile")
}
