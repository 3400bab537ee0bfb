//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// refusals are commands that can't be done: on a container that runs, on one
// that has ended, and without one.
func refusals(dir, running, stopped string) []refusal {
	return []refusal{
		{args: []string{"create", "--console-socket", "/nonexist", "x"}, want: "console socket"},
		{args: []string{"create", "--console-socket", dir + "/socket", "x"}, want: "the process has no terminal"},
		{args: []string{"run", "--console-socket", dir + "/socket", "x"}, want: "the process has no terminal"},
		{args: []string{"create", "--pid-file", "/nonexist/pid", "x"}, want: "write pid file: open /nonexist/"},
		{args: []string{"create", "--no-such-flag", "x"}, want: "unknown flag --no-such-flag"},
		{args: []string{"create", running}, want: "container with given ID already exists"},
		{args: []string{"create", "a/b"}, want: "invalid container ID"},
		{args: []string{"create", "--preserve-fds", "5", "x"}, want: "isn't open"},
		{args: []string{"start"}, want: "usage: kilnrun start [flags] ID"},
		{args: []string{"start", running}, want: "cannot start container " + running + ": it is running"},
		{args: []string{"start", stopped}, want: "it is stopped"},
		{args: []string{"kill", running, "NOSUCH"}, want: `unknown signal "NOSUCH"`},
		{args: []string{"kill", running, "99"}, want: `unknown signal "99"`},
		{args: []string{"kill", stopped}, want: "container not running"},
		{args: []string{"delete", running}, want: "that is not stopped: running"},
		{args: []string{"delete", "nobody"}, want: "container does not exist"},
		{args: []string{"delete", "--force", "nobody"}},
		{args: []string{"list", "--format", "xml"}, want: "it is table or json"},
		{args: []string{"ps", "--format", "xml", running}, want: "it is table or json"},
		{args: []string{"ps", running, "--no-such-option"}, want: "unknown gnu long option"},
		{args: []string{"ps", running, "-o", "args"}, want: "PID"},
		{args: []string{"ps", "nobody"}, want: "container does not exist"},
		{args: []string{"events", "--stats", stopped}, want: "it is stopped"},
		{args: []string{"events", "--interval", "0s", running}, want: "it must be more than nothing"},
		{args: []string{"events", "--interval", "soon", running}, want: `"soon"`},
		{args: []string{"pause", stopped}, want: "it is stopped"},
		{args: []string{"resume", running}, want: "it is running"},
		{args: []string{"update", "--memory", "lots", running}, want: `--memory "lots"`},
		{args: []string{"update", "--resources", "/nonexist", running}, want: "/nonexist"},
		{args: []string{"update", "--resources", "-", running}, stdin: `{"pids":{"limit":"x"}}`, want: "pids.limit"},
		{args: []string{"update", "--resources", "-", running}, stdin: `{"pids"`, want: "--resources"},
		{args: []string{"update", "--resources", "-", running}, stdin: `{"pids":{"limit":11}}`},
		{args: []string{"exec", running}, want: "no command given"},
		{args: []string{"exec", running, "nonexist"}, want: `"nonexist": executable file not found in $PATH`},
		{args: []string{"exec", "--user", "x", running, "id"}, want: `--user "x": it is UID[:GID]`},
		{args: []string{"exec", "--cwd", "bin", running, "id"}, want: "absolute path"},
		{args: []string{"exec", "--process", "/nonexist", running}, want: "/nonexist"},
		{args: []string{"exec", "--env", "novalue", running, "id"}, want: `"novalue" isn't NAME=VALUE`},
		{args: []string{"exec", "--env", "=x", running, "id"}, want: "a value has no name"},
		{args: []string{"exec", "--env", "A=", running, "id"}},
		{args: []string{"exec", "--cap", "CAP_NOT_KNOWN", "--cap", "CAP_SYS_ADMIN", running, "sh", "-c", `while read k v; do case $k$v in CapEff:*2?????) exit 3;; esac; done < /proc/self/status`},
			want: `ignoring unknown or unavailable capabilities: ["CAP_NOT_KNOWN"]`},
		{args: []string{"exec", "--tty", "--detach", running, "id"}, want: "needs --console-socket"},
		{args: []string{"exec", "--console-socket", dir + "/socket", running, "id"}, want: "the process has no terminal"},
		{args: []string{"exec", stopped, "id"}, want: "it is stopped"},
		{args: []string{"exec", "nobody", "id"}, want: "container does not exist"},
		{args: []string{"checkpoint", stopped}, want: "it is stopped"},
	}
}

type refusal struct {
	args  []string
	stdin string
	want  string // on standard error; "" if there is nothing to be refused
}

// What can't be done is told, with the exit code that runc has for it, and
// leaves the container as it was.
func TestRefusalsSameAsRunc(t *testing.T) {
	codes := map[string][]int{}
	running, stopped := fmt.Sprintf("kilntest-%d-refuse", os.Getpid()), fmt.Sprintf("kilntest-%d-refused", os.Getpid())
	for name, binary := range runtimes(t) {
		dir, spec := newBundle(t, "")
		spec.Process.Args = []string{"sleep", "1000"}
		writeBundle(t, dir, spec)
		listen(t, dir+"/socket")
		root := t.TempDir()
		for _, id := range []string{running, stopped} {
			if r := invokeToFile(t, binary, root, "run", "--detach", "--bundle", dir, id); r.code != 0 {
				t.Fatalf("%s: %+v", name, r)
			}
			defer invokeToFile(t, binary, root, "delete", "--force", id)
		}
		invoke(t, binary, root, "kill", stopped, "KILL")
		awaitStatus(t, binary, root, stopped, specs.StateStopped)
		for _, c := range refusals(dir, running, stopped) {
			r := invokeIn(t, dir, c.stdin, binary, root, c.args...)
			codes[name] = append(codes[name], r.code)
			if name != "kilnrun" {
				continue
			}
			if !strings.Contains(r.stderr, c.want) || (r.stderr == "") != (c.want == "") {
				t.Errorf("%q: stderr %q, want %q in it", c.args, r.stderr, c.want)
			}
		}
		awaitStatus(t, binary, root, running, specs.StateRunning)
		if left := invoke(t, binary, root, "list", "-q").stdout; left != running+"\n"+stopped+"\n" {
			t.Errorf("%s: containers %q", name, left)
		}
	}
	for i, c := range refusals("", running, stopped) {
		if got, want := codes["kilnrun"][i], codes["runc"][i]; got != want {
			t.Errorf("%q: exit code %d, runc's is %d", c.args, got, want)
		}
	}
}

// listen makes a socket to which anybody can connect.
func listen(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// invokeIn is invoke in a directory, with standard input.
func invokeIn(t *testing.T, dir, stdin, binary, root string, args ...string) result {
	t.Helper()
	var out, errs strings.Builder
	cmd := exec.Command(binary, append([]string{"--root", root}, args...)...)
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = dir, strings.NewReader(stdin), &out, &errs
	cmd.WaitDelay = time.Minute
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", args, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// awaitStatus waits until a container has a status.
func awaitStatus(t *testing.T, binary, root, id string, want specs.ContainerState) {
	t.Helper()
	var s specs.State
	for begun := time.Now(); time.Since(begun) < time.Minute; {
		r := invoke(t, binary, root, "state", id)
		if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
		if s.Status == want {
			return
		}
	}
	t.Fatalf("%s: %s is %s, want %s", filepath.Base(binary), id, s.Status, want)
}
