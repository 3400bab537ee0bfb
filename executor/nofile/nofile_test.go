//go:build linux

package nofile_test

import (
	"os"
	"os/exec"
	"testing"

	"github.com/kilnbuild/kiln/executor/nofile"
)

func TestMain(m *testing.M) {
	if os.Getenv("KILN_NOFILE_TEST") != "" {
		if nofile.Limit.Cur != 300 || nofile.Limit.Max != 700 {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The syscall package has raised the soft limit by the time main runs; what was
// there before must still be known.
func TestLimitIsTheOriginal(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", "ulimit -Sn 300; ulimit -Hn 700; exec "+exe)
	cmd.Env = append(os.Environ(), "KILN_NOFILE_TEST=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the limit was not seen: %v\n%s", err, out)
	}
}
