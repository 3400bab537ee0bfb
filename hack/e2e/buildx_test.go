//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// buildx is docker's client with a builder of its own, which is the daemon.
type buildx struct {
	t   *testing.T
	dir string // of its configuration and the HOME of its user
	d   *daemon
}

// newBuildx makes the builder known to buildx. There is no docker daemon.
func newBuildx(t *testing.T, d *daemon) *buildx {
	t.Helper()
	if _, err := os.Stat(filepath.Join(env.peer, "docker-buildx")); err != nil {
		t.Fatalf("%v: run make buildx first", err)
	}
	b := &buildx{t: t, dir: t.TempDir(), d: d}
	b.run("", "create", "--name", "kiln", "--driver", "remote", "--use", d.addr).must(t)
	return b
}

// run runs buildx in the directory dir.
func (b *buildx) run(dir string, args ...string) result {
	b.t.Helper()
	cmd := exec.Command(filepath.Join(env.peer, "docker-buildx"), args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+b.dir, "BUILDX_CONFIG="+filepath.Join(b.dir, "buildx"), "DOCKER_CONFIG="+filepath.Join(b.dir, "docker"),
		"DOCKER_HOST=unix://"+filepath.Join(b.dir, "no-docker"), "BUILDKIT_PROGRESS=plain")
	return runCommand(b.t, cmd)
}

const twoTargets = `FROM BASE AS base
# GREETING of the day
ARG GREETING=hello
RUN echo $GREETING > /greeting
FROM scratch AS one
COPY --from=base /greeting /one
# two is the whole
FROM scratch AS two
COPY --from=one /one /two
COPY f /f
`

func withBase(f files) files {
	for name, text := range f {
		f[name] = strings.ReplaceAll(text, "BASE", env.base)
	}
	return f
}

// compat: BCL-090, BCL-091, BCL-092, BCL-095, DMN-119
func TestBuildxBuilder(t *testing.T) {
	b := newBuildx(t, newDaemon(t))
	if out := b.run("", "inspect", "--bootstrap").must(t).stdout; !strings.Contains(out, "running") || !strings.Contains(out, "v0.33.1+kiln.") || !strings.Contains(out, "linux/") {
		t.Errorf("inspect says\n%s", out)
	}
	if out := b.run("", "ls").must(t).stdout; !strings.Contains(out, b.d.addr) || !strings.Contains(out, "running") {
		t.Errorf("ls says\n%s", out)
	}
	dir := withBase(files{"Dockerfile": twoTargets, "f": "x"}).write(t)
	b.run("", "build", "-o", "type=local,dest="+t.TempDir(), dir).must(t)
	if out := b.run("", "du").must(t).stdout; strings.Count(out, "\n") < 6 || strings.Contains(out, "Total:\t\t0B") {
		t.Errorf("du says\n%s", out)
	}
	b.run("", "prune", "--all", "--force").must(t)
	if out := b.run("", "du").must(t).stdout; !strings.Contains(out, "Total:\t\t0B") {
		t.Errorf("after prune du says\n%s", out)
	}
	b.run("", "build", "-o", "type=local,dest="+t.TempDir(), dir).must(t)
	b.run("", "rm", "kiln").must(t)
}

// compat: BCL-101, EXP-003, EXP-058
func TestBuildxOutputs(t *testing.T) {
	b := newBuildx(t, newDaemon(t))
	dir := withBase(files{"Dockerfile": twoTargets, "f": "x"}).write(t)
	out := t.TempDir()
	path := func(name string) string { return filepath.Join(out, name) }
	t.Run("Local", func(t *testing.T) {
		b.run(dir, "build", "--build-arg", "GREETING=hi", "-o", path("local"), ".").must(t)
		if two, f := readFile(t, out, "local", "two"), readFile(t, out, "local", "f"); two != "hi\n" || f != "x" {
			t.Errorf("two = %q, f = %q", two, f)
		}
	})
	t.Run("Target", func(t *testing.T) {
		b.run(dir, "build", "--target", "one", "-o", path("target"), ".").must(t)
		if one := readFile(t, out, "target", "one"); one != "hello\n" {
			t.Errorf("one = %q", one)
		}
	})
	t.Run("Docker", func(t *testing.T) {
		b.run(dir, "build", "-t", "app:1", "-o", "type=docker,dest="+path("docker.tar"), ".").must(t)
		l, content := readArchive(t, path("docker.tar"))
		if !strings.Contains(string(content["manifest.json"]), `"app:1"`) || len(l.manifest.Layers) != 2 {
			t.Errorf("manifest.json = %s", content["manifest.json"])
		}
	})
	t.Run("OCI", func(t *testing.T) {
		b.run(dir, "build", "-t", "app:1", "-o", "type=oci,dest="+path("oci.tar"), ".").must(t)
		l, _ := readArchive(t, path("oci.tar"))
		if got := fmt.Sprint(l.entries(t, 0), l.entries(t, 1)); got != "[two] [f]" {
			t.Errorf("layers hold %s", got)
		}
	})
	t.Run("Push", func(t *testing.T) {
		b.run(dir, "build", "-t", env.registry+"/buildx/app:1", "--push", "--metadata-file", path("meta.json"), ".").must(t)
		l := readImage(t, "buildx/app", "1")
		var meta map[string]any
		unmarshal(t, []byte(readFile(t, out, "meta.json")), &meta)
		if meta["containerimage.config.digest"] != l.manifest.Config.Digest.String() {
			t.Errorf("metadata %v, config %s", meta, l.manifest.Config.Digest)
		}
		if ref, ok := meta["buildx.build.ref"].(string); !ok || !strings.HasPrefix(ref, "kiln/") {
			t.Errorf("metadata %v has no ref", meta)
		}
	})
	t.Run("Secrets", func(t *testing.T) {
		dir := withBase(files{"Dockerfile": "FROM BASE AS b\nRUN --mount=type=secret,id=file cat /run/secrets/file > /f\nRUN --mount=type=secret,id=E,env=E echo $E >> /f\nFROM scratch\nCOPY --from=b /f /\n", "s": "of a file\n"}).write(t)
		t.Setenv("E", "of the environment")
		b.run(dir, "build", "--secret", "id=file,src=s", "--secret", "id=E", "-o", path("secrets"), ".").must(t)
		if got := readFile(t, out, "secrets", "f"); got != "of a file\nof the environment\n" {
			t.Errorf("f = %q", got)
		}
	})
	t.Run("NamedContext", func(t *testing.T) {
		other := files{"f": "other"}.write(t)
		b.run(dir, "build", "--build-context", "one="+other, "--build-context", "base=docker-image://"+env.base, "-f", "-", "-o", path("contexts"), ".").fails(t)
		dockerfile := files{"Dockerfile": "FROM scratch\nCOPY --from=one f /\n"}.write(t)
		b.run(dir, "build", "--build-context", "one="+other, "-f", filepath.Join(dockerfile, "Dockerfile"), "-o", path("contexts"), ".").must(t)
		if got := readFile(t, out, "contexts", "f"); got != "other" {
			t.Errorf("f = %q", got)
		}
	})
	t.Run("Failure", func(t *testing.T) {
		dir := withBase(files{"Dockerfile": "FROM BASE\nRUN exit 9\n"}).write(t)
		b.run(dir, "build", ".").fails(t, "Dockerfile:2", "exit code: 9")
	})
}

// compat: BCL-097
func TestBuildxBake(t *testing.T) {
	b := newBuildx(t, newDaemon(t))
	dir := withBase(files{"Dockerfile": twoTargets, "f": "x", "Linked": "FROM scratch\nCOPY --from=first /one /linked\n", "docker-bake.hcl": `
group "default" { targets = ["first", "second"] }
target "first" {
  target = "one"
  args = { GREETING = "baked" }
  output = ["type=local,dest=out1"]
}
target "second" {
  dockerfile = "Linked"
  contexts = { first = "target:first" }
  output = ["type=local,dest=out2"]
}
`}).write(t)
	b.run(dir, "bake", "--metadata-file", "meta.json").must(t)
	if one, linked := readFile(t, dir, "out1", "one"), readFile(t, dir, "out2", "linked"); one != "baked\n" || linked != "baked\n" {
		t.Errorf("one = %q, linked = %q", one, linked)
	}
	var meta map[string]map[string]any
	unmarshal(t, []byte(readFile(t, dir, "meta.json")), &meta)
	if meta["first"]["buildx.build.ref"] == nil || meta["second"]["buildx.build.ref"] == nil {
		t.Errorf("metadata %v", meta)
	}
	b.run(dir, "bake", "--set", "first.args.GREETING=again", "second").must(t)
	if linked := readFile(t, dir, "out2", "linked"); linked != "again\n" {
		t.Errorf("linked = %q", linked)
	}
}

// compat: BCL-099
func TestBuildxCalls(t *testing.T) {
	b := newBuildx(t, newDaemon(t))
	dir := withBase(files{"Dockerfile": twoTargets, "f": "x", "Bad": "from scratch\ncopy f /\nENV a b\n"}).write(t)
	if out := b.run(dir, "build", "--check", ".").must(t).stdout; !strings.Contains(out, "no warnings found") {
		t.Errorf("check says\n%s", out)
	}
	bad := b.run(dir, "build", "--check", "-f", "Bad", ".")
	if bad.code == 0 || !strings.Contains(bad.stdout, "LegacyKeyValueFormat") || !strings.Contains(bad.stdout, "ConsistentInstructionCasing") || !strings.Contains(bad.stdout, ">>> ENV a b") {
		t.Errorf("check of a bad Dockerfile ends with %d and says\n%s", bad.code, bad.stdout)
	}
	var outline struct {
		Args []struct{ Name, Description, Value string }
	}
	unmarshal(t, []byte(b.run(dir, "build", "--call", "outline,format=json", ".").must(t).stdout), &outline)
	if len(outline.Args) != 1 || outline.Args[0].Name != "GREETING" || outline.Args[0].Value != "hello" || outline.Args[0].Description != "of the day" {
		t.Errorf("outline %+v", outline)
	}
	var targets struct {
		Targets []struct {
			Name, Description string
			Default           bool
		}
	}
	unmarshal(t, []byte(b.run(dir, "build", "--call", "targets,format=json", ".").must(t).stdout), &targets)
	if got := fmt.Sprint(targets.Targets); got != "[{base  false} {one  false} {two is the whole true}]" {
		t.Errorf("targets %s", got)
	}
}

// compat: BCL-093
func TestBuildxHistory(t *testing.T) {
	d := newDaemon(t)
	b := newBuildx(t, d)
	dir := withBase(files{"Dockerfile": twoTargets, "f": "x", "Fails": "FROM BASE\nRUN echo last words; exit 9\n"}).write(t)
	b.run(dir, "build", "-o", t.TempDir(), ".").must(t)
	b.run(dir, "build", "-f", "Fails", ".").fails(t)
	d.stop()
	d.start()
	type record struct {
		Ref, Status          string
		TotalSteps           int `json:"total_steps"`
		CompletedSteps       int `json:"completed_steps"`
		CreatedAt, Completed any
	}
	var failed, completed string
	out := b.run(dir, "history", "ls", "--format", "json").must(t).stdout
	for dec := json.NewDecoder(strings.NewReader(out)); dec.More(); {
		var r record
		if err := dec.Decode(&r); err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		ref := r.Ref[strings.LastIndex(r.Ref, "/")+1:]
		if r.Status == "Error" {
			failed = ref
		} else if r.Status == "Completed" {
			completed = ref
		}
	}
	if failed == "" || completed == "" {
		t.Fatalf("history ls says\n%s", out)
	}
	if out := b.run(dir, "history", "inspect", failed).must(t).stdout; !strings.Contains(out, "Fails") || !strings.Contains(out, "exit code: 9") {
		t.Errorf("history inspect says\n%s", out)
	}
	if r := b.run(dir, "history", "logs", "--progress", "plain", failed).must(t); !strings.Contains(r.stdout+r.stderr, "last words") {
		t.Errorf("history logs says\n%s%s", r.stdout, r.stderr)
	}
	b.run(dir, "history", "rm", failed).must(t)
	if out := b.run(dir, "history", "ls").must(t).stdout; strings.Contains(out, failed) || !strings.Contains(out, completed) {
		t.Errorf("after history rm %s history ls says\n%s", failed, out)
	}
}

// buildx opens its own shell in a step that failed.
// compat: BCL-094
func TestBuildxDebug(t *testing.T) {
	d := newDaemon(t)
	b := newBuildx(t, d)
	dir := withBase(files{"Dockerfile": "FROM BASE\nENV A=b\nRUN echo half > /half; exit 1\n"}).write(t)
	line := filepath.Join(env.peer, "docker-buildx") + " debug --invoke /bin/sh build --progress=plain " + dir
	cmd := exec.Command("script", "-qec", line, "/dev/null")
	cmd.Env = append(os.Environ(), "HOME="+b.dir, "BUILDX_CONFIG="+filepath.Join(b.dir, "buildx"), "DOCKER_CONFIG="+filepath.Join(b.dir, "docker"),
		"DOCKER_HOST=unix://"+filepath.Join(b.dir, "no-docker"), "BUILDX_EXPERIMENTAL=1", "TERM=xterm", "SHELL=/bin/sh")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s := startScreen(t, cmd)
	s.await("/ # ")
	s.typed("cat /half; echo $A is $((40+2))\n")
	s.await("half")
	s.await("b is 42")
	s.typed("\x04")
}
