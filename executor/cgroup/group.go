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
	"time"

	"golang.org/x/sys/unix"
)

// Limits are what a group may use; zero values are no limit.
type Limits struct {
	Memory, MemorySwap   int64 // MemorySwap is memory plus swap; -1 is unlimited
	CPUShares, CPUPeriod uint64
	CPUQuota             int64
	CpusetCpus           string
	CpusetMems           string
	Pids                 int64 // processes and threads
}

// Usage is what the processes of a group used.
type Usage struct {
	CPU        time.Duration // 0 for version 1 groups that don't join cpuacct
	MemoryPeak int64         // 0 if the kernel doesn't count it
	PidsPeak   int64         // 0 if the kernel doesn't count it
	// PidsRefused is how often a process or thread was not started because of the
	// limit.
	PidsRefused int64
	OOMKills    int64
	OOMLimit    int64 // if there were some: the lowest limit of memory in force, 0 for none
}

// A Group is a place for one process and its children.
type Group struct {
	m    *Manager
	path string // below the mount points; "" of groups that are taken
	dirs []dir
	pids int64 // limit
}

// dir is the group's directory in one hierarchy.
type dir struct {
	path string
	h    *Hierarchy // nil on version 2
	join int        // v1: its tasks file, open. v2: the directory. -1 in an existing group
	view int        // v1: a detached mount of it, for the container; or -1
	// shared directories have other users and stay
	shared bool
}

// has says whether a limit of controller can be set in d.
func (d dir) has(controller string) bool {
	if d.shared {
		return false
	}
	if d.h == nil {
		return true
	}
	return slices.Contains(d.h.Controllers, controller)
}

// JoinFDs returns open files for a process that is to join the group: it writes
// "0" to each. They are valid until Release.
func (g *Group) JoinFDs() []int {
	var fds []int
	for _, d := range g.dirs {
		if d.h != nil {
			fds = append(fds, d.join)
		}
	}
	return fds
}

// CloneFD returns the open directory that a process can be born in, or -1 if
// it has to join.
func (g *Group) CloneFD() int {
	if len(g.dirs) == 1 && g.dirs[0].h == nil {
		return g.dirs[0].join
	}
	return -1
}

// Join puts a process into the group. All its threads go with it on version 2
// only: on version 1 it must have just one.
func (g *Group) Join(pid int) error {
	text := []byte(strconv.Itoa(pid))
	for _, d := range g.dirs {
		if err := d.write(text); err != nil {
			return fmt.Errorf("put process %d into cgroup %s: %w", pid, d.path, err)
		}
	}
	return nil
}

func (d dir) write(pid []byte) error {
	fd := d.join
	if d.h == nil {
		var err error
		if fd, err = unix.Openat(d.join, "cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	_, err := unix.Write(fd, pid)
	return err
}

// Mount is a hierarchy as a container sees it below /sys/fs/cgroup.
type Mount struct {
	Name string
	FD   int // detached; valid until Release
}

// Mounts returns the group's directories by the name of their hierarchy; none
// on version 2, where a cgroup namespace shows it.
func (g *Group) Mounts() []Mount {
	var list []Mount
	for _, d := range g.dirs {
		if d.view >= 0 {
			list = append(list, Mount{d.h.Name, d.view})
		}
	}
	return list
}

// Path is the path of an Existing group as a runtime wants it.
func (g *Group) Path() string { return g.path }

// Dirs lists the directories of g, except those it shares.
func (g *Group) Dirs() []string {
	var list []string
	for _, d := range g.dirs {
		if !d.shared {
			list = append(list, d.path)
		}
	}
	return list
}

// Remove kills and removes a group that has a path, wherever it is there.
func (g *Group) Remove() error {
	var errs []error
	for _, dir := range g.m.roots(g.path) {
		errs = append(errs, RemoveTree(dir))
	}
	return errors.Join(errs...)
}

// limit writes l's values. The order matters: memory before memory and swap.
func (g *Group) limit(l Limits) error {
	if l.MemorySwap > 0 && l.MemorySwap < l.Memory {
		return fmt.Errorf("the limit of memory and swap together, %d bytes, is below that of memory, %d bytes", l.MemorySwap, l.Memory)
	}
	g.pids = l.Pids
	var sets []setting
	for _, d := range g.dirs {
		if d.h == nil {
			sets = append(sets, l.v2(d.path)...)
			continue
		}
		sets = append(sets, l.v1(d)...)
	}
	for _, s := range sets {
		if err := s.write(); err != nil {
			return err
		}
	}
	return nil
}

// setting is a value for a control file.
type setting struct{ dir, file, value string }

func (s setting) write() error {
	err := write(filepath.Join(s.dir, s.file), s.value)
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist) && s.dispensable():
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("set limit %s to %s: %s: %w", s.file, s.value, s.missing(), err)
	}
	return fmt.Errorf("set limit %s to %s: %w", s.file, s.value, err)
}

// hasMemory says whether the group has limits of memory.
func (s setting) hasMemory() bool {
	_, err := os.Stat(filepath.Join(s.dir, "memory.stat"))
	return err == nil
}

// dispensable: a kernel that doesn't count swap can't give any, nor limit it.
func (s setting) dispensable() bool {
	return s.file == "memory.swap.max" && (s.value == "0" || s.value == "max") && s.hasMemory()
}

// missing says why there is no such file.
func (s setting) missing() string {
	controller, _, _ := strings.Cut(s.file, ".")
	if controller == "memory" && s.hasMemory() {
		return "this kernel doesn't count swap; swapaccount=1 on its command line may turn that on"
	}
	if s.lackedByAll() {
		return fmt.Sprintf("cgroup version 2 has no controller %s on this machine: its kernel has none, or cgroup_disable on its command line turns it off, or version 1 has it", controller)
	}
	return fmt.Sprintf("the cgroup has no controller %s; whoever gave it to this daemon has to pass that on", controller)
}

// lackedByAll says whether there is no such file although the machine's own root passes
// on what it has. That one can be seen outside of cgroup namespaces only, and alone
// has no type.
func (s setting) lackedByAll() bool {
	controller, _, _ := strings.Cut(s.file, ".")
	top := s.dir
	for isGroup(filepath.Dir(top)) {
		top = filepath.Dir(top)
	}
	has, err := readFields(filepath.Join(top, "cgroup.controllers"))
	_, typed := os.Stat(filepath.Join(top, "cgroup.type"))
	return err == nil && errors.Is(typed, fs.ErrNotExist) && !slices.Contains(has, controller)
}

// isGroup says whether dir is a group of version 2.
func isGroup(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.controllers"))
	return err == nil
}

func (l Limits) v1(d dir) (sets []setting) {
	add := func(file, value string) { sets = append(sets, setting{d.path, file, value}) }
	if d.has("memory") && l.Memory != 0 {
		add("memory.limit_in_bytes", strconv.FormatInt(l.Memory, 10))
	}
	if d.has("memory") && l.MemorySwap != 0 {
		add("memory.memsw.limit_in_bytes", strconv.FormatInt(l.MemorySwap, 10))
	}
	if d.has("cpu") && l.CPUShares != 0 {
		add("cpu.shares", strconv.FormatUint(l.CPUShares, 10))
	}
	if d.has("cpu") && l.CPUPeriod != 0 {
		add("cpu.cfs_period_us", strconv.FormatUint(l.CPUPeriod, 10))
	}
	if d.has("cpu") && l.CPUQuota != 0 {
		add("cpu.cfs_quota_us", strconv.FormatInt(l.CPUQuota, 10))
	}
	if d.has("cpuset") && l.CpusetCpus != "" {
		add("cpuset.cpus", l.CpusetCpus)
	}
	if d.has("cpuset") && l.CpusetMems != "" {
		add("cpuset.mems", l.CpusetMems)
	}
	if d.has("pids") && l.Pids != 0 {
		add("pids.max", strconv.FormatInt(l.Pids, 10))
	}
	return sets
}

func (l Limits) v2(path string) (sets []setting) {
	add := func(file, value string) { sets = append(sets, setting{path, file, value}) }
	bytes := func(n int64) string {
		if n < 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	if l.Memory != 0 {
		add("memory.max", bytes(l.Memory))
	}
	if l.MemorySwap != 0 {
		swap := l.MemorySwap
		if swap > 0 {
			swap = max(0, swap-max(0, l.Memory)) // version 2 counts swap alone
		}
		add("memory.swap.max", bytes(swap))
	}
	if l.CPUShares != 0 {
		shares := min(max(l.CPUShares, 2), 262144)
		add("cpu.weight", strconv.FormatUint(1+(shares-2)*9999/262142, 10))
	}
	if l.CPUQuota != 0 || l.CPUPeriod != 0 {
		quota := "max"
		if l.CPUQuota > 0 {
			quota = strconv.FormatInt(l.CPUQuota, 10)
		}
		period := l.CPUPeriod
		if period == 0 {
			period = 100_000
		}
		add("cpu.max", fmt.Sprintf("%s %d", quota, period))
	}
	if l.CpusetCpus != "" {
		add("cpuset.cpus", l.CpusetCpus)
	}
	if l.CpusetMems != "" {
		add("cpuset.mems", l.CpusetMems)
	}
	if l.Pids != 0 {
		add("pids.max", strconv.FormatInt(l.Pids, 10))
	}
	return sets
}

// Usage reads the counters. What the kernel doesn't count is 0.
func (g *Group) Usage() (Usage, error) {
	var u Usage
	var errs []error
	read := func(d dir, file, key string, into *int64) {
		v, err := readCounter(filepath.Join(d.path, file), key)
		if err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("read usage: %w", err))
		}
		*into = max(*into, v)
	}
	for _, d := range g.dirs {
		if d.h == nil {
			var usec int64
			read(d, "cpu.stat", "usage_usec", &usec)
			u.CPU = time.Duration(usec) * time.Microsecond
			read(d, "memory.peak", "", &u.MemoryPeak)
			read(d, "memory.events", "oom_kill", &u.OOMKills)
		}
		if d.has("memory") && d.h != nil {
			read(d, "memory.max_usage_in_bytes", "", &u.MemoryPeak)
			read(d, "memory.oom_control", "oom_kill", &u.OOMKills)
		}
		if d.has("cpuacct") && d.h != nil {
			var ns int64
			read(d, "cpuacct.usage", "", &ns)
			u.CPU = time.Duration(ns)
		}
		if d.has("pids") {
			read(d, "pids.peak", "", &u.PidsPeak)
			if g.pids != 0 {
				read(d, "pids.events", "max", &u.PidsRefused)
			}
		}
	}
	if u.OOMKills > 0 {
		u.OOMLimit = g.memoryLimit()
	}
	return u, errors.Join(errs...)
}

// memoryLimit is the lowest limit of the group and those above it, 0 for none.
func (g *Group) memoryLimit() (lowest int64) {
	for _, d := range g.dirs {
		file, top := "memory.max", g.m.tree.V2
		if d.h != nil {
			file, top = "memory.limit_in_bytes", d.h.Dir
		}
		if !d.has("memory") {
			continue
		}
		for dir := d.path; len(dir) > len(top); dir = filepath.Dir(dir) {
			text, err := readSmall(filepath.Join(dir, file))
			if err != nil {
				continue
			}
			// "max" is no number; version 1 has a huge one for that.
			n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			if err == nil && n < 1<<60 && (lowest == 0 || n < lowest) {
				lowest = n
			}
		}
	}
	return lowest
}

// readCounter reads a file that is a number or lines of keys and numbers. A
// missing file is os.ErrNotExist.
func readCounter(path, key string) (int64, error) {
	b, err := readSmall(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(b) {
		value := strings.TrimSpace(line)
		if key != "" {
			name, v, _ := strings.Cut(value, " ")
			if name != key {
				continue
			}
			value = v
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		return n, nil
	}
	return 0, nil
}

// readSmall reads a control file in one read, without the poller that os
// files have: it is on the way of every step.
func readSmall(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var buf [4096]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return "", &os.PathError{Op: "read", Path: path, Err: err}
	}
	return string(buf[:n]), nil
}

// Release hands the group back; it is killed and removed in the background. It
// must be called once.
func (g *Group) Release() { g.m.remove(g) }

// Signal sends sig to the processes that are in the group now. One that has
// ended meanwhile is fine.
func (g *Group) Signal(sig unix.Signal) error {
	for _, d := range g.dirs {
		if !d.shared {
			return signalAll(d.path, sig) // every directory has the same processes
		}
	}
	return nil
}

func signalAll(dir string, sig unix.Signal) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list processes of cgroup: %w", err)
	}
	var errs []error
	for pid := range strings.FieldsSeq(string(b)) {
		n, err := strconv.Atoi(pid)
		if err != nil || n <= 1 || n == os.Getpid() {
			return fmt.Errorf("signal cgroup %s: process %q in it is not ours", dir, pid)
		}
		if err := unix.Kill(n, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("signal process %d: %w", n, err))
		}
	}
	return errors.Join(errs...)
}

// Kill kills all processes in the group and waits for their end.
func (g *Group) Kill() error {
	var errs []error
	for _, d := range g.dirs {
		if !d.shared {
			errs = append(errs, killAll(d.path))
		}
	}
	return errors.Join(errs...)
}

// destroy kills what is left and removes the directories.
func (g *Group) destroy() error {
	var errs []error
	for _, d := range g.dirs {
		if d.shared {
			continue
		}
		for _, fd := range []int{d.join, d.view} {
			if fd >= 0 {
				errs = append(errs, unix.Close(fd))
			}
		}
		errs = append(errs, RemoveTree(d.path))
	}
	return errors.Join(errs...)
}

// killTimeout is how long killed processes may take to end.
const killTimeout = 10 * time.Second

// killAll kills all processes in dir, including those that they start while
// being killed.
func killAll(dir string) error {
	deadline := time.Now().Add(killTimeout)
	for {
		if err := write(filepath.Join(dir, "cgroup.kill"), "1"); err != nil && !gone(err) && !ofThreads(err) {
			return fmt.Errorf("kill cgroup: %w", err)
		}
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if gone(err) || ofThreads(err) || err == nil && len(b) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list processes of cgroup: %w", err)
		}
		if err := killPids(strings.Fields(string(b)), deadline); err != nil {
			return fmt.Errorf("kill cgroup %s: %w", dir, err)
		}
	}
}

// gone reports whether err says that a file's group was removed, be it while the
// file was open: a runtime that outlived its daemon may still clean up.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

// ofThreads reports whether err says that a group has threads alone. Their
// processes are in a group around it, where they are listed and killed.
func ofThreads(err error) bool { return errors.Is(err, unix.EOPNOTSUPP) }

// killPids kills processes and waits for their end.
func killPids(pids []string, deadline time.Time) error {
	var polls []unix.PollFd
	defer func() {
		for _, p := range polls {
			unix.Close(int(p.Fd))
		}
	}()
	for _, pid := range pids {
		n, err := strconv.Atoi(pid)
		if err != nil || n <= 1 || n == os.Getpid() {
			return fmt.Errorf("process %q in it is not ours to kill", pid)
		}
		fd, err := unix.PidfdOpen(n, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open process %d: %w", n, err)
		}
		polls = append(polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d: %w", n, err)
		}
	}
	return waitAll(slices.Clone(polls), deadline)
}

// waitAll waits until all polled processes have ended.
func waitAll(polls []unix.PollFd, deadline time.Time) error {
	for len(polls) > 0 {
		left := time.Until(deadline).Milliseconds()
		if left <= 0 {
			return fmt.Errorf("%d processes have not ended %s after being killed", len(polls), killTimeout)
		}
		if _, err := unix.Poll(polls[:1], int(left)); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for killed processes: %w", err)
		}
		if polls[0].Revents != 0 {
			polls = polls[1:]
		}
	}
	return nil
}

// RemoveTree removes a group's directory, if it is there, with the processes in
// it and the groups that they made below.
func RemoveTree(path string) error {
	var err error
	for range 3 {
		err = unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err := removeInside(path); err != nil {
			return err
		}
	}
	return fmt.Errorf("remove cgroup %s: %w", path, err)
}

// removeInside kills what is in the way of removing a group.
func removeInside(path string) error {
	if err := killAll(path); err != nil {
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil && !gone(err) {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := RemoveTree(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// write writes a control file in one write; it never creates one.
func write(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
