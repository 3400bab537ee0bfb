//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// onError is kiln's buildctl building a Dockerfile with --on-error=shell.
func (d *daemon) onError(dockerfile, stdin string, args ...string) result {
	d.t.Helper()
	dir := files{"Dockerfile": strings.ReplaceAll(dockerfile, "BASE", env.base), "ctx": "of the context"}.write(d.t)
	return d.run(filepath.Join(env.bin, "buildctl"), stdin, append([]string{"build", "--on-error=shell"}, append(args, dir)...)...)
}

// A shell in the failed step has its files as the step left them, its mounts,
// environment, user and working directory, and nothing of it stays.
// compat: GW-064, LLB-034, CTL-086
func TestShellInFailedStep(t *testing.T) {
	d := newDaemon(t)
	const dockerfile = `FROM BASE
RUN mkdir /data && chmod 777 /data
ENV COLOR=red
WORKDIR /work
USER 1000:1001
RUN --mount=type=bind,target=/ctx --mount=type=tmpfs,target=/scratch --mount=type=cache,target=/cache,uid=1000 \
    --mount=type=secret,id=s,target=/run/s,uid=1000 --mount=type=secret,id=e,env=SECRET \
    echo half done > /data/half; echo cached > /cache/c; exit 3
`
	secret := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(secret, []byte("hush"), 0o600); err != nil {
		t.Fatal(err)
	}
	const script = `cat /data/half /ctx/ctx /cache/c /run/s; echo
id -u; id -g; pwd; echo $COLOR $SECRET
touch /scratch/x && ls /scratch
exit 9
`
	r := d.onError(dockerfile, script, "--secret", "id=s,src="+secret, "--secret", "id=e,src="+secret, "--progress=plain")
	r.fails(t, "exit code: 3", "/bin/sh in the failed step")
	if want := "half done\nof the contextcached\nhush\n1000\n1001\n/work\nred hush\nx\n"; r.stdout != want {
		t.Errorf("the shell printed %q, want %q", r.stdout, want)
	}
	if n := strings.Count(r.stderr, "echo half done"); n == 0 || strings.Contains(r.stderr, "panic") {
		t.Errorf("stderr:\n%s", r.stderr)
	}
	// What the shell did is gone, and what the step had made, too.
	if out := d.buildctl("du", "-v").must(t).stdout; strings.Contains(out, "container failed-step") || strings.Contains(out, "mount / from exec /bin/sh -c echo half") {
		t.Errorf("the failed step is kept:\n%s", out)
	}
	t.Run("Success", func(t *testing.T) {
		out := t.TempDir()
		r := d.onError("FROM BASE\nRUN echo fine > /f\n", "echo never\n", "-o", out).must(t)
		if r.stdout != "" || readFile(t, out, "f") != "fine\n" {
			t.Errorf("printed %q", r.stdout)
		}
	})
	t.Run("NoShell", func(t *testing.T) {
		d.onError("FROM scratch\nCOPY ctx /f\nRUN [\"/nope\"]\n", "").fails(t, "no shell in the failed step", "/bin/sh", "/nope")
	})
	t.Run("NoCommand", func(t *testing.T) {
		d.onError("FROM scratch\nCOPY missing /f\n", "").fails(t, "missing")
	})
	t.Run("OwnShell", func(t *testing.T) {
		r := d.onError("FROM BASE\nRUN mkdir /my && cp /bin/busybox /my/sh\nSHELL [\"/my/sh\", \"-ec\"]\nRUN false\n", "echo $0\n")
		r.fails(t, "/my/sh in the failed step")
		if r.stdout != "/my/sh\n" {
			t.Errorf("printed %q", r.stdout)
		}
	})
	t.Run("BadFlag", func(t *testing.T) {
		d.kiln("build", "--on-error=panic", t.TempDir()).fails(t, `--on-error "panic"`)
	})
}

// While a shell is open its user goes away, the daemon is stopped, or both are
// killed: nothing stays.
// compat: GW-052
func TestShellIsAbandoned(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, d *daemon, client *exec.Cmd){
		"ClientInterrupted": func(t *testing.T, _ *daemon, client *exec.Cmd) { client.Process.Signal(os.Interrupt) },
		"ClientKilled":      func(t *testing.T, _ *daemon, client *exec.Cmd) { client.Process.Kill() },
		"DaemonStopped":     func(t *testing.T, d *daemon, _ *exec.Cmd) { d.stop() },
		"DaemonKilled":      func(t *testing.T, d *daemon, _ *exec.Cmd) { d.kill(); d.start() },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t, "--grace", "200ms")
			dir := files{"Dockerfile": "FROM " + env.base + "\nRUN echo x > /x; exit 1\n"}.write(t)
			client := d.client(filepath.Join(env.bin, "buildctl"), "build", "--on-error=shell", dir)
			s := startScreen(t, client)
			marker := fmt.Sprintf("%d0818", os.Getpid())
			s.typed(survival(marker) + "\n")
			s.await("the last words")
			if err := harness.WaitFor(harness.Patience, func() error { // the shell forks, then executes it
				if left := d.left(); !strings.Contains(left, "sleep "+marker) {
					return &notYet{left}
				}
				return nil
			}); err != nil {
				t.Fatalf("what runs in the shell isn't among what could be left: %v", err)
			}
			end(t, d, client)
			// Also where the daemon runs on, without what the shell has started.
			noneLeft(t, marker)
		})
	}
}

type notYet struct{ what string }

func (e *notYet) Error() string { return "not yet: " + e.what }

// Further commands run beside the shell, in the same container.
func TestDebugExec(t *testing.T) {
	d := newDaemon(t)
	dir := files{"Dockerfile": "FROM " + env.base + "\nENV A=b\nWORKDIR /w\nRUN echo left > /left; exit 1\n"}.write(t)
	ref := filepath.Join(t.TempDir(), "ref")
	client := d.client(filepath.Join(env.bin, "buildctl"), "build", "--on-error=shell", "--ref-file", ref, dir)
	s := startScreen(t, client)
	s.typed("echo by the shell > /shell; echo is $((40+2))\n")
	s.await("is 42")
	id := readFile(t, ref)
	if got := d.kiln("debug", "exec", id, "sh", "-c", "cat /left /shell; echo $A; pwd; test $$ -ne 1 && echo beside").must(t).stdout; got != "left\nby the shell\nb\n/w\nbeside\n" {
		t.Errorf("printed %q", got)
	}
	if got := d.run(filepath.Join(env.bin, "buildctl"), "cat /shell\n", "debug", "exec", id).must(t).stdout; got != "by the shell\n" {
		t.Errorf("a shell printed %q", got)
	}
	if r := d.kiln("debug", "exec", id, "--", "sh", "-c", "exit 6"); r.code != 6 {
		t.Errorf("exit code %d, want 6: %s", r.code, r.stderr)
	}
	d.kiln("debug", "exec", id, "nope").fails(t, "nope")
	d.kiln("debug", "exec", "nothing").fails(t, "nothing")
	d.kiln("debug", "exec").fails(t, "which build?")
	s.stdin.Close()
	if err := ended(t, client); err == nil || !strings.Contains(s.out.String(), "exit code: 1") {
		t.Errorf("the build ended with %v:\n%s", err, s.out)
	}
	d.kiln("debug", "exec", id, "true").fails(t, id)
}

// On a terminal the shell has one of its own, of the same size, and the
// terminal is as before afterwards.
// compat: GW-058
func TestShellOnTerminal(t *testing.T) {
	d := newDaemon(t)
	dir := files{"Dockerfile": "FROM " + env.base + "\nRUN exit 1\n"}.write(t)
	if _, err := exec.LookPath("script"); err != nil {
		t.Fatalf("%v: install the package bsdutils", err)
	}
	// script gives its command a terminal; what is typed there is its stdin.
	line := "stty rows 33 cols 99; " + filepath.Join(env.bin, "buildctl") + " --addr " + d.addr + " build --progress=plain --on-error=shell " + dir + "; stty -a | grep -o ' echo '"
	cmd := exec.Command("script", "-qec", line, "/dev/null")
	cmd.Env = append(os.Environ(), "TERM=xterm", "SHELL=/bin/sh")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s := startScreen(t, cmd)
	s.await("leave it to end the build")
	s.typed("test -t 0 && echo it is $((40+2)); busybox stty size\n")
	s.await("it is 42")
	s.await("33 99")
	s.typed("echo goes on $((50+2)); sleep 1000\n")
	s.await("goes on 52")
	s.typed("\x03")
	s.typed("echo code $?\n")
	s.await("code 130")
	s.typed("\x04")
	s.await(" echo ")
}

// screen is a program that is typed to and watched.
type screen struct {
	t     *testing.T
	out   *lockedBuffer
	stdin io.WriteCloser
}

// startScreen starts cmd, which is killed when the test ends.
func startScreen(t *testing.T, cmd *exec.Cmd) *screen {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{t: t, out: &lockedBuffer{}, stdin: stdin}
	cmd.Stdout, cmd.Stderr = s.out, s.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) // errors: it has ended
	return s
}

func (s *screen) await(want string) {
	s.t.Helper()
	if err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(s.out.String(), want) {
			return &notYet{s.out.String()}
		}
		return nil
	}); err != nil {
		s.t.Fatalf("no %q: %v", want, err)
	}
}

func (s *screen) typed(text string) {
	s.t.Helper()
	if _, err := s.stdin.Write([]byte(text)); err != nil {
		s.t.Fatal(err)
	}
}
