package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// wanted are the version 2 controllers that groups use.
var wanted = []string{"cpu", "memory", "pids", "io", "cpuset"}

// enableControllers passes the wanted controllers that dir has on to its
// children. Only the real root may do so while processes are in it; at the top
// of a container's cgroup namespace, those move to a child "init".
func enableControllers(dir string, top bool) error {
	has, err := readFields(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	on, err := readFields(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return err
	}
	for _, c := range wanted {
		if !slices.Contains(has, c) || slices.Contains(on, c) {
			continue
		}
		err := write(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
		if errors.Is(err, unix.EBUSY) && top {
			if err := moveToInit(dir); err != nil {
				return err
			}
			err = write(filepath.Join(dir, "cgroup.subtree_control"), "+"+c)
		}
		if err != nil {
			return fmt.Errorf("enable cgroup controller %s: %w", c, err)
		}
	}
	return nil
}

func moveToInit(dir string) error {
	child := filepath.Join(dir, leaf)
	if err := os.Mkdir(child, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make cgroup for processes in the way of controllers: %w", err)
	}
	pids, err := readFields(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := write(filepath.Join(child, "cgroup.procs"), pid); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %s out of the way of cgroup controllers: %w", pid, err)
		}
	}
	return nil
}

func readFields(path string) ([]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	return strings.Fields(string(b)), nil
}
