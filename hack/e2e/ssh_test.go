//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// agent is an ssh-agent with one key.
type agent struct {
	socket string
	public string // file of the public key
}

func startAgent(t *testing.T) agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "agent") // a short path for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := agent{socket: filepath.Join(dir, "s"), public: filepath.Join(dir, "key.pub")}
	cmd := exec.Command("ssh-agent", "-D", "-a", a.socket)
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: install the package openssh-client", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() // an error means that it has ended
		cmd.Wait()         // likewise
	})
	if err := harness.WaitFor(harness.Patience, func() error {
		c, err := net.Dial("unix", a.socket)
		if err != nil {
			return err
		}
		return c.Close()
	}); err != nil {
		t.Fatal(err)
	}
	command(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "key-of-the-test", "-f", filepath.Join(dir, "key"))
	command(t, []string{"SSH_AUTH_SOCK=" + a.socket}, "ssh-add", "-q", filepath.Join(dir, "key"))
	if err := os.Remove(filepath.Join(dir, "key")); err != nil { // the agent alone has it now
		t.Fatal(err)
	}
	return a
}

// command runs a program of this machine and returns what it prints.
func command(t *testing.T, environ []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), environ...)
	return runCommand(t, cmd).must(t).stdout
}

// copyProgram puts a program of this machine and the libraries it is linked
// with below dir, where they are in the root file system.
func copyProgram(t *testing.T, dir, name string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	needed := []string{path}
	for field := range strings.FieldsSeq(command(t, nil, "ldd", path)) {
		if strings.HasPrefix(field, "/") {
			needed = append(needed, field)
		}
	}
	for _, file := range needed {
		to := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, []byte(readFile(t, file)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// Steps use the keys of the client's agent and never see them.
// compat: LLB-048, SES-071, BCL-032, DF-079
func TestSSHAgent(t *testing.T) {
	a := startAgent(t)
	dir := files{"data": "to be signed\n", "key.pub": readFile(t, a.public)}.write(t)
	for _, name := range []string{"ssh-add", "ssh-keygen"} {
		copyProgram(t, filepath.Join(dir, "tools"), name)
	}
	build := func(d *daemon, body string, args ...string) (string, result) {
		out := t.TempDir()
		text := strings.ReplaceAll("FROM BASE AS b\nCOPY tools /\nCOPY data key.pub /\nRUN mkdir /out\n"+body+"\nFROM scratch\nCOPY --from=b /out /\n", "BASE", env.base)
		if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return out, d.dockerfileIn(dir, append(args, "--output", "type=local,dest="+out)...)
	}
	d := newDaemon(t)
	t.Run("ListAndSign", func(t *testing.T) {
		out, r := build(d, "RUN --mount=type=ssh,required=true ssh-add -l > /out/keys; stat -c '%F %a %u' $SSH_AUTH_SOCK > /out/socket\n"+
			"RUN --mount=type=ssh ssh-keygen -q -Y sign -f /key.pub -n test < /data > /out/signature", "--ssh", "default="+a.socket)
		r.must(t)
		if want := command(t, nil, "ssh-keygen", "-lf", a.public); readFile(t, out, "keys") != want {
			t.Errorf("the step sees the keys %q, the agent has %q", readFile(t, out, "keys"), want)
		}
		if got := readFile(t, out, "socket"); got != "socket 600 0\n" {
			t.Errorf("the socket is %q", got)
		}
		check := exec.Command("ssh-keygen", "-Y", "check-novalidate", "-n", "test", "-s", filepath.Join(out, "signature"))
		check.Stdin = strings.NewReader("to be signed\n")
		if r := runCommand(t, check); r.code != 0 {
			t.Errorf("the signature isn't good: %s%s", r.stdout, r.stderr)
		}
	})
	t.Run("OwnerTargetAndID", func(t *testing.T) {
		out, r := build(d, "RUN chmod 777 /out\nUSER daemon\nRUN --mount=type=ssh,id=mine,target=/x/agent,mode=0660,uid=1,gid=10 SSH_AUTH_SOCK=/x/agent ssh-add -l > /out/keys; stat -c '%a %u:%g' /x/agent > /out/socket",
			"--ssh", "mine="+a.socket)
		r.must(t)
		if got := readFile(t, out, "socket"); got != "660 1:10\n" {
			t.Errorf("the socket is %q", got)
		}
		if got := readFile(t, out, "keys"); !strings.Contains(got, "key-of-the-test") {
			t.Errorf("the step sees the keys %q", got)
		}
	})
	t.Run("NothingIsKept", func(t *testing.T) {
		out, r := build(d, "RUN --mount=type=ssh ssh-add -l\nRUN test -z \"$SSH_AUTH_SOCK\"; find / -xdev -type s > /out/sockets; test ! -e /run", "--ssh", "default="+a.socket)
		r.must(t)
		if got := readFile(t, out, "sockets"); got != "" {
			t.Errorf("after the step there are the sockets %q", got)
		}
	})
	t.Run("Errors", func(t *testing.T) {
		_, r := build(d, "RUN --mount=type=ssh,required=true echo required && ssh-add -l")
		r.fails(t, "Dockerfile:5", "default", "--ssh")
		_, r = build(d, "RUN --mount=type=ssh,id=other,required=true echo other && ssh-add -l", "--ssh", "default="+a.socket)
		r.fails(t, "Dockerfile:5", "other")
		out, r := build(d, "RUN --mount=type=ssh test ! -e \"$SSH_AUTH_SOCK\" && echo none > /out/optional")
		r.must(t)
		if got := readFile(t, out, "optional"); got != "none\n" {
			t.Errorf("without an agent the step says %q", got)
		}
	})
	// A raw socket gets the step's bytes as they are, and its answer goes back.
	t.Run("Raw", func(t *testing.T) {
		socket := filepath.Join(filepath.Dir(a.socket), "raw")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- refuseOnce(l) }()
		out, r := build(d, "RUN --mount=type=ssh,id=raw ssh-add -l > /out/keys 2>&1; test $? != 0", "--ssh", "raw="+socket+",raw=true")
		r.must(t)
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		if got := readFile(t, out, "keys"); !strings.Contains(got, "refused operation") {
			t.Errorf("ssh-add says %q", got)
		}
	})
}

// refuseOnce answers one request for an agent's keys with a refusal, and then
// waits for the other side to hang up.
func refuseOnce(l net.Listener) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	const request, refusal = "\x00\x00\x00\x01\x0b", "\x00\x00\x00\x01\x05"
	got := make([]byte, len(request))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != request {
		return fmt.Errorf("the step's request came as %q", got)
	}
	if _, err := io.WriteString(c, refusal); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, c)
	return err
}
