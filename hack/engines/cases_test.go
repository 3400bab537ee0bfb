//go:build e2e

package engines

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// run are the arguments of every run.
func run(args ...string) []string { return append([]string{"run", "--network", "none"}, args...) }

// both are the cases that Podman and Docker have in common.
var both = map[string]func(e *engine){
	"run": func(e *engine) {
		e.ends(3, "hello\n0\n", run("--rm", "busybox", "sh", "-c", "echo hello; id -u; exit 3")...)
		e.ends(127, "executable file not found in $PATH", run("--rm", "busybox", "nonesuch")...)
		e.ends(126, "permission denied", run("--rm", "busybox", "/bin")...)
		e.ends(137, "", run("--rm", "--memory", "20m", "--memory-swap", "20m", "busybox", "sh", "-c", "exec dd if=/dev/zero of=/dev/null bs=100M")...)
		in := e.cmd(run("--rm", "-i", "busybox", "cat")...)
		in.Stdin = strings.NewReader("through a pipe")
		if out := e.succeeds(in); out != "through a pipe" {
			e.Errorf("cat prints %q", out)
		}
	},
	"confined": func(e *engine) {
		e.write("data/f", "data\n")
		e.ends(1, "1000\nbox\ndata\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n", run("--rm", "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges",
			"--user", "1000:1000", "--hostname", "box", "-v", e.path("data")+":/data:ro", "busybox", "sh", "-c",
			"id -u; hostname; cat /data/f; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; (echo x > /x) 2>/dev/null")...)
	},
	"lifecycle": func(e *engine) {
		e.must(run("--detach", "--name", "c1", "--memory", "64m", "busybox", "sh", "-c", "echo out; echo err >&2; exec sleep 1000")...)
		e.becomes("out", "logs", "c1")
		e.becomes("err", "logs", "c1")
		e.ends(9, "in\nsleep\n", "exec", "c1", "sh", "-c", "echo in; cat /proc/1/comm; exit 9")
		e.ends(0, "1000\n/bin\nb\n", "exec", "--user", "1000", "--workdir", "/bin", "--env", "A=b", "c1", "sh", "-c", "id -u; pwd; echo $A")
		e.ends(e.notFound, "executable file not found in $PATH", "exec", "c1", "nonesuch")
		e.must("pause", "c1")
		e.becomes("paused", "inspect", "--format", "{{.State.Status}}", "c1")
		e.must("unpause", "c1")
		e.becomes("running", "inspect", "--format", "{{.State.Status}}", "c1")
		e.ends(0, "c1", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", "c1")
		e.ends(0, "sleep", "top", "c1")
		e.must("update", "--memory", "32m", "--memory-swap", "32m", "c1")
		e.ends(0, e.limit, "exec", "c1", "sh", "-c", "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max")
		e.must("restart", "--time", "0", "c1")
		e.ends(0, "again", "exec", "c1", "echo", "again")
		e.must("kill", "--signal", "KILL", "c1")
		e.ends(0, "137", "wait", "c1")
		e.must("rm", "c1")
	},
	"terminal": func(e *engine) {
		code, out := e.onTerminal(run("--rm", "-it", "busybox", "sh", "-c", "tty; read x; echo got $x; exit 5"), "typed\n")
		if code != 5 || !strings.Contains(out, "/dev/pts/0") || !strings.Contains(out, "got typed") {
			e.Errorf("exit code %d, shown %q", code, out)
		}
		e.must(run("--detach", "--name", "t1", "busybox", "sleep", "1000")...)
		if code, out := e.onTerminal([]string{"exec", "-it", "t1", "sh", "-c", "tty; exit 6"}, ""); code != 6 || !strings.Contains(out, "/dev/pts/0") {
			e.Errorf("exec: exit code %d, shown %q", code, out)
		}
		e.must("kill", "--signal", "KILL", "t1")
		e.must("rm", "--force", "t1")
	},
}

// onTerminal runs a command of the engine on a terminal and types text.
func (e *engine) onTerminal(args []string, text string) (int, string) {
	e.Helper()
	cmd := e.cmd(args...)
	line := "stty rows 33 cols 44; exec"
	for _, a := range cmd.Args {
		line += " '" + a + "'"
	}
	script := exec.Command("script", "-qec", line, "/dev/null")
	script.Env = append(cmd.Env, "TERM=xterm", "SHELL=/bin/sh")
	script.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, typing, err := os.Pipe() // open until the command ends: its end is one of the terminal's
	if err != nil {
		e.Fatal(err)
	}
	defer in.Close()
	defer typing.Close()
	if _, err := typing.WriteString(text); err != nil {
		e.Fatal(err)
	}
	script.Stdin = in
	return e.try(script)
}

// all runs the common cases.
func (e *engine) all(t *testing.T) {
	for name, run := range both {
		t.Run(name, func(t *testing.T) { run(e.in(t)) })
	}
}
