// Package sandboxtest is a list of attacks by steps on the machine, each a script
// for a shell with busybox. They are tried on the executor itself, and on daemons.
package sandboxtest

import "strings"

// Case is an attack by a step. It prints "got" for each thing it gets at.
// Without the sandbox, in an insecure step or with what it wants mounted, it
// must succeed: otherwise it shows nothing.
//
// Its environment has the path of a file of the machine as SECRET, and what the
// command line of a process of the daemon's has in it as DAEMON. The daemon's has
// a variable whose name begins with KILN_DAEMON.
type Case struct {
	Item   string // what it is about
	Attack string
	// Escapes is how often it says "got" at least in an insecure step; 0 if that
	// can't do it either, or not on every machine.
	Escapes int
	// NoNetwork is for those that need a network namespace of their own.
	NoNetwork bool
	// Spoils is for those after which the container's /dev isn't one.
	Spoils bool
}

// tries opens files for writing, without writing to them.
func tries(files ...string) string {
	return "for f in " + strings.Join(files, " ") + "; do (: >> $f) 2>/dev/null && echo got; done"
}

// Cases are attacks on each part of the sandbox.
var Cases = []Case{
	// Capabilities: each of those that Docker withholds, by what it allows.
	{Item: "CAP_SYS_ADMIN: name the machine", Attack: "hostname attacked && echo got", Escapes: 1},
	{Item: "CAP_SYS_RESOURCE: spare from the out-of-memory killer", Attack: "echo -1000 > /proc/self/oom_score_adj && echo got"},
	{Item: "CAP_SYS_RESOURCE: raise limits", Attack: "ulimit -Hn 1000 && ulimit -Hn 2000 && echo got"},
	{Item: "CAP_SYS_NICE: more than a fair share", Attack: "busybox renice -n -5 $$ && echo got", Escapes: 1},
	{Item: "CAP_SYSLOG: the kernel's log", Attack: "busybox dmesg | grep -q . && echo got; head -c 1 /dev/kmsg >/dev/null && echo got", Escapes: 2},
	{Item: "CAP_NET_ADMIN: the network", Attack: "ip link set lo down && echo got", Escapes: 1, NoNetwork: true},

	// Mounting from inside, in all ways, new namespaces among them.
	{Item: "mount a file system", Attack: "mount -t tmpfs none /tmp && echo got; mount -t proc proc /tmp && echo got", Escapes: 2},
	{Item: "bind a directory", Attack: "mount -o bind /proc /tmp && echo got", Escapes: 1},
	{Item: "make what is read-only writable", Attack: "for d in /proc/sys /proc/sysrq-trigger /sys /sys/fs/cgroup; do mount -o remount,rw,bind $d && echo got; done", Escapes: 2},
	// Lazily, as a mount that the daemon has just made is busy for a moment.
	{Item: "unmount what hides", Attack: "for f in /proc/keys /proc/kcore /proc/timer_list /sys/firmware /etc/hosts; do busybox umount -l $f && echo got; done", Escapes: 1},
	{Item: "a user namespace", Attack: "busybox unshare -U true && echo got; busybox unshare -Ur true && echo got", Escapes: 2},
	{Item: "a mount namespace", Attack: "busybox unshare -m true && echo got", Escapes: 1},
	{Item: "enter a namespace", Attack: "busybox nsenter -t 1 -m true && echo got", Escapes: 1},
	{Item: "another root", Attack: "mkdir /n && busybox pivot_root /n /n 2>&1 | grep -q 'not permitted' || echo got", Escapes: 1},

	// Masked and read-only paths.
	{Item: "masked files", Attack: "for f in keys timer_list kcore interrupts; do [ -n \"$(head -c 1 /proc/$f | od)\" ] && [ \"$(head -c 1 /proc/$f | wc -c)\" = 1 ] && echo got; done", Escapes: 2},
	{Item: "masked directories", Attack: "for d in /proc/acpi /proc/asound /proc/scsi /sys/firmware /sys/devices/virtual/powercap; do ls $d | grep -q . && echo got && break; done", Escapes: 1},
	{Item: "masked files by other names", Attack: "for f in /proc/1/../keys /proc/self/root/proc/timer_list /proc/1/task/1/../../../timer_list /dev/core; do [ \"$(head -c 1 $f | wc -c)\" = 1 ] && echo got; done", Escapes: 2},
	{Item: "masked paths can't be replaced", Spoils: true, Attack: "rm -f /proc/keys /dev/null; ln -s /proc/timer_list /dev/null; mv /proc/keys /proc/x; [ \"$(head -c 1 /proc/timer_list | wc -c)\" = 1 ] && echo got", Escapes: 1},
	{Item: "settings of the kernel", Attack: tries("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max"), Escapes: 3},
	{Item: "settings by other names", Attack: tries("/proc/1/root/proc/sys/kernel/core_pattern", "/proc/self/cwd/proc/sys/kernel/modprobe", "/proc/thread-self/root/proc/sys/vm/overcommit_memory"), Escapes: 2},
	{Item: "requests to the kernel", Attack: tries("/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"), Escapes: 1},
	{Item: "/sys", Attack: tries("/sys/kernel/mm/ksm/run", "/sys/module/kernel/parameters/panic", "/sys/kernel/profiling")},
	{Item: "helpers that the kernel executes", Attack: tries("/sys/kernel/uevent_helper", "/sys/fs/cgroup/release_agent", "/sys/fs/cgroup/*/release_agent", "/sys/fs/cgroup/*/../release_agent")},

	// Cgroups.
	{Item: "cgroup: more memory", Attack: "f=$(ls /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null); (: >> $f) && echo got", Escapes: 1},
	{Item: "cgroup: move", Attack: "f=$(ls /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs 2>/dev/null); echo 1 > $f && echo got", Escapes: 1},
	{Item: "cgroup: a new one", Attack: "d=$(ls -d /sys/fs/cgroup/pids 2>/dev/null || echo /sys/fs/cgroup); mkdir $d/x && echo got; busybox rmdir $d/x", Escapes: 1},
	{Item: "cgroup: a mount of one's own, with a release_agent or of version 2", Attack: "for o in memory rdma pids none,name=attack; do mount -t cgroup -o $o cgroup /tmp && echo got && busybox umount /tmp && break; done; " +
		"mount -t cgroup2 cgroup2 /tmp && echo got && busybox umount /tmp", Escapes: 1},

	// Devices: the nodes can be made, and not opened.
	{Item: "devices", Attack: "cd /dev; for n in 'c 1 1' 'c 1 2' 'c 1 4' 'c 1 11' 'c 10 229' 'c 10 232' 'c 10 237' 'b 7 0' 'b 8 0' 'b 253 0' 'b 254 0' 'b 259 0'; do " +
		"mknod node $n 2>/dev/null && { busybox timeout 5 head -c 0 node 2>&1 | grep -q 'not permitted' || echo got; }; rm -f node; done", Escapes: 8},
	{Item: "a disk in another place", Attack: "mknod /tmp/disk b 7 0; mknod /dev/shm/disk b 7 0; for d in /tmp/disk /dev/shm/disk; do [ -e $d ] && { head -c 0 $d 2>&1 | grep -q 'ermi[ts]' || echo got; rm $d; }; done", Escapes: 1},
	{Item: "terminals of the machine", Attack: "mknod /tmp/t c 136 0; mknod /tmp/c c 5 1; mknod /tmp/v c 4 1; for d in /tmp/t /tmp/c /tmp/v; do busybox timeout 5 head -c 0 $d 2>/dev/null && echo got; done; ls /dev/pts | grep -v ptmx | grep -q . && echo got"},

	// What is the machine's or another step's.
	{Item: "processes of the machine", Attack: "for p in /proc/[0-9]*; do [ ${p#/proc/} -gt 9 ] && [ -e $p/exe ] && grep -q \"$DAEMON\" $p/cmdline && echo got; done"},
	{Item: "files of the machine", Attack: "for d in '' /proc/1/root /proc/self/root /proc/1/cwd /proc/self/cwd/../../../.. /.. /../../../..; do cat $d$SECRET && echo got; done"},
	{Item: "the daemon's environment", Attack: "cat /proc/[0-9]*/environ | grep -q KILN_DAEMON && echo got; env | grep -q KILN_DAEMON && echo got"},
	{Item: "keys", Attack: "grep -q . /proc/keys && echo got", Escapes: 1},
	// One that has gone is the shell's: of the pipe to the next command, say.
	{Item: "descriptors", Attack: "for f in /proc/1/fd/* /proc/$$/fd/*; do l=$(readlink $f); case $l in ''|/dev/null|pipe:*) ;; *) echo got $l;; esac; done"},
	{Item: "shared memory and messages", Attack: "cat /proc/sysvipc/shm /proc/sysvipc/msg /proc/sysvipc/sem | grep -q '[0-9]' && echo got; ls /dev/shm /dev/mqueue | grep -v : | grep -q . && echo got"},
	{Item: "what the step got read-only", Attack: "for f in /etc/hosts /etc/resolv.conf; do (: >> $f) && echo got; busybox chmod 777 $f && echo got; busybox touch $f && echo got; rm -f $f && echo got; done"},
}
