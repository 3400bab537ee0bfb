//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// longRun is a build with a step that waits until it is told to go on. How often
// the step has begun is counted where a new run would find it.
const longRun = `FROM BASE AS long
RUN echo before > /before
RUN --mount=type=cache,target=/c : MARK; echo it has begun; echo begun >> /c/begun; while [ ! -e /c/go-on ]; do sleep 0.02; done; cp /c/begun /result; echo it has en''ded
FROM scratch
COPY --from=long /before /result /
`

// longMark is in the command of the step, to tell it from those of other test
// runs on the machine.
func longMark() string { return fmt.Sprintf("%d0817", os.Getpid()) }

// long is a client that builds longRun.
type long struct {
	d      *daemon
	base   string   // the image that it builds on
	args   []string // further flags
	cmd    *exec.Cmd
	out    string // where the result is put
	stderr *lockedBuffer
}

func (d *daemon) buildLong() *long {
	d.t.Helper()
	return d.buildLongOf(longRun, env.base)
}

// buildLongOf builds something like longRun; args are further flags.
func (d *daemon) buildLongOf(dockerfile, base string, args ...string) *long {
	d.t.Helper()
	dir := files{"Dockerfile": strings.NewReplacer("BASE", base, "MARK", longMark()).Replace(dockerfile)}.write(d.t)
	l := &long{d: d, base: base, args: args, out: d.t.TempDir(), stderr: &lockedBuffer{}}
	l.cmd = d.client(filepath.Join(env.peer, "buildctl"), append([]string{"build", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir,
		"--output", "type=local,dest=" + l.out}, args...)...)
	l.cmd.Stdout, l.cmd.Stderr = io.Discard, l.stderr
	if err := l.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	return l
}

// says waits until the client has shown text.
func (l *long) says(text string) {
	l.d.t.Helper()
	err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(l.stderr.String(), text) {
			return fmt.Errorf("the client hasn't shown %q:\n%s\nlog of kilnd:\n%s", text, l.stderr, tail(l.d.log.String(), 30))
		}
		return nil
	})
	if err != nil {
		l.cmd.Process.Kill()
		l.cmd.Wait()
		l.d.t.Fatal(err)
	}
}

var removed atomic.Int32

// begun waits until the step runs, and until what it stands on is on disk: that
// takes a moment, and a step that is younger ends with its daemon.
func (l *long) begun() {
	l.d.t.Helper()
	l.says(" it has begun\n")
	// A prune that removes something waits for the disk.
	id := fmt.Sprintf("removed%d", removed.Add(1))
	l.d.dockerfile("FROM "+l.base+"\nRUN --mount=type=cache,target=/r,id="+id+" echo "+id+"\n", nil, l.args...).must(l.d.t)
	if out := l.d.buildctl("prune", "--filter", `cachemount.id=="/`+id+`"`).must(l.d.t).stdout; !strings.Contains(out, "RECLAIMABLE") {
		l.d.t.Fatalf("prune removed nothing:\n%s", out)
	}
}

// fails waits for the client, whose daemon has gone.
func (l *long) fails() {
	l.d.t.Helper()
	var exit *exec.ExitError
	if err := ended(l.d.t, l.cmd); !errors.As(err, &exit) {
		l.d.t.Errorf("the client ended with %v", err)
	}
}

// succeeds waits for the client and checks that the step has run to its end, and
// has begun n times.
func (l *long) succeeds(n int) {
	t := l.d.t
	t.Helper()
	if err := ended(l.d.t, l.cmd); err != nil {
		t.Fatalf("build: %v\n%s", err, l.stderr)
	}
	if got := readFile(t, l.out, "result"); got != strings.Repeat("begun\n", n) {
		t.Errorf("the step has begun %d times, not %d", strings.Count(got, "\n"), n)
	}
	if got := readFile(t, l.out, "before"); got != "before\n" {
		t.Errorf("before is %q", got)
	}
	for _, want := range []string{" it has begun\n", " it has ended\n"} {
		if strings.Count(l.stderr.String(), want) != 1 {
			t.Errorf("the log doesn't have %q once:\n%s", want, l.stderr)
		}
	}
}

// goOn tells the step to.
func (d *daemon) goOn() {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", "begun"))
	if err != nil || len(found) != 1 {
		d.t.Fatalf("the cache mount is in %q, %v", found, err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(found[0]), "go-on"), nil, 0o644); err != nil {
		d.t.Fatal(err)
	}
}

// A step outlives its daemon, whether that is killed or ends in order. Who asks
// the next one for the same gets its log from the start and its result; it
// doesn't begin a second time.
func TestStepOutlivesDaemon(t *testing.T) {
	t.Run("Killed", func(t *testing.T) {
		d := newDaemon(t)
		first := d.buildLong()
		first.begun()
		d.kill()
		first.fails()
		d.start()
		second := d.buildLong()
		second.begun()
		third := d.buildLong() // joins
		third.begun()
		d.goOn()
		second.succeeds(1)
		third.succeeds(1)
		d.dockerfile(strings.ReplaceAll(longRun, "MARK", longMark()), nil).must(t) // from the cache
	})
	t.Run("EndedBeforeItIsAskedFor", func(t *testing.T) {
		d := newDaemon(t)
		first := d.buildLong()
		first.begun()
		d.kill()
		first.fails()
		d.goOn()
		noneLeft(t, longMark())
		d.start()
		d.buildLong().succeeds(1)
	})
	t.Run("Upgraded", func(t *testing.T) {
		d := newDaemon(t, "--grace", "10ms")
		for range 3 { // each daemon but the first goes on with what another has left
			client := d.buildLong()
			client.begun()
			d.stop() // what an init system does before it starts the new one
			client.fails()
			d.start()
		}
		last := d.buildLong()
		last.begun()
		d.kill()
		last.fails()
		d.start()
		last = d.buildLong()
		last.begun()
		d.goOn()
		last.succeeds(1)
	})
	t.Run("Interrupted", func(t *testing.T) { // by a developer, who wants an end
		d := newDaemon(t, "--grace", "10ms")
		first := d.buildLong()
		first.begun()
		if err := d.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		d.stop()
		first.fails()
		if left := marked(t, longMark()); len(left) > 0 {
			t.Errorf("the step goes on: %q", left)
		}
	})
}

// A step that nobody asks for ends, and all of it goes.
func TestUnclaimedStepEnds(t *testing.T) {
	for _, restarted := range []bool{true, false} {
		t.Run(fmt.Sprintf("DaemonComesBack=%v", restarted), func(t *testing.T) {
			d := newDaemonWithConfig(t, "[kiln]\nunclaimedStepTimeout = \"200ms\"")
			first := d.buildLong()
			first.begun()
			d.kill()
			first.fails()
			if restarted {
				d.start()
			}
			noneLeft(t, longMark())
			if !restarted {
				d.start()
			}
			second := d.buildLong() // anew
			second.begun()
			d.goOn()
			second.succeeds(2)
		})
	}
}
