//go:build linux

// Package cgrouptest has what tests of several packages need of control groups.
package cgrouptest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// V2 returns where the version 2 hierarchy is mounted, be it beside version 1,
// whose controllers it doesn't have then. Where nobody has mounted it, as on
// machines with version 1 alone, it is mounted until the test ends.
func V2(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " - cgroup2 ") {
			return strings.Fields(line)[4]
		}
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "cgroup2", 0, ""); err != nil {
		t.Fatalf("this test needs a version 2 cgroup hierarchy, or root that can mount it: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the version 2 hierarchy: %v", err)
		}
	})
	return dir
}

// CountsPeak reports whether this kernel counts the peak of a group's memory:
// version 1 always does, version 2 from Linux 5.19 on. Some group must have the
// memory controller.
func CountsPeak(t *testing.T) bool {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		if fields := strings.Split(line, ":"); strings.Contains(","+fields[1]+",", ",memory,") {
			return true
		}
	}
	var found, counts bool
	err = filepath.WalkDir(V2(t), func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // a group that has ended
			return nil
		}
		if err != nil || entry.Name() != "memory.current" {
			return err
		}
		_, err = os.Stat(filepath.Join(filepath.Dir(path), "memory.peak"))
		if found = true; err == nil {
			counts = true
		}
		return fs.SkipAll
	})
	if err != nil {
		t.Fatal(err)
	}
	if !found {
		t.Fatal("no version 2 group has the memory controller, with which the executor's tests run")
	}
	return counts
}
