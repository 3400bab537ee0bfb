//go:build e2e

package engines

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestPodman(t *testing.T) {
	e := newEngine(t)
	e.notFound, e.limit = 127, "33554432"
	e.write("containers.conf", "[containers]\ndefault_ulimits = [\"nofile=1024:2048\", \"nproc=4096:4096\"]\n")
	e.env = []string{"CONTAINERS_CONF=" + e.path("containers.conf")}
	e.command = []string{"podman", "--root", e.path("root"), "--runroot", e.path("run"), "--tmpdir", e.path("tmp"), "--network-config-dir", e.path("networks"),
		"--runtime", e.path("runtime"), "--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "file"}
	had := len(cgroups("libpod_parent")) > 0
	t.Cleanup(func() { // before the directory goes
		e.must("pod", "rm", "--all", "--force", "--time", "0")
		e.must("rm", "--all", "--force", "--time", "0")
		e.must("rmi", "--all", "--force")
		e.must("system", "prune", "--all", "--force")
		e.unmount()
		if !had {
			e.removeCgroups("libpod_parent/*") // of pods, and of what attends to containers
			e.removeCgroups("libpod_parent")
		}
	})
	e.must("import", e.path("image.tar"), "busybox")
	e.all(t)
	// Docker asks for all capabilities, of which a machine in a machine may have fewer.
	e.ends(0, "CapEff:\t000001", run("--rm", "--privileged", "busybox", "grep", "CapEff", "/proc/self/status")...)
	t.Run("pod", func(t *testing.T) {
		e := e.in(t)
		e.must("pod", "create", "--name", "pod1", "--network", "none", "--infra-image", "busybox", "--infra-command", "sleep 1000")
		e.must("run", "--detach", "--pod", "pod1", "--name", "p1", "busybox", "sleep", "1000")
		e.must("run", "--detach", "--pod", "pod1", "--name", "p2", "busybox", "sleep", "1000")
		e.ends(0, "sleep 1000", "exec", "p1", "ps")
		e.ends(0, "Running", "pod", "ps", "--format", "{{.Status}}")
		e.must("pod", "pause", "pod1")
		e.must("pod", "unpause", "pod1")
		e.must("pod", "stop", "--time", "0", "pod1")
		e.must("pod", "rm", "--force", "pod1")
	})
	t.Run("health", func(t *testing.T) {
		e := e.in(t)
		e.must(run("--detach", "--name", "h1", "--health-cmd", "test -e /ok", "--health-interval", "disable", "busybox", "sleep", "1000")...)
		e.ends(1, "unhealthy", "healthcheck", "run", "h1")
		e.must("exec", "h1", "touch", "/ok")
		e.ends(0, "", "healthcheck", "run", "h1")
		e.must("rm", "--force", "--time", "0", "h1")
	})
	e.checkpoint(t, []string{"container", "checkpoint", "c1"}, []string{"container", "restore", "c1"})
	e.called("create", "start", "kill", "delete", "exec", "pause", "resume")
	t.Run("build", func(t *testing.T) {
		e := e.in(t)
		e.write("calls", "")
		e.write("context/Dockerfile", "FROM localhost/busybox\nRUN echo built > /built\nRUN exit 3\n")
		e.ends(3, "exit status 3", "build", "--network", "none", e.path("context"))
		e.write("context/Dockerfile", "FROM localhost/busybox\nRUN echo built > /built\nUSER 1000\nRUN id -u | grep 1000\n")
		e.must("build", "--network", "none", "--tag", "made", e.path("context"))
		e.called("create", "start", "delete")
		e.ends(0, "built\n", run("--rm", "made", "cat", "/built")...)
	})
}

// unmount takes away the directories that Podman makes mounts and leaves so.
func (e *engine) unmount() {
	e.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		e.Fatal(err)
	}
	for _, line := range slices.Backward(strings.Split(strings.TrimSpace(string(data)), "\n")) {
		at := strings.Fields(line)[4]
		if at != e.path("root/overlay") && !strings.HasPrefix(at, e.path("run")) && !strings.HasPrefix(at, e.path("tmp")) {
			continue
		}
		if err := syscall.Unmount(at, syscall.MNT_DETACH); err != nil {
			e.Errorf("unmount %s: %v", at, err)
		}
	}
}
