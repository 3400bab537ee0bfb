//go:build e2e

package engines

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
)

func TestDocker(t *testing.T) {
	e := newEngine(t)
	e.notFound, e.limit = 126, "33554432"
	host := "unix://" + e.path("sock")
	e.write("daemon.json", `{"experimental": true}`) // as checkpoints are
	dockerd := exec.Command("dockerd", "--config-file", e.path("daemon.json"), "--data-root", e.path("root"), "--exec-root", e.path("exec"), "--pidfile", e.path("pid"), "--host", host,
		"--add-runtime", "kiln="+e.path("runtime"), "--default-runtime", "kiln", "--storage-driver", "overlay2", "--cgroup-parent", "/kiln-docker-test", "--default-ulimit", "nofile=1024:2048",
		"--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none", "--userland-proxy=false")
	if env, err := criu(); err == nil {
		dockerd.Env = append(os.Environ(), env)
	}
	e.daemon(dockerd)
	e.command = []string{"/usr/bin/docker", "--host", host}
	e.env = []string{"HOME=" + e.dir, "DOCKER_CONFIG=" + e.dir}
	e.must("import", e.path("image.tar"), "busybox")
	begun := fmt.Sprint(time.Now().Unix())
	e.all(t)
	t.Run("events", func(t *testing.T) {
		out := e.in(t).must("events", "--since", begun, "--until", fmt.Sprint(time.Now().Unix()+1), "--format", "{{.Action}}")
		for _, want := range []string{"create", "start", "exec_die", "pause", "unpause", "kill", "die", "oom", "destroy"} {
			if !strings.Contains(out, want+"\n") {
				t.Errorf("no event %s:\n%s", want, out)
			}
		}
	})
	t.Run("health", func(t *testing.T) {
		e := e.in(t)
		e.must(run("--detach", "--name", "h1", "--health-cmd", "test -e /ok", "--health-interval", "200ms", "--health-retries", "1", "busybox", "sleep", "1000")...)
		e.becomes("unhealthy", "inspect", "--format", "{{.State.Health.Status}}", "h1")
		e.must("exec", "h1", "touch", "/ok")
		e.becomes("|healthy", "inspect", "--format", "|{{.State.Health.Status}}", "h1")
		e.must("rm", "--force", "h1")
	})
	e.checkpoint(t, []string{"checkpoint", "create", "c1", "cp"}, []string{"start", "--checkpoint", "cp", "c1"})
	e.called("create", "start", "exec", "pause", "resume", "update", "kill", "delete")
}

// daemon starts cmd, which is ended with the test.
func (e *engine) daemon(cmd *exec.Cmd) {
	e.Helper()
	log := &harness.Output{}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, patience
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		e.Fatalf("%v: run make engines", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	e.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			e.Error(err)
		}
		select {
		case <-ended:
		case <-time.After(patience):
			e.Errorf("dockerd still runs:\n%s", log)
			cmd.Process.Kill() // an error means that it has ended
			<-ended
		}
		if e.Failed() {
			lines := strings.Split(log.String(), "\n")
			e.Logf("the last of dockerd's log:\n%s", strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
		e.removeCgroups("kiln-docker-test")
	})
	if err := log.WaitFor(patience, "API listen on"); err != nil {
		e.Fatal(err)
	}
}
