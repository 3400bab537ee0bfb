//go:build e2e

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
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
	var log bytes.Buffer
	cmd.Stderr = &log
	said, err := cmd.Output() // however long it takes: it waits for others' servers, too
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(log.String(), 100))
	}
	if left := survey(t, tmp).since(before); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	if bytes.Count(said, []byte("github.com/kilnbuild/kiln v0.33.1+kiln.")) != 2 {
		t.Errorf("the programs say %q", said)
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
