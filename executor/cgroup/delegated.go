package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// leaf is the group to which the processes of a delegated one move, so that its
// controllers can be passed on.
const leaf = "init"

// Delegated is the tree that a process without the machine's privileges has:
// below its own version 2 group, if that was delegated to its user. Otherwise
// it is a tree without hierarchies: processes are then in no groups of their
// own, without limits and counts.
//
// A group that others are in as well, such as that of a desktop's terminal, is
// left as it is: they would have to be moved.
func Delegated() (*Tree, error) {
	none := &Tree{Unprivileged: true}
	machine, err := Detect()
	if err != nil || machine.V2 == "" {
		return none, nil // a version 1 hierarchy is never safe to delegate
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find own cgroup: %w", err)
	}
	dir, err := delegatedDir(machine.V2, string(data), os.Getpid())
	if err != nil || dir == "" {
		return none, err
	}
	return &Tree{V2: dir, Unprivileged: true}, nil
}

// delegatedDir is the directory of the group that a process was given, by what it
// reads in /proc/self/cgroup; "" if there is none.
func delegatedDir(mount, own string, pid int) (string, error) {
	for line := range strings.Lines(own) {
		path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		dir := filepath.Join(mount, path)
		if filepath.Base(dir) == leaf && writable(filepath.Dir(dir)) {
			return filepath.Dir(dir), nil // a daemon has moved here
		}
		if !writable(dir) {
			return "", nil
		}
		pids, err := readFields(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		if err != nil || !slices.Equal(pids, []string{strconv.Itoa(pid)}) {
			return "", err
		}
		return dir, nil
	}
	return "", nil
}

func writable(dir string) bool {
	for _, name := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if unix.Access(filepath.Join(dir, name), unix.W_OK) != nil {
			return false
		}
	}
	return true
}
