//go:build e2e

// Package runtimes runs the same specs through kilnrun, runc and crun, and
// compares what a process sees. A difference fails the test unless it is
// listed, with its reason; one that is listed and isn't there fails it, too.
package runtimes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// env is what all tests share.
var env struct {
	runtimes map[string]string // binaries by name
	probe    string
}

func TestMain(m *testing.M) {
	code, err := setUpAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "runtimes:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func setUpAndRun(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("these tests need root: they run containers")
	}
	dir, err := os.MkdirTemp("", "kiln-runtimes-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	build := exec.Command("go", "build", "-o", dir, "../../cmd/kilnrun", "./probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build kilnrun and the probe: %w\n%s", err, out)
	}
	env.probe = filepath.Join(dir, "probe")
	env.runtimes = map[string]string{ours: filepath.Join(dir, ours)}
	for _, name := range peers {
		if env.runtimes[name], err = exec.LookPath(name); err != nil {
			return 0, fmt.Errorf("%w: run make deps first", err)
		}
	}
	return m.Run(), nil
}
