//go:build e2e

package e2e

import (
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup/cgrouptest"
)

// The error of a failed step names what made it fail, after what upstream's
// client prints, and what to do about it.
func TestFailureCauses(t *testing.T) {
	d := newDaemon(t)
	ctx := files{
		"nointerp.sh": "#!/usr/bin/python3\nprint()\n",
		"windows.sh":  "#!/bin/sh\r\necho\r\n",
		"nohead":      "echo\n",
		"loader":      elfProgram(62, "/lib64/ld-linux-none.so.2"),
		"foreign":     elfProgram(22, ""),
	}
	const copied = "FROM BASE\nCOPY --chmod=755 . /opt/\n"
	for _, c := range []struct {
		name, dockerfile string
		args             []string
		want             []string
	}{
		{"ExitCode", "FROM BASE\nRUN exit 7\n", nil, []string{"exit code: 7"}},
		{"Signal", "FROM BASE\nRUN sh -c 'kill -SEGV $$'; exit $?\n", nil, []string{"exit code: 139: signal:", "SIGSEGV"}},
		{"OutOfMemory", "FROM BASE\nRUN dd if=/dev/zero of=/dev/null bs=200M count=1\n", []string{"--opt", "memory=33554432", "--opt", "memswap=33554432"},
			memoryRanOut(t)},
		{"DiskFull", "FROM BASE\nRUN --mount=type=tmpfs,target=/small,size=65536 cat /bin/busybox > /small/x\n", nil, []string{"exit code: 1: disk full:", "file system of /small"}},
		{"NoProgram", "FROM BASE\nRUN [\"nonesuch\"]\n", nil, []string{"exit code: 127:", "missing program:", `"nonesuch"`, "PATH"}},
		{"NoProgramInShell", "FROM BASE\nRUN nonesuch --flag\n", nil, []string{"exit code: 127: missing program, judging by what it printed", `"nonesuch"`}},
		{"NoInterpreter", copied + "RUN [\"/opt/nointerp.sh\"]\n", nil, []string{"missing interpreter", "/opt/nointerp.sh", "/usr/bin/python3"}},
		{"NoInterpreterInShell", copied + "RUN /opt/nointerp.sh\n", nil, []string{"exit code: 127: missing interpreter", "/usr/bin/python3"}},
		{"WindowsLineEnds", copied + "RUN [\"/opt/windows.sh\"]\n", nil, []string{"missing interpreter", "line ends"}},
		{"NoFirstLine", copied + "RUN [\"/opt/nohead\"]\n", nil, []string{"missing interpreter", "#!/bin/sh"}},
		{"NoLoader", copied + "RUN [\"/opt/loader\"]\n", nil, []string{"missing interpreter", "/lib64/ld-linux-none.so.2", "glibc"}},
		{"Architecture", copied + "RUN [\"/opt/foreign\"]\n", nil, []string{"wrong architecture", "is a program for s390x"}},
		{"NotExecutable", "FROM BASE\nCOPY --chmod=644 nohead /opt/\nRUN [\"/opt/nohead\"]\n", nil, []string{"exit code: 126:", "permission:", "chmod +x"}},
		{"Permission", "FROM BASE\nUSER 1000\nRUN echo > /etc/x\n", nil, []string{"exit code: 1: permission", "user, 1000"}},
		{"NameResolution", "FROM BASE\nRUN --network=none wget http://registry.invalid/\n", nil, []string{"exit code: 1: name resolution", "--network=none"}},
		{"RefusedBySandbox", "FROM BASE\nRUN mount -t tmpfs x /tmp\n", nil, []string{"refused by policy", "--security=insecure"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.t = t
			d.dockerfile(c.dockerfile, ctx, c.args...).fails(t, append(c.want, "did not complete successfully: exit code: ")...)
		})
	}
	d.t = t
}

// memoryRanOut is what is said of a step that a limit of 32 MiB has ended, with how
// much it used where the kernel counts that.
func memoryRanOut(t *testing.T) []string {
	t.Helper()
	used := "ran out of memory: the limit"
	if cgrouptest.CountsPeak(t) {
		used = "used up to 3"
	}
	return []string{"exit code: 137: out of memory:", "the limit is 32MiB", used}
}

// elfProgram is a program for a machine, by its number in ELF, that the kernel
// looks at closely enough to miss its loader.
func elfProgram(machine byte, loader string) string {
	b := make([]byte, 4096)
	copy(b, "\x7fELF\x02\x01\x01")
	b[16], b[18], b[20] = 3, machine, 1                                // shared object, version
	b[32], b[52], b[54], b[56] = 64, 64, 56, 1                         // program headers: where, size of this, size of one, how many
	b[64], b[68] = 3, 4                                                // the one: an interpreter, readable
	b[72], b[96], b[104] = 120, byte(len(loader)+1), byte(len(loader)) // where it is, how long
	copy(b[120:], loader)
	return string(b)
}
