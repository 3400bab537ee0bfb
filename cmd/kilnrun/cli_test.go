//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// shape is the JSON value with its own values left out.
func shape(t *testing.T, text string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return shapeOf(v)
}

func shapeOf(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = shapeOf(v[k])
		}
		return v
	case []any:
		for i := range v {
			v[i] = shapeOf(v[i])
		}
		return v
	}
	return fmt.Sprintf("%T", v)
}

// A container's life told by one command after the other, each a process of
// its own, says the same with both runtimes.
func TestCommandsSameAsRunc(t *testing.T) {
	type step struct {
		args []string
		json bool
	}
	steps := func(id, dir string) []step {
		return []step{
			{args: []string{"create", "--bundle", dir, "--pid-file", dir + "/pid", id}},
			{args: []string{"state", id}, json: true},
			{args: []string{"resume", id}},
			{args: []string{"start", id}},
			{args: []string{"start", id}},
			{args: []string{"state", id}, json: true},
			{args: []string{"list", "-q"}},
			{args: []string{"list", "--format", "json"}, json: true},
			{args: []string{"exec", "-e", "A=b", "--cwd", "/bin", "--user", "3:4", id, "sh", "-c", "echo $A; pwd; id -u; id -g; exit 5"}},
			{args: []string{"exec", id, "nonexist"}},
			{args: []string{"exec", "--process", dir + "/process.json", id}},
			{args: []string{"exec", "--detach", "--pid-file", dir + "/pid2", id, "sleep", "1000"}},
			{args: []string{"ps", "--format", "json", id}, json: true},
			{args: []string{"pause", id}},
			{args: []string{"state", id}, json: true},
			{args: []string{"exec", id, "id"}},
			{args: []string{"resume", id}},
			{args: []string{"update", "--memory", "64M", "--memory-swap", "64M", "--pids-limit", "50", id}},
			{args: []string{"exec", id, "cat", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/pids/pids.max"}},
			{args: []string{"delete", id}},
			{args: []string{"kill", id, "NOSUCH"}},
			{args: []string{"delete", "--force", id}},
			{args: []string{"delete", "--force", id}},
			{args: []string{"delete", id}},
			{args: []string{"state", id}},
			{args: []string{"kill", id, "TERM"}},
			{args: []string{"list", "-q"}},
		}
	}
	id := fmt.Sprintf("kilntest-%d-cli", os.Getpid())
	got := map[string][]any{}
	for name, binary := range runtimes(t) {
		dir, spec := newBundle(t, "sleep 1000")
		writeBundle(t, dir, spec)
		spec.Process.Args = []string{"sh", "-c", "id -u; echo $PATH"}
		b, err := json.Marshal(spec.Process)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/process.json", b, 0o600); err != nil {
			t.Fatal(err)
		}
		root := t.TempDir()
		for _, s := range steps(id, dir) {
			r := invokeToFile(t, binary, root, s.args...)
			if s.json && r.code == 0 {
				got[name] = append(got[name], shape(t, r.stdout))
				continue
			}
			got[name] = append(got[name], r.code, r.stdout)
		}
		for _, file := range []string{"/pid", "/pid2"} {
			b, err := os.ReadFile(dir + file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := strconv.Atoi(string(b)); err != nil {
				t.Errorf("%s: pid file: %v", name, err)
			}
		}
	}
	if !reflect.DeepEqual(got["kilnrun"], got["runc"]) {
		for i := range got["runc"] {
			if i >= len(got["kilnrun"]) || !reflect.DeepEqual(got["kilnrun"][i], got["runc"][i]) {
				t.Errorf("answer %d:\nkilnrun: %v\nrunc:    %v", i, got["kilnrun"][i], got["runc"][i])
			}
		}
	}
}

// invokeToFile is invoke for commands that leave a process with their output.
func invokeToFile(t *testing.T, binary, root string, args ...string) result {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(binary, append([]string{"--root", root}, args...)...)
	cmd.Stdout = out
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), string(text), ""}
}

func TestErrors(t *testing.T) {
	binary := runtimes(t)["kilnrun"]
	empty := t.TempDir()
	bad := t.TempDir()
	if err := os.WriteFile(bad+"/config.json", []byte(`{"ociVersion":"1.0.2","root":{"path":"x"},"linux":{}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--log-format", "xml", "list"}, `--log-format "xml"`},
		{[]string{"--rootless=true", "list"}, "needs root"},
		{[]string{"create", "--bundle", empty, "x"}, "config.json not found"},
		{[]string{"create", "--bundle", bad, "x"}, "no section process"},
		{[]string{"create"}, "usage: kilnrun create"},
		{[]string{"run", "--bundle", bad, "x"}, "no section process"},
		{[]string{"start", "nobody"}, "container does not exist"},
		{[]string{"state", "../etc"}, "invalid container ID"},
		{[]string{"list", "--format", "xml"}, `--format "xml"`},
		{[]string{"checkpoint", "--leave-running", "nobody"}, "container does not exist"},
		{[]string{"restore", "--bundle", empty, "x"}, "config.json not found"},
		{[]string{"restore", "--manage-cgroups-mode", "x", "x"}, `--manage-cgroups-mode "x"`},
		{[]string{"checkpoint", "--pre-dump", "nobody"}, "--pre-dump is not supported: memory is written down once"},
		{[]string{"checkpoint", "--pre-dump=false", "nobody"}, "container does not exist"},
		{[]string{"checkpoint", "--empty-ns", "network", "nobody"}, "--empty-ns is not supported"},
		{[]string{"restore", "--lazy-pages", "--bundle", empty, "x"}, "--lazy-pages is not supported"},
		{[]string{"update", "--l3-cache-schema", "L3:0=f", "nobody"}, "--l3-cache-schema is not supported"},
		{[]string{"kill", "nobody"}, "container does not exist"},
		{[]string{"exec", "nobody", "id"}, "container does not exist"},
		{[]string{"spec", "--bundle", bad}, "exists"},
		{[]string{"events", "nobody"}, "container does not exist"},
		{[]string{"create", "--preserve-fds", "1", "--bundle", empty, "x"}, "3 isn't open"},
		{[]string{"exec", "--preserv-fds", "1", "x"}, "unknown flag --preserv-fds; did you mean --preserve-fds?"},
		{[]string{"resum", "x"}, `unknown command "resum"; did you mean resume?`},
	} {
		t.Run(strings.Join(tc.args[:min(2, len(tc.args))], " "), func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			r := invoke(t, binary, t.TempDir(), append([]string{"--log", log, "--log-format", "json"}, tc.args...)...)
			if r.code == 0 || !strings.Contains(r.stderr, tc.want) {
				t.Errorf("exit code %d, stderr %q, want %q in it", r.code, r.stderr, tc.want)
			}
			if slices.Contains(tc.args, "xml") && tc.args[0] != "list" {
				return // nothing says how to write the log
			}
			b, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			var e entry
			if err := json.Unmarshal(b, &e); err != nil || e.Level != "error" || !strings.Contains(e.Msg, tc.want) || e.Time.IsZero() {
				t.Errorf("log %q: %v", b, err)
			}
		})
	}
}

// Capabilities that can't be granted are left out, with a warning in the log,
// which isn't printed where a container may print.
func TestCapabilitiesOfNobody(t *testing.T) {
	for name, binary := range runtimes(t) {
		dir, spec := newBundle(t, "grep CapEff: /proc/self/status")
		all := []string{"CAP_FLY", "CAP_CHOWN"}
		if name == "kilnrun" { // with one that it lacks, runc fails
			all = append(all, "CAP_NET_RAW")
			without := filepath.Join(dir, "without")
			if err := os.WriteFile(without, []byte("#!/bin/sh\nexec setpriv --bounding-set=-net_raw "+binary+" \"$@\"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			binary = without
		}
		spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
		writeBundle(t, dir, spec)
		for _, format := range []string{"text", "json"} {
			log := filepath.Join(dir, format)
			r := invoke(t, binary, t.TempDir(), "--log", log, "--log-format", format, "run", "--bundle", dir, fmt.Sprintf("kilntest-%d-caps", os.Getpid()))
			if r.code != 0 || r.stderr != "" || !strings.HasSuffix(r.stdout, "\t0000000000000001\n") {
				t.Errorf("%s: %+v", name, r)
			}
			text, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(text), "CAP_FLY") || strings.Contains(string(text), "CAP_CHOWN") || strings.Contains(string(text), "CAP_NET_RAW") != (name == "kilnrun") {
				t.Errorf("%s: log %q", name, text)
			}
			if format == "text" {
				continue
			}
			var e entry
			if err := json.Unmarshal(text, &e); err != nil || e.Level != "warning" || !strings.HasPrefix(e.Msg, "ignoring unknown or unavailable capabilities: [") || e.Time.IsZero() {
				t.Errorf("%s: log %q: %v", name, text, err)
			}
		}
	}
}

// Engines ask for it.
func TestVersion(t *testing.T) {
	r := invoke(t, runtimes(t)["kilnrun"], t.TempDir(), "--version")
	if r.code != 0 || !strings.HasPrefix(r.stdout, "kilnrun version ") || !strings.Contains(r.stdout, "\nspec: 1.") {
		t.Errorf("%+v", r)
	}
}

// Without systemd, --systemd-cgroup is an error that says so, and nothing is
// left. Systemd's tests have it with one.
func TestNoSystemd(t *testing.T) {
	binary := runtimes(t)["kilnrun"]
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexist")
	dir, spec := newBundle(t, "exit 0")
	for path, want := range map[string]string{"/a/b": "slice:prefix:name", "": "connect to systemd over D-Bus"} {
		spec.Linux.CgroupsPath = path
		writeBundle(t, dir, spec)
		root := t.TempDir()
		r := invoke(t, binary, root, "--systemd-cgroup", "run", "--bundle", dir, fmt.Sprintf("kilntest-%d-systemd", os.Getpid()))
		if _, err := os.Stat("/run/systemd/private"); err == nil && path == "" {
			want = "" // it runs here, and is reached without a bus
		}
		if (r.code == 0) != (want == "") || !strings.Contains(r.stderr, want) {
			t.Errorf("exit code %d, %q, want %q", r.code, r.stderr, want)
		}
		if left := invoke(t, binary, root, "list", "-q"); left.stdout != "" {
			t.Errorf("%s is left", left.stdout)
		}
	}
}

// What spec writes runs with both runtimes.
func TestSpecRuns(t *testing.T) {
	for name, binary := range runtimes(t) {
		dir, _ := newBundle(t, "")
		if r := invoke(t, runtimes(t)["kilnrun"], t.TempDir(), "spec", "--bundle", dir); r.code != 0 {
			t.Fatal(r.stderr)
		}
		b, err := os.ReadFile(dir + "/config.json")
		if err != nil {
			t.Fatal(err)
		}
		b = []byte(strings.Replace(string(b), `"terminal": true`, `"terminal": false`, 1))
		b = []byte(strings.Replace(string(b), `"sh"`, `"/bin/id"`, 1))
		if err := os.WriteFile(dir+"/config.json", b, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, d := range []string{"proc", "dev", "sys"} {
			if err := os.Mkdir(filepath.Join(dir, "rootfs", d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if r := invoke(t, binary, t.TempDir(), "run", "--bundle", dir, fmt.Sprintf("kilntest-%d-spec", os.Getpid())); r.code != 0 || !strings.Contains(r.stdout, "uid=0") {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// A container that executes its runtime can't write to it.
func TestOwnProgramIsSealed(t *testing.T) {
	binary := runtimes(t)["kilnrun"]
	dir, spec := newBundle(t, "")
	caps := []string{"CAP_DAC_OVERRIDE"}
	spec.Process.Capabilities.Bounding, spec.Process.Capabilities.Effective, spec.Process.Capabilities.Permitted = caps, caps, caps
	spec.Process.Args = []string{"sh", "-c", "sleep 1000"}
	writeBundle(t, dir, spec)
	root, id := t.TempDir(), fmt.Sprintf("kilntest-%d-seal", os.Getpid())
	if r := invokeToFile(t, binary, root, "create", "--bundle", dir, "--pid-file", dir+"/pid", id); r.code != 0 {
		t.Fatal(r)
	}
	defer invokeToFile(t, binary, root, "delete", "--force", id)
	pid, err := os.ReadFile(dir + "/pid")
	if err != nil {
		t.Fatal(err)
	}
	// The process at its start gate still is the runtime.
	exe := "/proc/" + string(pid) + "/exe"
	if f, err := os.OpenFile(exe, os.O_WRONLY, 0); err == nil {
		f.Close()
		t.Error("the runtime can be opened for writing")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(exe, &fs); err != nil || fs.Flags&unix.ST_RDONLY == 0 {
		t.Errorf("flags %#x, %v", fs.Flags, err)
	}
	if r := invokeToFile(t, binary, root, "exec", id, "cat", "/proc/1/exe"); r.code == 0 {
		t.Error("another process of the container can read the runtime")
	}
}
