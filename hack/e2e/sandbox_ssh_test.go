//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// agentSockets counts the sockets that the daemon listens at for steps, which
// have no name that another process could use.
func (d *daemon) agentSockets() int {
	d.t.Helper()
	names := map[string]bool{} // of sockets by inode
	for line := range strings.Lines(readFile(d.t, "/proc/net/unix")) {
		if f := strings.Fields(line); len(f) == 8 && strings.HasPrefix(f[7], "/proc/self/fd/") {
			names["socket:["+f[6]+"]"] = true
		}
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", d.cmd.Process.Pid))
	if err != nil {
		d.t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		if target, err := os.Readlink(f); err == nil && names[target] { // an error: closed since
			n++
		}
	}
	return n
}

// A step's agent socket is there for as long as the step, however it ends, and
// has no path for anybody else.
func TestAgentSocketEndsWithItsStep(t *testing.T) {
	a := startAgent(t)
	d := newDaemon(t)
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	const look = "RUN --mount=type=ssh test -S $SSH_AUTH_SOCK "
	none := func(when string) {
		t.Helper()
		if n := d.agentSockets(); n != 0 {
			t.Errorf("after %s the daemon has %d sockets for agents", when, n)
		}
	}
	none("no such step")
	d.dockerfile("FROM BASE\n"+look+"\n", nil, "--ssh", "default="+a.socket).must(t)
	none("a step")
	d.dockerfile("FROM BASE\n"+look+"&& exit 7\n", nil, "--ssh", "default="+a.socket).fails(t, "exit code: 7")
	none("a step that failed")

	// One that is cancelled, while another looks for its socket.
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE\n"+look+"&& sleep 4242\n", "BASE", env.base)}.write(t)
	cmd := d.client(filepath.Join(env.peer, "buildctl"), "build", "--frontend", "dockerfile.v0", "--local", "context="+dir, "--local", "dockerfile="+dir, "--ssh", "default="+a.socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	wait := func(want int) error {
		return harness.WaitFor(harness.Patience, func() error {
			if n := d.agentSockets(); n != want {
				return fmt.Errorf("the daemon has %d sockets for agents, not %d", n, want)
			}
			return nil
		})
	}
	if err := wait(1); err != nil {
		t.Error(err)
	}
	if got := readFile(t, d.local("FROM BASE AS b\nRUN mkdir /out; find / -xdev -type s > /out/f\nFROM scratch\nCOPY --from=b /out /\n", nil), "f"); got != "" {
		t.Errorf("another step sees the sockets %s", got)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	cmd.Wait() //nolint:errcheck // killed
	if err := wait(0); err != nil {
		t.Errorf("after the client went away: %v", err)
	}
}
