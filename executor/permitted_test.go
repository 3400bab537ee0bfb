package executor

import (
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLowerUlimits(t *testing.T) {
	own := func(name string) (uint64, bool) {
		return map[string]uint64{"nofile": 4096, "core": unix.RLIM_INFINITY}[name], name != "odd"
	}
	got, changed := lowerUlimits([]Ulimit{{"nofile", 1024, 4096}, {"nofile", 8192, 10000}, {"nofile", -1, -1}, {"nofile", 1024, 8192}, {"core", -1, -1}, {"odd", 5, 6}}, own)
	want := []Ulimit{{"nofile", 1024, 4096}, {"nofile", 4096, 4096}, {"nofile", 4096, 4096}, {"nofile", 1024, 4096}, {"core", -1, -1}, {"odd", 5, 6}}
	if !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	if want := []string{"nofile is 4096, not 10000", "nofile is 4096, not -1", "nofile is 4096, not 8192"}; !slices.Equal(changed, want) {
		t.Errorf("%q", changed)
	}
	if most, ok := hardLimit("nofile"); !ok || most == 0 {
		t.Error("own limit of open files is unknown")
	}
	if _, ok := hardLimit("nonsense"); ok {
		t.Error("a limit that doesn't exist is known")
	}
}

// All processes below the first one get the signal, whoever of them started
// them.
func TestSignalTree(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sh -c 'sleep 1000 & echo; wait' & wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // all are there
		t.Fatal(err)
	}
	first := cmd.Process.Pid
	tree := []int{first}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children(tree[i])...)
	}
	if len(tree) != 3 {
		t.Errorf("the tree is %v", tree)
	}
	if err := signalTree(first, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	// The pipe ends when the last one that has it does.
	if n, err := out.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d, %v", n, err)
	}
	cmd.Wait() //nolint:errcheck // killed
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL {
		t.Errorf("the first process ended with %v", cmd.ProcessState)
	}
}
