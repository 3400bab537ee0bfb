//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

// survivor is a step that does what it can to outlive its end: processes in
// sessions of their own, below parents that have ended, deaf to signals, stopped,
// and blocked on pipes that nobody opens. Sleeping for a number that nobody else
// sleeps for makes them findable.
func survivor(marker string) string { return "FROM BASE\nRUN " + survival(marker) + "\n" }

// survival is what a survivor does.
func survival(marker string) string {
	return strings.ReplaceAll(`trap '' TERM INT HUP; \
    mkfifo /fifo; \
    (setsid sh -c 'trap "" TERM; setsid sleep MARK & sleep MARK' &); \
    sh -c 'sh -c "sleep MARK & sleep MARK" & exit 0'; \
    nohup sleep MARK >/dev/null 2>&1 & \
    (sleep MARK & kill -STOP $!); \
    sh -c 'cat /fifo; sleep MARK' & \
    sh -c ': MARK; read x <> /fifo' & \
    echo the last words; cat /fifo; sleep MARK`, "MARK", marker)
}

// marked lists the processes of the machine that have marker in their command.
func marked(t *testing.T, marker string) (list []string) {
	t.Helper()
	for pid, p := range processes(t) {
		if strings.Contains(p.command, marker) && pid != os.Getpid() {
			list = append(list, fmt.Sprintf("%d %s", pid, p.command))
		}
	}
	return list
}

// noneLeft waits until nothing that has marker in its command runs: of a build that is
// over, the client may hear before all of it has ended.
func noneLeft(t *testing.T, marker string) {
	t.Helper()
	if err := harness.WaitFor(harness.Patience, func() error {
		if left := marked(t, marker); len(left) > 0 {
			return fmt.Errorf("processes are left:\n%s", strings.Join(left, "\n"))
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestTimeouts(t *testing.T) {
	marker := fmt.Sprintf("%d0815", os.Getpid())
	// Where the last words are wanted, there is time to get as far.
	d := newDaemonWithConfig(t, "[kiln]\nnoOutputTimeout = \"3s\"")
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"OfTheStep", []string{"--opt", "kiln.step-timeout=2500ms"}, []string{"Dockerfile:2", "did not complete successfully: exit code: ", "timeout: it ran for", "is 2.5s (kiln.step-timeout)", `"the last words"`}},
		{"OfTheStepFromBuildx", []string{"--opt", "build-arg:KILN_STEP_TIMEOUT=300ms"}, []string{"kiln.step-timeout"}},
		{"OfOutputByDefault", nil, []string{"timeout: it ran for", "printed nothing for 3s", "kiln.no-output-timeout", `"the last words"`}},
		{"OfOutput", []string{"--opt", "kiln.no-output-timeout=700ms"}, []string{"printed nothing for 700ms"}},
		{"OfTheBuild", []string{"--opt", "kiln.build-timeout=800ms"}, []string{"timeout: the build has run for 800ms", "kiln.build-timeout"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.t = t
			d.dockerfile(survivor(marker), nil, c.args...).fails(t, c.want...)
			noneLeft(t, marker)
		})
	}
	d.t = t
	// Longer than it may be silent.
	d.dockerfile("FROM BASE\nRUN for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.3; done\n", nil, "--opt", "kiln.no-output-timeout=2s").must(t)
	d.dockerfile("FROM BASE\nRUN true\n", nil, "--opt", "kiln.step-timeout=soon").fails(t, "kiln.step-timeout", `"soon"`, "a duration such as 10m")
}

// The daemon's limits hold for builds that set none.
func TestTimeoutsOfTheDaemon(t *testing.T) {
	const sleeps = "FROM BASE\nRUN while :; do echo on; sleep 0.1; done\n"
	d := newDaemonWithConfig(t, "[kiln]\nstepTimeout = \"600ms\"\nbuildTimeout = \"50s\"")
	d.dockerfile(sleeps, nil).fails(t, "timeout: it ran for", "is 600ms (kiln.step-timeout)")
	d.dockerfile(sleeps, nil, "--opt", "kiln.step-timeout=300ms").fails(t, "is 300ms (kiln.step-timeout)")
	d.dockerfile("FROM BASE\nRUN sleep 1\n", nil, "--opt", "kiln.step-timeout=0").must(t)
	d = newDaemonWithConfig(t, "[kiln]\nstepTimeout = \"50s\"\nbuildTimeout = \"700ms\"")
	d.dockerfile(sleeps, nil).fails(t, "timeout: the build has run for 700ms", "kiln.build-timeout")
}

// When the client goes away, nothing of the step stays.
func TestCancelLeavesNothing(t *testing.T) {
	marker := fmt.Sprintf("%d0816", os.Getpid())
	d := newDaemon(t)
	dir := files{"Dockerfile": strings.ReplaceAll(survivor(marker), "BASE", env.base)}.write(t)
	cmd := d.client(env.peer+"/buildctl", "build", "--frontend", "dockerfile.v0", "--local", "context="+dir, "--local", "dockerfile="+dir)
	out := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = io.Discard, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	started := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(out.String(), "the last words\n") {
			return fmt.Errorf("the step hasn't begun:\n%s", out)
		}
		return nil
	})
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := ended(t, cmd); err == nil {
		t.Error("the build succeeded")
	}
	if started != nil {
		t.Fatal(started)
	}
	noneLeft(t, marker)
}
