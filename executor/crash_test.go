//go:build linux && (amd64 || arm64)

package executor

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the daemon that crashes, and a probe for containers.
func TestMain(m *testing.M) {
	switch os.Getenv("KILN_EXECUTOR_TEST") {
	case "daemon":
		crashingDaemon()
	case "probe":
		probeSyscalls()
	case "probe-all":
		probeAllSyscalls()
	case "probe-abis":
		if err := probeABIs(os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "probe-peek":
		peek()
	default:
		code := m.Run()
		if err := os.RemoveAll(built); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}
}

// crashingDaemon runs a step that prints "running" and doesn't end.
func crashingDaemon() {
	e, err := New(Config{Root: os.Getenv("ROOT"), Binary: os.Getenv("BINARY"), CgroupParent: "/kiln/test"})
	if err == nil {
		_, err = e.Run(context.Background(), Process{
			ID: "crash", Root: bindMount(os.Getenv("ROOTFS")), Args: []string{"sh", "-c", strings.ReplaceAll("setsid sleep N & echo running; sleep N; exit", "N", os.Getenv("MARKER"))},
			Env: []string{"PATH=/bin"}, CgroupParent: os.Getenv("PARENT"), Stdout: os.Stdout,
		})
	}
	fmt.Fprintln(os.Stderr, "the daemon ended:", err)
	os.Exit(1)
}

// A daemon that is killed takes the processes of its built-in runtime with it;
// its successor removes everything else.
func TestCrash(t *testing.T) {
	needRoot(t)
	for name, binary := range runtimes {
		for _, parent := range []string{"", "/kiln/test-crash"} {
			t.Run(name+parent, func(t *testing.T) {
				root, marker := t.TempDir(), fmt.Sprintf("%d0815", os.Getpid())
				cmd := exec.Command("/proc/self/exe")
				cmd.Env = append(os.Environ(), "KILN_EXECUTOR_TEST=daemon", "ROOT="+root, "BINARY="+binary, "ROOTFS="+busyboxRoot(t), "MARKER="+marker, "PARENT="+parent)
				cmd.Stderr = os.Stderr
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { cmd.Process.Kill() })
				if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "running\n" {
					t.Fatalf("%q %v", line, err)
				}
				steps := openProcesses(t, marker)
				if len(steps) == 0 {
					t.Fatal("the step's processes can't be found")
				}
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				cmd.Wait() //nolint:errcheck // killed
				if binary == "" {
					waitEnd(t, steps) // by the parent-death signal
				}
				e := newTest(t, Config{Root: root, Binary: binary})
				waitEnd(t, steps)
				if entries, err := os.ReadDir(filepath.Join(root, bundlesDir)); err == nil && len(entries) > 0 {
					t.Errorf("bundles are left: %v", entries)
				}
				for _, dir := range e.cgroups.Existing(cgroupSpec(Process{ID: "crash", CgroupParent: parent})).Dirs() {
					if _, err := os.Stat(dir); err == nil {
						t.Errorf("cgroup %s is left", dir)
					}
				}
				output(t, e, process(t, "exit 0"))
			})
		}
	}
}

// openProcesses returns pidfds of the processes with word in their arguments,
// except this one's children that only pass it on.
func openProcesses(t *testing.T, word string) (fds []int) {
	t.Helper()
	for _, pid := range processesWith(t, word) {
		args, err := os.ReadFile("/proc/" + pid + "/cmdline")
		if err != nil || !bytes.Contains(args, []byte("sleep")) {
			continue
		}
		var n int
		fmt.Sscan(pid, &n)
		if fd, err := unix.PidfdOpen(n, 0); err == nil {
			t.Cleanup(func() { unix.Close(fd) })
			fds = append(fds, fd)
		}
	}
	return fds
}

func waitEnd(t *testing.T, pidfds []int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for _, fd := range pidfds {
		for {
			polls := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(polls, int(time.Until(deadline).Milliseconds()))
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				t.Fatalf("a process of the step survives (%v)", err)
			}
			break
		}
	}
}

// Nothing is left of a bundle that is still mounted, and nothing of what is
// mounted there is removed.
func TestBundlesAreRemovedWithCare(t *testing.T) {
	needRoot(t)
	dir, precious := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(precious, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "id", "mount0")
	mkdir(t, target)
	if err := unix.Mount(precious, target, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := removeBundle(filepath.Join(dir, "id")); err == nil {
		t.Error("a mounted bundle was removed")
	}
	if err := removeBundles(dir); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v %v", entries, err)
	}
	if _, err := os.Stat(filepath.Join(precious, "file")); err != nil {
		t.Errorf("what was mounted is gone: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("still mounted (%v)", err)
	}
}
