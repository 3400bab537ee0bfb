package executor

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// signalTree sends sig to a container's first process and all below it, where
// they are in no cgroup of their own: in a PID namespace, whoever loses its
// parent becomes the first one's child. One that has ended meanwhile is fine; a
// process that is just being made may be missed.
func signalTree(first int, sig unix.Signal) error {
	var errs []error
	for todo := []int{first}; len(todo) > 0; {
		pid := todo[0]
		todo = append(todo[1:], children(pid)...)
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("signal process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// children are those of all threads of pid.
func children(pid int) (list []int) {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil // it has ended
	}
	for _, t := range threads {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		if err != nil {
			continue // likewise
		}
		for field := range strings.FieldsSeq(string(data)) {
			if child, err := strconv.Atoi(field); err == nil {
				list = append(list, child)
			}
		}
	}
	return list
}
