//go:build e2e

// Package oci has kilnrun checked by the OCI community: by the validation
// programs of github.com/opencontainers/runtime-tools, each of which runs a
// runtime and prints what is as the runtime specification says. What kilnrun
// fails must be listed in known_test.go, with its reason; what is listed and
// passes fails the test, too. With KILN_OCI_PEERS=1 runc and crun are checked,
// too, for the table that `make oci` prints.
package oci

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	ours  = "kilnrun"
	tools = "github.com/opencontainers/runtime-tools"
)

// env is what all tests share.
var env struct {
	dir      string   // of the directories below: bin, work, state
	programs []string // names of validation programs
	runtimes []string // ours is the first
}

func TestMain(m *testing.M) {
	code, err := setUpAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "oci:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func setUpAndRun(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("these tests need root: they run containers")
	}
	if env.dir, err = os.MkdirTemp("", "kiln-oci-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(env.dir)) }()
	lock, err := lockGroups()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, removeGroups(), lock.Close()) }()
	if err := os.Chmod(env.dir, 0o755); err != nil {
		return 0, err
	}
	for _, prepare := range []func() error{buildPrograms, buildRuntimes, prepareWork} {
		if err := prepare(); err != nil {
			return 0, err
		}
	}
	return m.Run(), nil
}

func goTool(dir string, args ...string) (string, error) {
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("go %s: %w", args[0], err)
	}
	return string(out), nil
}

// buildPrograms builds the checks from the module cache.
func buildPrograms() error {
	list, err := goTool("checks", "list", tools+"/validation/...")
	if err != nil {
		return err
	}
	packages := []string{tools + "/cmd/runtimetest"}
	for name := range strings.FieldsSeq(list) {
		if base := path.Base(name); base != "util" {
			packages, env.programs = append(packages, name), append(env.programs, base)
		}
	}
	bin := filepath.Join(env.dir, "bin") + "/"
	_, err = goTool("checks", append([]string{"build", "-trimpath", "-ldflags", "-s -w", "-o", bin}, packages...)...)
	return err
}

// buildRuntimes makes a program of each runtime that has its state where the
// test wants it: checks give no flags.
func buildRuntimes() error {
	if _, err := goTool("", "build", "-o", filepath.Join(env.dir, ours), "../../cmd/kilnrun"); err != nil {
		return err
	}
	env.runtimes = []string{ours}
	binaries := map[string]string{ours: filepath.Join(env.dir, ours)}
	if os.Getenv("KILN_OCI_PEERS") == "1" {
		for _, name := range []string{"runc", "crun"} {
			binary, err := exec.LookPath(name)
			if err != nil {
				return fmt.Errorf("%w: run make deps first", err)
			}
			env.runtimes, binaries[name] = append(env.runtimes, name), binary
		}
		var err error
		if binaries["crun"], err = filepath.Abs("../crun"); err != nil {
			return err
		}
	}
	for name, binary := range binaries {
		script := fmt.Sprintf("#!/bin/sh\nexec %s --root \"$%s\" \"$@\"\n", binary, stateVariable)
		if err := os.WriteFile(wrapper(name), []byte(script), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func wrapper(runtime string) string { return filepath.Join(env.dir, "with-"+runtime) }

// stateVariable tells a wrapper where containers are kept.
const stateVariable = "KILN_OCI_STATE"

// prepareWork makes the directory that programs run in: they look there for
// the root file system of their containers and for what they run in it.
func prepareWork() error {
	dir, err := goTool("checks", "list", "-m", "-f", "{{.Dir}}", tools)
	if err != nil {
		return err
	}
	work := filepath.Join(env.dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(strings.TrimSpace(dir), "rootfs-*.tar.gz"))
	if err != nil || len(archives) == 0 {
		return fmt.Errorf("%s has no root file systems (%v)", tools, err)
	}
	for _, name := range archives {
		if err := os.Symlink(name, filepath.Join(work, filepath.Base(name))); err != nil {
			return err
		}
	}
	return os.Link(filepath.Join(env.dir, "bin/runtimetest"), filepath.Join(work, "runtimetest"))
}

// lockGroups waits for other runs of these tests: all have the same cgroups.
func lockGroups() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "kiln-oci.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	return f, nil
}

// removeGroups removes the parents of cgroups that checks name, and runtimes
// make and leave.
func removeGroups() error {
	var errs []error
	for _, name := range []string{"testdir/cgrouptest", "testdir", "cgrouptest"} {
		for _, place := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			dirs, err := filepath.Glob(filepath.Join(place, name))
			errs = append(errs, err)
			for _, dir := range dirs {
				errs = append(errs, os.Remove(dir))
			}
		}
	}
	return errors.Join(errs...)
}
