//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
)

// A container that was given its cgroup may keep threads apart. Such groups list no
// processes.
func TestProcessesInGroupsOfThreads(t *testing.T) {
	g := groups{V2: filepath.Join(cgrouptest.V2(t), fmt.Sprintf("kilntest-threads-%d", os.Getpid()))}
	below := filepath.Join(g.V2, "threads")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(cmd.Process.Kill(), g.remove()); err != nil {
			t.Error(err)
		}
		cmd.Wait() //nolint:errcheck // killed
	})
	if err := errors.Join(writeControl(filepath.Join(below, "cgroup.type"), "threaded"), g.join(cmd.Process.Pid, nil), g.join(cmd.Process.Pid, map[string]string{"": "threads"})); err != nil {
		t.Fatal(err)
	}
	if pids, err := g.pids(); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("processes %v, %v; want %d", pids, err, cmd.Process.Pid)
	}
}

// Controllers are passed on by each group from the hierarchy's top to the
// container's parent, that one included, but not by the container's own.
func TestPassControllers(t *testing.T) {
	for _, below := range []string{"", "a.slice", "a.slice/b/c"} {
		root := t.TempDir()
		box := filepath.Join(root, below, "box")
		if err := os.MkdirAll(box, 0o755); err != nil {
			t.Fatal(err)
		}
		for dir := box; len(dir) >= len(root); dir = filepath.Dir(dir) {
			if err := errors.Join(os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpu\n"), 0o644), os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), nil, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if err := passControllers(root, box); err != nil {
			t.Fatal(err)
		}
		for dir := box; len(dir) >= len(root); dir = filepath.Dir(dir) {
			want := map[bool]string{true: "", false: "+cpu"}[dir == box]
			if got, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control")); err != nil || string(got) != want {
				t.Errorf("below %q: %s has %q, want %q (%v)", below, dir, got, want, err)
			}
		}
	}
}
