//go:build linux

// Package cgrouptest has what tests of several packages need of control groups.
package cgrouptest

import (
	"os"
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
