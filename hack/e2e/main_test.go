//go:build e2e

// Package e2e drives a real kilnd with the real upstream buildctl and buildx
// against real registries, as users do, and looks at the content of what came
// out. Every test ends with a check that nothing is left behind and that the
// store is clean. `make test` builds what it needs and runs it, as root.
package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/kilnbuild/kiln/hack/testimage"
	"golang.org/x/sys/unix"
)

// env is what all tests share, set up once by TestMain.
var env struct {
	bin      string            // directory of kilnd and kiln's buildctl
	peer     string            // directory of upstream's buildctl and buildkitd
	reg      *harness.Registry // for everybody, over plain HTTP
	registry string            // its host:port
	base     string            // reference of the busybox image in it
	layout   testimage.Layout
	runtime  string                // --oci-worker-binary of the daemons; "" is the built-in one
	user     *harness.Unprivileged // whose the daemons are; nil: root's
	kilnd    string                // the program, where that user can execute it
	inside   []string              // what that user runs it with
	outside  []string              // what the machine's root runs that user's commands with
}

func TestMain(m *testing.M) {
	code, err := setUpAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

func setUpAndRun(m *testing.M) (int, error) {
	// Servers of the tests aren't behind a proxy, which git would ask all the same.
	if err := os.Setenv("no_proxy", "127.0.0.1,localhost"); err != nil {
		return 0, err
	}
	if os.Geteuid() != 0 {
		return 0, fmt.Errorf("the end-to-end tests need root; run them with sudo make test")
	}
	top, err := filepath.Abs("../..")
	if err != nil {
		return 0, err
	}
	env.bin, env.peer = filepath.Join(top, "bin"), filepath.Join(top, "bin", "peer")
	env.runtime = os.Getenv("KILN_E2E_RUNTIME")
	env.kilnd = filepath.Join(env.bin, "kilnd")
	for _, f := range []string{filepath.Join(env.bin, "kilnd"), filepath.Join(env.peer, "buildctl")} {
		if _, err := os.Stat(f); err != nil {
			return 0, fmt.Errorf("%w: run make build peer first", err)
		}
	}
	unix.Umask(0o022) // the files of an ordinary user's daemon are made by root
	if err := adoptOrphans(); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "kiln-e2e-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if os.Getenv("KILN_E2E_ROOTLESS") != "" {
		if env.user, env.kilnd, err = unprivileged(dir, 65536); err != nil {
			return 0, err
		}
	}
	reg, err := harness.StartRegistry(dir)
	if err != nil {
		return 0, err
	}
	defer reg.Stop()
	env.reg, env.registry = reg, reg.Host
	if env.layout, env.base, err = reg.PushBusybox(dir); err != nil {
		return 0, err
	}
	return m.Run(), nil
}

// unprivileged makes an ordinary user below dir, and a copy of kilnd that it can
// execute wherever the other is. It has count ids besides its own.
func unprivileged(dir string, count int) (*harness.Unprivileged, string, error) {
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, "", err
	}
	u, err := harness.NewUnprivileged(dir, count)
	if err != nil {
		return nil, "", err
	}
	program, err := os.ReadFile(filepath.Join(env.bin, "kilnd"))
	if err != nil {
		return nil, "", err
	}
	kilnd := filepath.Join(dir, "kilnd")
	return u, kilnd, os.WriteFile(kilnd, program, 0o755)
}

// kilndCommand is a command of the daemon's program, as the user that daemons run as.
func kilndCommand(args ...string) *exec.Cmd {
	if env.user != nil {
		command := append(append(slices.Clone(env.inside), env.kilnd), args...)
		cmd := env.user.Command(command[0], command[1:]...)
		if len(env.outside) > 0 {
			outer := exec.Command(env.outside[0], slices.Concat(env.outside[1:], cmd.Args)...)
			outer.Env = cmd.Env
			return outer
		}
		return cmd
	}
	return exec.Command(env.kilnd, args...)
}
