//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
)

// 16 clients at once, half of them with the same work: everyone gets its own
// result, equal work is done once, nobody sees another's secret.
// compat: CTL-045, X-2, LLB-045
func TestSixteenClients(t *testing.T) {
	d := newDaemon(t)
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	same := files{"Dockerfile": strings.ReplaceAll("FROM BASE AS b\nRUN --mount=type=cache,target=/c sleep 1; echo x >> /c/count; cp /c/count /count\nRUN --mount=type=secret,id=s cat /run/secrets/s > /secret\nFROM scratch\nCOPY --from=b /count /secret /\n", "BASE", env.base)}.write(t)
	var wg sync.WaitGroup
	for i := range 16 {
		secret := filepath.Join(t.TempDir(), "s")
		if err := os.WriteFile(secret, []byte(fmt.Sprintf("secret-%d", i)), 0o600); err != nil {
			t.Fatal(err)
		}
		dir, want := same, "x\n"
		if i%2 == 1 {
			dir = files{"Dockerfile": strings.ReplaceAll(fmt.Sprintf("FROM BASE AS b\nRUN echo %d > /count\nRUN --mount=type=secret,id=s cat /run/secrets/s > /secret; echo %d\nFROM scratch\nCOPY --from=b /count /secret /\n", i, i), "BASE", env.base)}.write(t)
			want = fmt.Sprintf("%d\n", i)
		}
		out := t.TempDir()
		wg.Go(func() {
			r := d.dockerfileIn(dir, "--secret", "id=s,src="+secret, "--output", "type=local,dest="+out)
			if r.code != 0 {
				t.Errorf("client %d: %s", i, r.stderr)
				return
			}
			if got := readFile(t, out, "count"); got != want {
				t.Errorf("client %d: count = %q, want %q", i, got, want)
			}
			got := readFile(t, out, "secret")
			if i%2 == 1 && got != fmt.Sprintf("secret-%d", i) {
				t.Errorf("client %d sees the secret %q", i, got)
			}
		})
	}
	wg.Wait()
}

// Two clients whose steps run at the same time with secrets of their own get what
// was made with theirs, also of what stands on the step. compat: X-2
func TestSecretsOfClientsAtOnce(t *testing.T) {
	d := newDaemon(t)
	const wait = "wait() { n=0; until [ -e /c/$1 ]; do n=$((n+1)); [ $n -lt 1200 ] || exit 1; sleep 0.05; done; }; "
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE AS b\nRUN --mount=type=secret,id=s --mount=type=cache,target=/c s=$(cat /run/secrets/s); "+wait+
		"touch /c/$s; wait one; wait two; [ $s = one ] || wait done; echo $s > /secret\nFROM scratch\nCOPY --from=b /secret /\n", "BASE", env.base)}.write(t)
	client := func(secret string) (ended chan result, out string) {
		ended, out = make(chan result, 1), t.TempDir()
		from := files{"s": secret}.write(t)
		go func() {
			ended <- d.dockerfileIn(dir, "--secret", "id=s,src="+filepath.Join(from, "s"), "--output", "type=local,dest="+out)
		}()
		return ended, out
	}
	first, one := client("one")
	second, two := client("two")
	(<-first).must(t)
	d.dockerfile("FROM BASE\nRUN --mount=type=cache,target=/c touch /c/done\n", nil).must(t)
	(<-second).must(t)
	for want, out := range map[string]string{"one\n": one, "two\n": two} {
		if got := readFile(t, out, "secret"); got != want {
			t.Errorf("a client has %q, want %q", got, want)
		}
	}
}

// A client that is killed cancels its build; what its step started is gone.
// compat: CTL-044, X-3, X-9
func TestClientKilled(t *testing.T) {
	d := newDaemon(t)
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE\nRUN echo sta''rted; (setsid sleep 4321 &) ; sleep 4321\n", "BASE", env.base)}.write(t)
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", d.addr, "build", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--progress=plain")
	var out lockedBuffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(out.String(), "started") {
			return fmt.Errorf("the step has not started: %s", out.String())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err := harness.WaitFor(harness.Patience, func() error {
		if left := d.left(); strings.Contains(left, "4321") {
			return fmt.Errorf("still running: %s", left)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	d.dockerfile("FROM BASE\nRUN echo after\n", nil).must(t)
}

// A client killed in the middle of a transfer leaves nothing that a later
// build would take for complete. compat: SES-041
func TestClientKilledMidTransfer(t *testing.T) {
	d := newDaemon(t)
	dir := t.TempDir()
	big := strings.Repeat("0123456789abcdef", 1<<16)
	for i := range 64 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d", i)), []byte(big), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\nCOPY . /\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"--addr", d.addr, "build", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir, "--progress=plain"}
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), args...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Some of the files are here.
	if err := harness.WaitFor(harness.Patience, func() error {
		if found, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", "f1")); err != nil || len(found) == 0 {
			return fmt.Errorf("no file has come: %v", err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	res := t.TempDir()
	d.dockerfileIn(dir, "--output", "type=local,dest="+res).must(t)
	for i := range 64 {
		if got := readFile(t, res, fmt.Sprintf("f%d", i)); got != big {
			t.Fatalf("f%d has %d bytes, want %d", i, len(got), len(big))
		}
	}
}

// A daemon that is killed under load starts again, clean, for which two seconds of a
// processor are plenty, and builds. compat: DMN-117, X-9
func TestKillNine(t *testing.T) {
	d := newDaemon(t, "--unclaimed-step-timeout", "0") // nothing is to outlive it
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	for round := range 20 {
		var wg sync.WaitGroup
		for i := range 3 {
			dir := files{"f": fmt.Sprint(round, i), "Dockerfile": strings.ReplaceAll(fmt.Sprintf(
				"FROM BASE\nCOPY f /f\nRUN --mount=type=cache,target=/c echo %d >> /c/f; dd if=/dev/urandom of=/big bs=64k count=20\nRUN rm /big; seq 1000 > /n\nRUN sort -r /n > /m\nRUN true\nRUN true\nRUN sleep 30\n", i), "BASE", env.base)}.write(t)
			cmd := exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", d.addr, "build", "--frontend", "dockerfile.v0",
				"--local", "context="+dir, "--local", "dockerfile="+dir, "--progress=plain")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() { cmd.Wait() }) // fails: its daemon is killed
		}
		// A moment that differs from round to round.
		time.Sleep(time.Duration(20+round*37%400) * time.Millisecond)
		d.kill()
		wg.Wait()
		d.start()
		if took := processorTime(t, d.cmd.Process.Pid); took > harness.Slow(2*time.Second) {
			t.Errorf("round %d: the daemon took %s of a processor to start again", round, took)
		}
		if left := d.left(); left != "" {
			t.Errorf("round %d: after the restart\n%s", round, left)
		}
		d.stop()
		d.fsck()
		d.start()
		d.dockerfile(fmt.Sprintf("FROM BASE\nRUN echo %d\n", round), nil).must(t)
	}
}

// processorTime is how much of a processor a process has used.
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// Fields 14 and 15 of proc(5), in hundredths of a second. The name, the second, may hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, err := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * time.Second / 100
}

// SIGTERM lets running builds end; a second signal doesn't. compat: DMN-112
func TestDrain(t *testing.T) {
	d := newDaemon(t, "--grace", "5m")
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE AS b\nRUN echo sta''rted; sleep 1; echo done > /f\nFROM scratch\nCOPY --from=b /f /\n", "BASE", env.base)}.write(t)
	out := t.TempDir()
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", d.addr, "build", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--progress=plain", "--output", "type=local,dest="+out)
	var log lockedBuffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(log.String(), "started") {
			return fmt.Errorf("the step has not started: %s", log.String())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := ended(t, cmd); err != nil {
		t.Errorf("the build did not end well: %v\n%s", err, log.String())
	}
	if got := readFile(t, out, "f"); got != "done\n" {
		t.Errorf("f = %q", got)
	}
	d.stop() // it ends by itself
}

// A full disk fails the build with a reason, not the daemon.
func TestDiskFull(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(t.TempDir(), "img")
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(48 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-F", img}, {"mount", "-o", "loop", img, disk}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", args[0], err, out)
		}
	}
	t.Cleanup(func() { exec.Command("umount", "-l", disk).Run() })
	d := newDaemonAt(t, filepath.Join(disk, "state"), "")
	d.dockerfile("FROM BASE\nRUN echo small\n", nil).must(t)
	d.dockerfile("FROM BASE\nRUN dd if=/dev/zero of=/big bs=1M count=100\n", nil).fails(t, "No space left")
	big := files{"f": strings.Repeat("0123456789abcdef", 6<<16)}
	for i := range 12 {
		big[fmt.Sprintf("f%d", i)] = big["f"]
	}
	d.dockerfile("FROM scratch\nCOPY . /\n", big).fails(t, "no space left")
	// What the failed builds wrote goes in the background.
	if err := harness.WaitFor(harness.Patience, func() error {
		if r := d.dockerfile("FROM BASE\nRUN echo again\n", nil); r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	}); err != nil {
		t.Errorf("no build works after the disk was full: %v", err)
	}
}
