//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
)

// daemon is a kilnd of a test's own.
type daemon struct {
	t      *testing.T
	root   string // state
	dir    string // socket, config, temporary files
	addr   string
	cgroup string // parent of the cgroups of its steps
	config string
	args   []string
	cmd    *exec.Cmd
	hangs  *time.Timer // takes the daemon that runs for one that hangs
	log    *lockedBuffer
	output io.Writer // where it writes its log; log
	before leftovers
}

var daemons atomic.Int32

// newDaemon starts a daemon with a fresh state directory; args are further
// flags. When the test ends it is stopped and everything it could have left
// behind is looked for.
func newDaemon(t *testing.T, args ...string) *daemon {
	t.Helper()
	return newDaemonWithConfig(t, "", args...)
}

// newDaemonWithConfig is newDaemon with further lines of config.
func newDaemonWithConfig(t *testing.T, config string, args ...string) *daemon {
	t.Helper()
	return newDaemonAt(t, filepath.Join(t.TempDir(), "state"), config, args...)
}

// newDaemonAt is newDaemonWithConfig with a state directory of the caller's.
func newDaemonAt(t *testing.T, root, config string, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, root: root, log: &lockedBuffer{}}
	d.output = d.log
	// Socket paths are short: t.TempDir may be too long for one.
	var err error
	if d.dir, err = os.MkdirTemp("", "kiln"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d.dir) })
	if err := os.Mkdir(d.tmp(), 0o700); err != nil {
		t.Fatal(err)
	}
	d.giveAway()
	d.before = survey(t, d.root, d.dir)
	d.addr = "unix://" + filepath.Join(d.dir, "s")
	d.cgroup = fmt.Sprintf("/kiln-e2e-%d-%d", os.Getpid(), daemons.Add(1))
	d.config = filepath.Join(d.dir, "kilnd.toml")
	config += fmt.Sprintf("\n[worker.oci]\ndefaultCgroupParent = %q\n", d.cgroup)
	if err := os.WriteFile(d.config, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	d.args = args
	if env.runtime != "" {
		d.args = append([]string{"--oci-worker-binary", env.runtime}, args...)
	}
	d.start()
	t.Cleanup(d.finish)
	return d
}

// giveAway makes the daemon's directories those of the user that it runs as.
func (d *daemon) giveAway() {
	d.t.Helper()
	if env.user == nil {
		return
	}
	err := os.MkdirAll(d.root, 0o755)
	// What a test has for its daemon, such as certificates, is below its directory.
	for dir := filepath.Dir(d.root); err == nil && dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		err = os.Chmod(dir, 0o755)
	}
	if err = errors.Join(err, env.user.Own(d.root, d.dir, d.tmp())); err != nil {
		d.t.Fatal(err)
	}
}

// tmp is where the daemon puts temporary files.
func (d *daemon) tmp() string { return filepath.Join(d.dir, "tmp") }

// dockerConfig is where its clients have their credentials.
func (d *daemon) dockerConfig() string { return filepath.Join(d.dir, "docker") }

// left describes what is there of the daemon beside itself, should it run.
func (d *daemon) left() string {
	d.t.Helper()
	now := survey(d.t, d.root, d.dir)
	if d.cmd != nil {
		now = now.without(d.cmd.Process.Pid).withoutMounts(filepath.Join(d.root, "executor", "bundles"), filepath.Join(d.root, "executor", "runc"))
	}
	return now.since(d.before)
}

// start runs the daemon and waits until it answers.
func (d *daemon) start() {
	d.t.Helper()
	args := append([]string{"--root", d.root, "--addr", d.addr, "--config", d.config, "--debug"}, d.args...)
	d.cmd = kilndCommand(args...)
	d.cmd.Env = append(d.cmd.Environ(), "TMPDIR="+d.tmp())
	d.cmd.Stdout, d.cmd.Stderr = d.output, d.output
	d.cmd.WaitDelay = harness.Patience // for a log that others have open
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	// What waits for it would do so until the time of all tests is over. This way it
	// says what it does, and the test fails.
	process := d.cmd.Process
	d.hangs = time.AfterFunc(patience, func() { process.Signal(syscall.SIGQUIT) })
	var ended error
	err := harness.WaitFor(harness.Patience, func() error {
		c, err := net.Dial("unix", strings.TrimPrefix(d.addr, "unix://"))
		if err == nil {
			return c.Close()
		}
		if isOver(d.cmd.Process.Pid) {
			ended = fmt.Errorf("it has ended: %w", err)
			return nil
		}
		return err
	})
	err = errors.Join(err, ended)
	// It listens, and answers some calls, before it has cleaned up what a crash left.
	if err == nil {
		err = harness.Ready(d.addr)
	}
	if err != nil {
		d.kill()
		d.t.Fatalf("kilnd does not answer: %v\n%s", err, d.log)
	}
}

// stop ends the daemon as an init system would.
func (d *daemon) stop() {
	d.t.Helper()
	if d.cmd == nil {
		return
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		d.t.Errorf("stop kilnd: %v", err)
	}
	d.hangs.Reset(harness.Patience)
	err := d.cmd.Wait()
	if !d.hangs.Stop() {
		d.t.Errorf("kilnd did not end within %s of SIGTERM", harness.Patience)
	}
	if err != nil {
		d.t.Errorf("kilnd: %v", err)
	}
	d.cmd = nil
}

// kill ends the daemon as a crash would.
func (d *daemon) kill() {
	d.t.Helper()
	d.cmd.Process.Kill() // an error means that it has ended
	d.cmd.Wait()         // likewise
	d.hangs.Stop()
	d.cmd = nil
}

// logs waits until the daemon's log has each of texts: what it has written gets here a
// moment later.
func (d *daemon) logs(texts ...string) {
	d.t.Helper()
	if err := harness.WaitFor(harness.Patience, func() error {
		log := d.log.String()
		for _, text := range texts {
			if !strings.Contains(log, text) {
				return fmt.Errorf("the daemon's log lacks %q:\n%s", text, tail(log, 200))
			}
		}
		return nil
	}); err != nil {
		d.t.Error(err)
	}
}

// finish stops the daemon and checks that nothing of it is left, and that du
// agrees with the disk; one that the test has ended is started for that.
func (d *daemon) finish() {
	d.t.Helper()
	ended := d.cmd == nil
	if !ended {
		d.addsUp()
		d.stop()
	}
	d.leavesNothing()
	if ended {
		d.output = d.log
		d.start()
		d.addsUp()
		d.stop()
	}
	if log := d.log.String(); strings.Contains(log, "SIGQUIT: quit") {
		d.t.Errorf("kilnd hung:\n%s", log)
	} else if d.t.Failed() {
		d.t.Logf("log of kilnd:\n%s", tail(log, 200))
	}
	if strings.Contains(d.log.String(), "panic") {
		d.t.Errorf("kilnd panicked:\n%s", tail(d.log.String(), 100))
	}
}

// leavesNothing checks what there is of a daemon that has ended: its store is
// clean, and there is nothing else.
func (d *daemon) leavesNothing() {
	d.t.Helper()
	d.fsck()
	if left := d.left(); left != "" {
		d.t.Errorf("left behind:\n%s", left)
	}
	if files, err := os.ReadDir(d.tmp()); err != nil || len(files) > 0 {
		d.t.Errorf("temporary files left behind: %v %v", files, err)
	}
	for _, dir := range cgroupDirs(d.cgroup) {
		d.t.Errorf("cgroup left behind: %s", dir)
	}
}

// addsUp compares what du reports with the state directory.
func (d *daemon) addsUp() {
	d.t.Helper()
	if err := harness.AddsUp(context.Background(), d.addr, d.root); err != nil {
		d.t.Error(err)
	}
}

// fsck checks the store of a daemon that isn't running.
func (d *daemon) fsck() {
	d.t.Helper()
	out, err := kilndCommand("fsck", "--deep", "--root", d.root).CombinedOutput()
	if err != nil {
		d.t.Errorf("kilnd fsck: %v\n%s", err, out)
	}
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	code           int
}

// buildctl runs upstream's buildctl against the daemon.
func (d *daemon) buildctl(args ...string) result {
	d.t.Helper()
	return d.run(filepath.Join(env.peer, "buildctl"), "", args...)
}

// run runs a client program against the daemon, with stdin.
func (d *daemon) run(program, stdin string, args ...string) result {
	d.t.Helper()
	cmd := d.client(program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	return runCommand(d.t, cmd)
}

// client is a client program of the daemon that isn't started yet.
func (d *daemon) client(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, append([]string{"--addr", d.addr}, args...)...)
	cmd.Env = append(os.Environ(), "BUILDKIT_PROGRESS=plain", "DOCKER_CONFIG="+d.dockerConfig())
	return cmd
}

func runCommand(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	err := ended(t, cmd)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{stdout: out.String(), stderr: errs.String(), code: cmd.ProcessState.ExitCode()}
}

// patience is how long anything may take; it is there to tell what hangs.
const patience = 5 * time.Minute

// ended waits for the end of cmd, which it brings about when it takes too long.
func ended(t *testing.T, cmd *exec.Cmd) error {
	t.Helper()
	cmd.WaitDelay = patience                                         // for output that others have open
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() }) // an error means that it has ended
	err := cmd.Wait()
	if !timer.Stop() {
		t.Errorf("%q still ran after %s", cmd.Args, patience)
	}
	return err
}

// must fails the test unless the command succeeded.
func (r result) must(t *testing.T) result {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d\nstdout:\n%s\nstderr:\n%s", r.code, r.stdout, r.stderr)
	}
	return r
}

// fails fails the test unless the command failed and said each of want.
func (r result) fails(t *testing.T, want ...string) result {
	t.Helper()
	if r.code == 0 {
		t.Fatalf("succeeded, want failure\nstdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
	}
	for _, w := range want {
		if !strings.Contains(r.stderr, w) {
			t.Errorf("stderr lacks %q:\n%s", w, r.stderr)
		}
	}
	return r
}
