//go:build linux

package orphans

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is also the first process of a namespace.
func TestMain(m *testing.M) {
	if os.Getenv("KILN_ORPHANS_TEST") == "first" {
		if err := first(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// eventually waits until done says so.
func eventually(what string, done func() (bool, error)) error {
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	ticks := time.NewTicker(5 * time.Millisecond)
	defer ticks.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-deadline.C:
			return fmt.Errorf("after a minute: %s is not so", what)
		case <-ticks.C:
		}
	}
}

func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	return ok && strings.HasPrefix(rest, "Z")
}

// What this process has started keeps its exit status, however long it isn't
// waited for; what it hasn't started is gone.
func TestReap(t *testing.T) {
	// Orphans become this process's, as if it were the first.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	own := exec.Command("sh", "-c", "sleep 0 & echo $!; exit 7") // the orphan is a zombie, or soon is
	pipe, err := own.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := own.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(pipe).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{own.Process.Pid, orphan} {
		if err := eventually("a child has ended", func() (bool, error) { return isZombie(pid), nil }); err != nil {
			t.Fatal(err)
		}
	}
	again, err := reap()
	if err != nil || !again {
		t.Errorf("again %v, error %v", again, err)
	}
	pids, err := children()
	if err != nil || slices.Contains(pids, orphan) || !slices.Contains(pids, own.Process.Pid) {
		t.Errorf("children %v, error %v: the orphan is %d, the own one %d", pids, err, orphan, own.Process.Pid)
	}
	if err := own.Wait(); own.ProcessState == nil || own.ProcessState.ExitCode() != 7 {
		t.Errorf("the own child's status: %v", err)
	}
	if again, err := reap(); err != nil || again {
		t.Errorf("nothing is left, but again %v, error %v", again, err)
	}
}

// The first process of a namespace, with children of its own all the time.
func TestFirstProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes a PID namespace")
	}
	cmd := exec.Command("sh", "-c", `mount -t proc proc /proc && exec "$0"`, "/proc/self/exe")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args[3] = exe
	cmd.Env = append(os.Environ(), "KILN_ORPHANS_TEST=first")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// first has 100 children, each of which leaves an orphan.
func first() error {
	ctx, cancel := context.WithCancel(context.Background())
	var reaper sync.WaitGroup
	reaper.Go(func() { Reap(ctx, slog.New(slog.NewTextHandler(os.Stdout, nil))) })
	defer reaper.Wait()
	defer cancel()
	var work sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		work.Go(func() {
			for n := range 25 {
				cmd := exec.Command("sh", "-c", fmt.Sprintf("sleep 0 & exit %d", n))
				cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
				if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != n {
					errs[i] = errors.Join(errs[i], fmt.Errorf("a child that ends with %d: %w", n, err))
				}
			}
		})
	}
	work.Wait()
	return errors.Join(append(errs, eventually("all orphans are gone", func() (bool, error) {
		pids, err := children()
		return len(pids) == 0, err
	}))...)
}
