//go:build e2e

package engines

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// criu returns an environment in which criu is one that `make criu` has found,
// because it knows this machine's kernel.
func criu() (env string, err error) {
	bin, err := filepath.Abs("../../bin")
	if err == nil {
		_, err = os.Stat(filepath.Join(bin, "criu"))
	}
	return "PATH=" + bin + ":" + os.Getenv("PATH"), err
}

// checkpoint has the engine write a container down and make it again, whose
// process then goes on.
func (e *engine) checkpoint(t *testing.T, write, restore []string) {
	t.Run("checkpoint", func(t *testing.T) {
		env, err := criu()
		if err != nil {
			t.Fatalf("checkpoint and restore need a criu that knows this kernel: %v: hack/criu/deps makes bin/criu one", err)
		}
		e := e.in(t)
		e.env = append(e.env, env)
		const script = "read mine </proc/sys/kernel/random/uuid; while sleep 0.05; do echo is $mine >/me; done"
		e.must(run("--detach", "--name", "c1", "busybox", "sh", "-c", script)...)
		e.becomes("is ", "exec", "c1", "sh", "-c", "cat /me; true")
		before := e.must("exec", "c1", "cat", "/me")
		e.must(write...)
		// Docker's refusal while its containerd still has what it has just exported.
		var code int
		var out string
		if err := harness.WaitFor(patience, func() error {
			if code, out = e.try(e.cmd(restore...)); code != 0 && strings.Contains(out, "already exists") {
				return errors.New(out)
			}
			return nil
		}); err != nil || code != 0 {
			t.Fatalf("%q: %v: exit code %d: %s", restore, err, code, out)
		}
		e.must("exec", "c1", "sh", "-c", ": >/me")
		e.becomes(before, "exec", "c1", "cat", "/me")
		e.must("kill", "c1") // for which rm would wait
		e.must("rm", "--force", "c1")
		e.called("checkpoint", "restore")
	})
}
