//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/nofile"
	"golang.org/x/sys/unix"
)

func asErrno(err error, errno *unix.Errno) bool { return errors.As(err, errno) }

// files lists what is open, but for what Go has opened.
func (r *report) files() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		r.add("fd", "%s", reason(err))
		return
	}
	for _, e := range entries {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(to, "anon_inode:") {
			continue
		}
		kind, _, _ := strings.Cut(to, ":[")
		r.add("fd", "%s -> %s", e.Name(), kind)
	}
}

var statusFields = []string{
	"Umask", "Uid", "Gid", "Groups", "NStgid", "NSpid", "NSpgid", "NSsid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
	"Cpus_allowed_list", "Mems_allowed_list", "SigBlk", "THP_enabled",
}

func (r *report) process() {
	for line := range strings.Lines(text("/proc/self/status")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		value = strings.TrimSpace(value)
		if strings.HasPrefix(name, "NS") && value == fmt.Sprint(os.Getpid()) && os.Getpid() != 1 {
			value = "its own"
		}
		if slices.Contains(statusFields, name) {
			r.add("status", "%s = %s", name, value)
		}
	}
	for line := range strings.Lines(text("/proc/self/limits")) {
		if !strings.HasPrefix(line, "Max open files") { // Go changes it
			r.add("limit", "%s", strings.Join(strings.Fields(line), " "))
		}
	}
	r.add("limit", "files %d %d", nofile.Limit.Cur, nofile.Limit.Max)
	for _, kv := range os.Environ() {
		r.add("env", "%s", kv)
	}
	cwd, err := os.Getwd()
	r.result("process", "cwd", cwd, err)
	exe, err := os.Readlink("/proc/self/exe")
	r.result("process", "exe", exe, err)
	r.add("process", "args %q", os.Args)
	for _, name := range []string{"oom_score_adj", "personality", "timens_offsets", "coredump_filter", "loginuid", "attr/current"} {
		value := strings.TrimSpace(text("/proc/self/" + name))
		r.add("process", "%s = %s", name, strings.Join(strings.Fields(value), " "))
	}
	for name, option := range map[string]int{"death signal": unix.PR_GET_PDEATHSIG, "dumpable": unix.PR_GET_DUMPABLE, "securebits": unix.PR_GET_SECUREBITS, "subreaper": unix.PR_GET_CHILD_SUBREAPER} {
		var word int32
		n, err := unix.PrctlRetInt(option, uintptr(unsafe.Pointer(&word)), 0, 0, 0)
		r.result("process", name, int32(n)|word, err)
	}
	r.schedule()
	r.session()
}

func (r *report) schedule() {
	attr, err := unix.SchedGetAttr(0, 0)
	if err == nil {
		r.add("schedule", "policy %d flags %#x nice %d priority %d", attr.Policy, attr.Flags, attr.Nice, attr.Priority)
	} else {
		r.add("schedule", "%s", reason(err))
	}
	const process = 1
	n, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, process, 0, 0)
	r.add("schedule", "io class %d level %d errno %d", n>>13, n&0x1fff, errno)
}

// session is the terminal and the keyring.
func (r *report) session() {
	if size, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ); err == nil {
		name, err := os.Readlink("/proc/self/fd/0")
		r.result("terminal", "name", fmt.Sprint(name, " ", size.Row, "x", size.Col), err)
	}
	_, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	r.result("terminal", "controlling", "yes", err)
	id, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
	if err == nil {
		buf := make([]byte, 256)
		var n int
		n, err = unix.KeyctlBuffer(unix.KEYCTL_DESCRIBE, id, buf, 0)
		r.result("keyring", "session", strings.TrimRight(string(buf[:max(n, 0)]), "\x00"), err)
	} else {
		r.result("keyring", "session", "", err)
	}
}

// names is what namespaces are about.
func (r *report) names() {
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		r.add("name", "host %s domain %s machine %s", unix.ByteSliceToString(u.Nodename[:]), unix.ByteSliceToString(u.Domainname[:]), unix.ByteSliceToString(u.Machine[:]))
	}
	links, err := filepath.Glob("/proc/self/ns/*")
	if err != nil || len(links) == 0 {
		r.add("namespace", "none: %v", err)
	}
	for _, l := range links {
		to, err := os.Readlink(l)
		r.result("namespace", filepath.Base(l), to, err)
	}
	for _, file := range []string{"uid_map", "gid_map", "setgroups"} {
		for line := range strings.Lines(text("/proc/self/" + file)) {
			r.add("map", "%s %s", file, strings.Join(strings.Fields(line), " "))
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		r.add("net", "%s", reason(err))
	}
	for _, i := range interfaces {
		r.add("net", "%s %s", i.Name, i.Flags)
	}
}

// mounts lists them in their order, without numbers that are the kernel's own.
func (r *report) mounts() {
	for line := range strings.Lines(text("/proc/self/mountinfo")) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		f := strings.Fields(before)
		var propagation []string
		for _, o := range f[6:] {
			kind, _, _ := strings.Cut(o, ":")
			propagation = append(propagation, kind)
		}
		// Which file system: its type and options, its source is a name.
		r.add("mount", "%s on %s %s %v - %s", f[3], f[4], f[5], propagation, after)
	}
}

// control is what the cgroup file systems say of the own groups.
func (r *report) control() {
	for line := range strings.Lines(text("/proc/self/cgroup")) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		r.add("cgroup", "%s", rest)
	}
	for _, file := range []string{
		"memory/memory.limit_in_bytes", "memory/memory.memsw.limit_in_bytes", "memory/memory.soft_limit_in_bytes", "memory/memory.swappiness", "memory/memory.oom_control",
		"cpu/cpu.shares", "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us", "cpu/cpu.rt_runtime_us", "cpu/cpu.idle", "cpu/cpu.cfs_burst_us",
		"cpuset/cpuset.cpus", "cpuset/cpuset.mems", "pids/pids.max", "devices/devices.list", "blkio/blkio.bfq.weight", "blkio/blkio.throttle.read_bps_device", "blkio/blkio.throttle.write_iops_device",
		"memory.max", "memory.swap.max", "memory.low", "memory.high", "cpu.weight", "cpu.max", "cpu.idle", "cpu.max.burst", "cpuset.cpus", "cpuset.mems", "pids.max", "io.max", "io.weight",
	} {
		b, err := os.ReadFile("/sys/fs/cgroup/" + file)
		if err != nil {
			continue // which there are is told by the mounts
		}
		for line := range strings.Lines(string(b)) {
			r.add("control", "%s = %s", file, strings.TrimSpace(line))
		}
	}
}

func text(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return file + ": " + reason(err)
	}
	return string(b)
}
