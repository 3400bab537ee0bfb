//go:build e2e

package oci

// failing is what a program says of kilnrun that isn't well.
type failing struct {
	program, failure string // regular expression
	reason           string
	machine          bool // depends on the machine: on another it may pass
}

var known = []failing{
	// What the specification says otherwise by now, or never said.
	{program: "delete", failure: "`delete` a container that is not `stopped`", reason: "a created container can be deleted with all runtimes, and containerd and Podman do"},
	{program: "hooks", failure: "called in the listed order", reason: "the program expects other words than its own hooks write"},
	{program: "hooks_stdin", failure: `passed to "prestart" hook`, reason: "the status is creating: since 1.0.2 these hooks belong to create"},
	{program: "misc_props", failure: "unknown annotation key", reason: "the program forgets to copy what its container runs"},
	{program: "pidfile", failure: "--pid-file", reason: "the program kills a container that ended by itself, which no runtime can"},
	{program: "poststart_fail", failure: "MUST log a warning", reason: "since 1.3.0 such a hook ends the container, with an error"},
	{program: "prestart", failure: "after the `start` operation", reason: "since 1.0.2 these hooks belong to create"},
	{program: "process_capabilities_fail", failure: "cannot be mapped to a relevant kernel interface MUST cause an error", reason: "since 1.1.0 it is a warning"},
	{program: "process_rlimits", failure: "soft RLIMIT_NOFILE", reason: "Go raises the limit in the program that looks at it"},
	{program: "start", failure: "^exit status 1$", reason: "a container without a process to start can't be created, with no runtime"},

	// What is as it is on purpose.
	{program: "mounts", failure: `/mnt/etc-.* found in order`, reason: "mounts are attached in the listed order, but the machine's /proc lists them by when they were made, and binds are cloned before the container has namespaces"},
	{program: mountsOnMachine, failure: "cannot run validation tests: exit status 1", reason: "a container without a mount namespace would mount on the machine"},

	// What the machine lacks, and kilnrun says so.
	{program: "linux_cgroups_blkio", failure: "blkio.*no such (device|file)|no cgroup controller", reason: "no such disk, or no weights with its scheduler", machine: true},
	{program: "linux_cgroups_relative_blkio", failure: "^exit status 1$", reason: "as linux_cgroups_blkio", machine: true},
	{program: "linux_cgroups_hugetlb", failure: "no cgroup controller hugetlb", reason: "no such controller", machine: true},
	{program: "linux_cgroups_relative_hugetlb", failure: "^exit status 1$", reason: "no such controller", machine: true},
	{program: "linux_cgroups_network", failure: "no cgroup controller net_", reason: "no such controller", machine: true},
	{program: "linux_cgroups_relative_network", failure: "^exit status 1$", reason: "no such controller", machine: true},
	{program: "linux_cgroups_memory", failure: "memory kernel is set correctly", reason: "no such limit since Linux 6.3", machine: true},
	{program: "linux_cgroups_relative_memory", failure: "memory kernel is set correctly", reason: "no such limit since Linux 6.3", machine: true},
	{program: "linux_mount_label", failure: "SELinux is not enabled", reason: "no SELinux", machine: true},
	{program: "linux_process_apparmor_profile", failure: "AppArmor", reason: "no AppArmor, or the profile isn't loaded", machine: true},
	{program: "process_capabilities", failure: "^expected .* capability CAP_", reason: "the machine's root has less than all", machine: true},
}

// racy are programs that ask for something before it can be: where one fails, it
// is run again, alone, a few times.
var racy = map[string]string{
	"killsig": "it sends signals when the container runs, which may be before its shell has set its traps",
}

// silent are programs that print nothing where all is well.
var silent = []string{"poststart", "poststop", "poststop_fail", "prestart_fail", "process_rlimits_fail"}
