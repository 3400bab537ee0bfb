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

	"github.com/kilnbuild/kiln/hack/harness"
)

// kiln runs kiln's own buildctl against the daemon.
func (d *daemon) kiln(args ...string) result {
	d.t.Helper()
	return d.run(filepath.Join(env.bin, "buildctl"), "", args...)
}

// compat: BCL-060, BCL-062, BCL-070, BCL-071, CTL-120, CTL-121, CTL-122, CTL-100, CTL-107, DMN-070
func TestInfoUsageAndPrune(t *testing.T) {
	d := newDaemonWithConfig(t, "[worker.oci.labels]\n", "--oci-worker-labels", "color=red")
	d.dockerfile("FROM BASE\nRUN echo x > /x\nRUN --mount=type=cache,target=/c echo y > /c/y\n", nil).must(t)
	for name, run := range map[string]func(...string) result{"upstream": d.buildctl, "kiln": d.kiln} {
		if out := run("debug", "info").must(t).stdout; !strings.Contains(out, "github.com/kilnbuild/kiln") || !strings.Contains(out, "v0.33.1+kiln.") {
			t.Errorf("%s: debug info says %q", name, out)
		}
		if out := run("debug", "workers", "-v").must(t).stdout; !strings.Contains(out, "linux/") || !strings.Contains(out, "color") || !strings.Contains(out, "org.mobyproject.buildkit.worker.executor") {
			t.Errorf("%s: debug workers says %q", name, out)
		}
		if out := run("du", "-v").must(t).stdout; !strings.Contains(out, "exec.cachemount") || !strings.Contains(out, "Total:") {
			t.Errorf("%s: du says %q", name, out)
		}
		if out := run("du", "--filter", "type==exec.cachemount").must(t).stdout; strings.Count(out, "\n") != 2 {
			t.Errorf("%s: du of cache mounts says %q", name, out)
		}
	}
	d.buildctl("prune", "--filter", "type==exec.cachemount").must(t)
	if out := d.kiln("du").must(t).stdout; strings.Contains(out, "*") {
		t.Errorf("the cache mount is left: %q", out)
	}
	d.buildctl("prune", "--keep-duration", "1h").must(t)
	if out := d.kiln("du").must(t).stdout; strings.Count(out, "\n") < 4 {
		t.Errorf("records that were just used are gone: %q", out)
	}
	d.buildctl("prune", "--all").must(t)
	if out := d.kiln("du", "--format", "{{json .}}").must(t).stdout; strings.TrimSpace(out) != "[]" {
		t.Errorf("after prune --all: %s", out)
	}
	d.dockerfile("FROM BASE\nRUN echo x > /x\n", nil).must(t)
}

// compat: BCL-020, BCL-021, BCL-064
func TestShortForm(t *testing.T) {
	d := newDaemon(t)
	dir := files{"Dockerfile": "ARG BASE\nFROM $BASE AS b\nARG V=none\nRUN mkdir /out && echo $V > /out/v\nFROM scratch AS bin\nCOPY --from=b /out /\n", "D2": "FROM scratch\nCOPY D2 /\n"}.write(t)
	out := t.TempDir()
	d.kiln("build", "--build-arg", "BASE="+env.base, "--build-arg", "V=1", "-o", out, dir).must(t)
	if got := readFile(t, out, "v"); got != "1\n" {
		t.Errorf("v = %q", got)
	}
	archive := filepath.Join(t.TempDir(), "a.tar")
	d.kiln("build", "-t", "app:2", "-f", filepath.Join(dir, "D2"), "-o", "type=docker,dest="+archive, dir).must(t)
	l, content := readArchive(t, archive)
	if !strings.Contains(string(content["manifest.json"]), `"app:2"`) || len(l.manifest.Layers) != 1 {
		t.Errorf("manifest.json = %s", content["manifest.json"])
	}
	d.kiln("build", "-t", env.registry+"/cli/app:3", "--push", "-f", filepath.Join(dir, "D2"), dir).must(t)
	readImage(t, "cli/app", "3")
	if r := d.kiln("build", "-t", "app:3", "-f", filepath.Join(dir, "D2"), dir).must(t); !strings.Contains(r.stderr, "in the daemon's cache alone: --push") {
		t.Errorf("of an image that nobody has, it says:\n%s", r.stderr)
	}
	d.kiln("build", "--push", dir).fails(t, "--push needs a name")
	d.kiln("build", filepath.Join(dir, "D2")).fails(t, "not a directory")
	d.kiln("build", "--tagg", "x", dir).fails(t, "tagg")
	d.kiln("build", "-t", "UPPER", dir).fails(t, "UPPER")
}

// Upstream's buildctl through kiln's dial-stdio is what docker and ssh helpers do.
func TestDefinitionFromStdin(t *testing.T) {
	d := newDaemon(t)
	gen := exec.Command("go", "run", "./examples/llb", env.base)
	gen.Dir = filepath.Dir(env.bin)
	def, err := gen.Output()
	if err != nil {
		t.Fatalf("examples/llb: %v", err)
	}
	out := t.TempDir()
	for _, program := range []string{filepath.Join(env.peer, "buildctl"), filepath.Join(env.bin, "buildctl")} {
		d.run(program, string(def), "build", "--output", "type=local,dest="+out).must(t)
	}
	entries, err := os.ReadDir(out)
	if err != nil || len(entries) == 0 {
		t.Fatalf("the example's result is empty: %v", err)
	}
}

// With no address and no daemon at the default one, buildctl starts a private
// daemon, says so, and uses it again.
func TestAutostart(t *testing.T) {
	if _, err := os.Stat("/run/buildkit/buildkitd.sock"); err == nil {
		t.Fatal("a daemon listens at the default address; stop it for this test")
	}
	run, data := t.TempDir(), t.TempDir()
	before := survey(t, run, data)
	if err := os.Chmod(run, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := files{"Dockerfile": "FROM scratch\nCOPY Dockerfile /\n"}.write(t)
	buildctl := func(args ...string) result {
		cmd := exec.Command(filepath.Join(env.bin, "buildctl"), args...)
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+run, "XDG_DATA_HOME="+data, "BUILDKIT_PROGRESS=plain", "BUILDKIT_HOST=")
		return runCommand(t, cmd)
	}
	buildctl("--no-autostart", "build", dir).fails(t, "no daemon listens", "--no-autostart")
	out := t.TempDir()
	r := buildctl("--debug", "--timeout", "300", "build", "-o", out, dir).must(t)
	if !strings.Contains(r.stderr, "private, just started") {
		t.Errorf("--debug does not say which daemon is used: %s", r.stderr)
	}
	if r = buildctl("--debug", "du").must(t); !strings.Contains(r.stderr, "private, running") {
		t.Errorf("the private daemon is not used again: %s", r.stderr)
	}
	readFile(t, out, "Dockerfile")
	stopByRoot(t, filepath.Join(data, "kiln"))
	if left := survey(t, run, data).since(before); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// stopByRoot ends the kilnd whose state directory is root.
func stopByRoot(t *testing.T, root string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		cmd, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(cmd), "kilnd\x00--root\x00"+root+"\x00") {
			continue
		}
		var pid int
		fmt.Sscanf(p, "/proc/%d/", &pid)
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if err := harness.WaitFor(harness.Patience, func() error {
			if state, _ := status(pid); state != 'Z' && state != 'X' {
				return fmt.Errorf("kilnd %d still runs", pid)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		return
	}
	t.Errorf("no kilnd with the root %s runs", root)
}

// compat: DMN-001, DMN-003, DMN-008, DMN-023, DMN-048, DMN-124
func TestFlagsAndConfig(t *testing.T) {
	kilnd := func(args ...string) result {
		return runCommand(t, kilndCommand(args...))
	}
	dir := t.TempDir()
	conf := func(text string) string {
		path := filepath.Join(dir, "kilnd.toml")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kilnd("--adr", "x").fails(t, "adr", "addr")
	kilnd("--config", conf("rooot = 1\n")).fails(t, "unknown key rooot", "root")
	kilnd("--config", conf("[worker.oci]\nmax-paralelism = 1\n")).fails(t, "max-paralelism", "max-parallelism")
	kilnd("--config", conf("root = \n")).fails(t, "line 1")
	kilnd("--config", filepath.Join(dir, "missing.toml")).fails(t, "missing.toml")
	kilnd("--root", filepath.Join(dir, "s"), "--addr", "ftp://x").fails(t, "ftp")
	kilnd("--allow-insecure-entitlement", "root").fails(t, "root", "network.host")
	foreign := filepath.Join(dir, "foreign")
	if err := os.MkdirAll(filepath.Join(foreign, "runc-overlayfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	kilnd("--root", foreign, "--addr", "unix://"+dir+"/f.sock").fails(t, "buildkitd")

	d := newDaemonWithConfig(t, "insecure-entitlements = [\"network.host\"]\n[otel]\nsocketPath = \"/x\"\n[history]\nmaxAge = 3600\n", "--cdi-disabled", "--otel-socket-path", "/x")
	d.dockerfile("FROM BASE\nRUN --network=host true\n", nil, "--allow", "network.host").must(t)
	unused := []string{"config key otel.socketPath has no effect", "flag --cdi-disabled has no effect", "flag --otel-socket-path has no effect"}
	d.logs(unused...)
	for _, want := range unused {
		if n := strings.Count(d.log.String(), want); n != 1 {
			t.Errorf("the log says %d times %q:\n%s", n, want, d.log)
		}
	}
	second := runCommand(t, kilndCommand("--root", d.root, "--addr", "unix://"+dir+"/second.sock", "--config", d.config))
	second.fails(t, "in use")
}

// compat: CTL-130, CTL-136, CTL-138
func TestHistory(t *testing.T) {
	d := newDaemon(t)
	d.dockerfile("FROM BASE\nRUN echo 1\n", nil).must(t)
	d.dockerfile("FROM BASE\nRUN exit 3\n", nil).fails(t)
	check := func() {
		t.Helper()
		out := d.buildctl("debug", "histories", "--format", "{{json .}}").must(t).stdout
		dec := json.NewDecoder(strings.NewReader(out))
		ok, failed := 0, 0
		for dec.More() {
			var ev struct {
				Record struct {
					Ref           string
					Error         *struct{ Message string } `json:"error"`
					NumTotalSteps int                       `json:"numTotalSteps"`
				} `json:"record"`
			}
			if err := dec.Decode(&ev); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			if ev.Record.Error != nil {
				failed++
			} else if ev.Record.NumTotalSteps > 0 {
				ok++
			}
		}
		if ok != 1 || failed != 1 {
			t.Errorf("%d builds succeeded and %d failed in the history, want 1 and 1: %s", ok, failed, out)
		}
	}
	check()
	d.stop()
	d.start()
	check()
}
