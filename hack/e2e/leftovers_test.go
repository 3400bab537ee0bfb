//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Whose a leftover is must be told apart, for several test runs and daemons of
// other people share a machine. Mounts are a daemon's if they mention one of its
// directories: its state, or the one of its socket and temporary files.
// Processes are its if they descend from it. A network namespace lives by a
// mount, or by a process in it or with it open, so these two find it as well.

// leftovers is what a daemon could leave behind, as found at one moment.
type leftovers struct {
	mounts    []string
	processes map[int]process
}

// process is one that runs, zombies apart.
type process struct {
	parent  int
	command string
}

// adoptOrphans makes this process the parent of every process below it whose
// own parent ends. So what a daemon leaves behind stays below this process,
// whatever it did to detach, and nobody else's processes ever are.
func adoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of orphans: %w", err)
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	go func() {
		for range died { // until this process ends
			reapOrphans()
		}
	}()
	return nil
}

// reapOrphans does what a machine's init does for processes that crun starts in
// a container's PID namespace and leaves to it: the container's end waits for
// them to be reaped. Nothing that the tests start is called so.
func reapOrphans() {
	stats, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		panic(err) // of the pattern alone
	}
	for _, path := range stats {
		name, err := os.ReadFile(path)
		if err != nil || string(name) != "crun\n" { // it has ended meanwhile
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			panic(err)
		}
		if state, parent := status(pid); state == 'Z' && parent == os.Getpid() {
			unix.Wait4(pid, nil, unix.WNOHANG, nil) //nolint:errcheck // it is seen again
		}
	}
}

// survey lists the mounts that mention one of dirs, and the processes below
// this one.
func survey(t *testing.T, dirs ...string) leftovers {
	t.Helper()
	l := leftovers{processes: map[int]process{}}
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if slices.ContainsFunc(dirs, func(dir string) bool { return mentions(line, dir) }) {
			l.mounts = append(l.mounts, strings.TrimSpace(line))
		}
	}
	all := processes(t)
	for pid, p := range all {
		if descends(all, pid, os.Getpid()) {
			l.processes[pid] = p
		}
	}
	return l
}

// mentions reports whether the line has the path dir or one below it.
func mentions(line, dir string) bool {
	for rest := line; ; {
		_, after, ok := strings.Cut(rest, dir)
		if !ok {
			return false
		}
		if after == "" || strings.ContainsAny(after[:1], "/ ,:\n") {
			return true
		}
		rest = after
	}
}

// processes lists those of the machine.
func processes(t *testing.T) map[int]process {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	out := map[int]process{}
	for _, path := range stats {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		state, parent := status(pid)
		if state == 'Z' || state == 'X' {
			continue
		}
		cmd, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline")) // it may have ended since
		out[pid] = process{parent: parent, command: strings.TrimSpace(strings.ReplaceAll(string(cmd), "\x00", " "))}
	}
	return out
}

// status is the state and the parent of a process. One that has ended and that
// nobody has waited for is in state Z; one that is gone, in X.
func status(pid int) (state byte, parent int) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 'X', 0
	}
	// The name before it may hold anything, parentheses too.
	rest := string(stat[strings.LastIndex(string(stat), ") ")+2:])
	if _, err := fmt.Sscanf(rest, "%c %d", &state, &parent); err != nil {
		return 'X', 0
	}
	return state, parent
}

// isOver reports whether the child pid has ended and only waits to be waited for. Its
// state doesn't tell: while a process of several threads executes a program, it may
// look like one that has.
func isOver(pid int) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil && info.Signo != 0
}

// descends reports whether pid is below ancestor.
func descends(all map[int]process, pid, ancestor int) bool {
	for range all { // bounds the walk, should the table be torn
		p, ok := all[pid]
		if !ok {
			return false
		}
		if p.parent == ancestor {
			return true
		}
		pid = p.parent
	}
	return false
}

// without drops the processes that ought to run, such as a daemon that was
// started again.
func (l leftovers) without(pids ...int) leftovers {
	for _, pid := range pids {
		delete(l.processes, pid)
	}
	return l
}

// withoutMounts drops the mounts at exactly these paths, which a daemon with
// another runtime has for as long as it runs.
func (l leftovers) withoutMounts(points ...string) leftovers {
	l.mounts = slices.DeleteFunc(l.mounts, func(line string) bool {
		fields := strings.Fields(line)
		return len(fields) > 4 && slices.Contains(points, fields[4])
	})
	return l
}

// since describes what is there now and was not before.
func (l leftovers) since(before leftovers) string {
	var out strings.Builder
	for _, m := range l.mounts {
		if !slices.Contains(before.mounts, m) {
			fmt.Fprintf(&out, "mount: %s\n", m)
		}
	}
	for pid, p := range l.processes {
		if _, ok := before.processes[pid]; !ok {
			fmt.Fprintf(&out, "process %d below %d: %s\n", pid, p.parent, p.command)
		}
	}
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

// A look that finds nothing may be blind: it finds a mount and a detached
// process when there are some.
func TestLeftoversAreFound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	before := survey(t, dir)
	if err := unix.Mount("kiln", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	// The shell ends at once; what it started belongs to nobody.
	out, err := exec.Command("setsid", "sh", "-c", "sleep 7654 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Kill(pid, unix.SIGKILL) })
	left := survey(t, dir)
	if got := left.since(before); !strings.Contains(got, "mount: ") || !strings.Contains(got, fmt.Sprintf("process %d below %d: sleep 7654", pid, os.Getpid())) {
		t.Errorf("found only:\n%s", got)
	}
	if other := survey(t, dir+"2", filepath.Join(dir, "below")); len(other.mounts) != 0 {
		t.Errorf("somebody else's mount was taken for one of the daemon's: %s", other.mounts)
	}
	if got := left.without(pid).since(before); strings.Contains(got, "process") {
		t.Errorf("a process that ought to run was found:\n%s", got)
	}
}
