//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// leftovers is what a daemon could leave behind, as found at one moment.
type leftovers struct {
	mounts, namespaces, processes []string
}

// survey lists mounts, network namespaces and processes of containers.
func survey(t *testing.T) leftovers {
	t.Helper()
	var l leftovers
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		l.mounts = append(l.mounts, strings.TrimSpace(line))
	}
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if ns, err := os.Readlink(p + "/ns/net"); err == nil && !slices.Contains(l.namespaces, ns) {
			l.namespaces = append(l.namespaces, ns)
		}
		if ns, err := os.Readlink(p + "/ns/pid"); err == nil && ns != own && !zombie(p) {
			cmd, _ := os.ReadFile(p + "/cmdline")
			l.processes = append(l.processes, fmt.Sprintf("%s %s", filepath.Base(p), strings.ReplaceAll(string(cmd), "\x00", " ")))
		}
	}
	return l
}

// zombie reports whether the process has ended: one whose parent died as well
// stays until the machine's init reaps it.
func zombie(proc string) bool {
	stat, err := os.ReadFile(proc + "/stat")
	_, rest, ok := strings.Cut(string(stat), ") ")
	return err != nil || !ok || rest[0] == 'Z' || rest[0] == 'X'
}

// since describes what is there now and was not before.
func (l leftovers) since(before leftovers) string {
	var out strings.Builder
	more := func(what string, now, then []string) {
		for _, s := range now {
			if !slices.Contains(then, s) {
				fmt.Fprintf(&out, "%s: %s\n", what, s)
			}
		}
	}
	more("mount", l.mounts, before.mounts)
	more("network namespace", l.namespaces, before.namespaces)
	more("process in a container", l.processes, before.processes)
	return out.String()
}

// cgroupDirs lists directories named parent in every cgroup hierarchy.
func cgroupDirs(parent string) []string {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup" + parent, "/sys/fs/cgroup/*" + parent} {
		dirs, _ := filepath.Glob(pattern)
		out = append(out, dirs...)
	}
	return out
}

// lockedBuffer collects a process's output while tests read it.
type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
