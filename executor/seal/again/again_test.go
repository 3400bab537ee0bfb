//go:build linux && (amd64 || arm64)

package again

import (
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/executor/nofile"
)

// This package's own init has executed the tests again, with the same arguments,
// environment and limits, from a mount that can't be written to.
func TestTestsRunFromReadOnlyMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("a mount is made read-only: this test needs root")
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs("/proc/self/exe", &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Flags&stReadOnly == 0 {
		t.Error("the program's file is on a mount that can be written to")
	}
	args, ok := commandLine()
	if !ok || !slices.Equal(args, os.Args) {
		t.Errorf("the arguments are %q and were read as %q", os.Args, args)
	}
	if err := Exec(args, os.Environ()); err != nil {
		t.Errorf("a second time, with nothing to do: %v", err)
	}
}

// The program that is executed again has the limit of open files that it was
// started with, not the one that Go has raised meanwhile.
func TestLimitIsTheOriginal(t *testing.T) {
	const inner = "KILN_AGAIN_LIMIT"
	if os.Getenv(inner) != "" {
		if want := (nofile.Rlimit{Cur: 300, Max: 700}); nofile.Limit != want {
			t.Errorf("the limit is %+v, want %+v", nofile.Limit, want)
		}
		return
	}
	cmd := exec.Command("/bin/sh", "-c", `ulimit -Sn 300; ulimit -Hn 700; exec "$0" -test.run='^TestLimitIsTheOriginal$'`, os.Args[0])
	cmd.Env = append(os.Environ(), inner+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
