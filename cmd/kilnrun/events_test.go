//go:build linux && (amd64 || arm64)

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// events says again and again what a container uses, and when the kernel has
// killed for want of memory, until the container ends.
func TestEvents(t *testing.T) {
	binary := runtimes(t)["kilnrun"]
	const limit = 32 << 20
	dir, spec := newBundle(t, "while :; do busybox dd if=/dev/zero of=/dev/null bs=100M count=1; sleep 0.1; done")
	most, swap := int64(limit), int64(limit)
	spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &most, Swap: &swap}
	writeBundle(t, dir, spec)
	root, id := t.TempDir(), fmt.Sprintf("kilntest-%d-events", os.Getpid())
	if r := invokeToFile(t, binary, root, "run", "--detach", "--bundle", dir, id); r.code != 0 {
		t.Fatal(r)
	}
	defer invokeToFile(t, binary, root, "delete", "--force", id)
	cmd := exec.Command(binary, "--root", root, "events", "--interval", "50ms", id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }) //nolint:errcheck // told by how it ends
	defer timer.Stop()
	seen := map[string]int{}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var e struct {
			Type, ID string
			Data     struct {
				Memory struct {
					Usage struct{ Limit, Usage uint64 }
				}
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.ID != id {
			t.Errorf("%q: %v", lines.Text(), err)
		}
		if m := e.Data.Memory.Usage; e.Type == "stats" && (m.Limit != limit || m.Usage > limit) {
			t.Errorf("memory %+v", m)
		}
		if seen[e.Type]++; seen["stats"] > 1 && seen["oom"] == 1 {
			seen["oom"]++ // once is enough
			invoke(t, binary, root, "kill", id, "KILL")
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("events ended with %v, having seen %v", err, seen)
	}
	if seen["stats"] < 2 || seen["oom"] < 1 || len(seen) != 2 {
		t.Errorf("events %v", seen)
	}
}

// What features prints is what the specification has for it, and is true as far
// as runc says it too.
func TestFeatures(t *testing.T) {
	binary := runtimes(t)["kilnrun"]
	r := invoke(t, binary, t.TempDir(), "features")
	dec := json.NewDecoder(bytes.NewReader([]byte(r.stdout)))
	dec.DisallowUnknownFields()
	var f features.Features
	if err := dec.Decode(&f); err != nil || r.code != 0 {
		t.Fatalf("%+v: %v", r, err)
	}
	if f.OCIVersionMin != "1.0.0" || f.OCIVersionMax != specs.Version {
		t.Errorf("versions %s to %s", f.OCIVersionMin, f.OCIVersionMax)
	}
	if want := []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}; !slices.Equal(f.Hooks, want) {
		t.Errorf("hooks %q", f.Hooks)
	}
	for name, on := range map[string]*bool{
		"cgroup v1": f.Linux.Cgroup.V1, "cgroup v2": f.Linux.Cgroup.V2, "systemd": f.Linux.Cgroup.Systemd, "seccomp": f.Linux.Seccomp.Enabled,
		"AppArmor": f.Linux.Apparmor.Enabled, "SELinux": f.Linux.Selinux.Enabled, "idmap": f.Linux.MountExtensions.IDMap.Enabled,
	} {
		if on == nil || !*on {
			t.Errorf("%s isn't there", name)
		}
	}
	if slices.Contains(f.Linux.Seccomp.Actions, string(specs.ActNotify)) {
		t.Error("seccomp's notifications are claimed, and are refused")
	}
	// Each mount option that is listed is one.
	dir, spec := newBundle(t, "exit 0")
	for i, option := range f.MountOptions {
		if strings.HasSuffix(option, "idmap") || strings.Contains(option, "bind") {
			continue // for binds, which have a case of their own
		}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: fmt.Sprintf("/m%d", i), Type: "tmpfs", Source: "tmpfs", Options: []string{option}})
	}
	writeBundle(t, dir, spec)
	if r := invokeToFile(t, binary, t.TempDir(), "run", "--bundle", dir, fmt.Sprintf("kilntest-%d-options", os.Getpid())); r.code != 0 {
		t.Errorf("a container with a mount for each option: exit code %d", r.code)
	}
}
