//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/cgroup"
	"golang.org/x/sys/unix"
)

// elfFile is the header of a program that needs the loader, if it isn't "".
func elfFile(machine elf.Machine, loader string) []byte {
	var b bytes.Buffer
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2,
	}
	load := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: 5, Filesz: 4096, Memsz: 4096, Align: 4096}
	interp := elf.Prog64{Type: uint32(elf.PT_INTERP), Flags: 4, Off: 64 + 2*56, Filesz: uint64(len(loader) + 1)}
	if loader == "" {
		interp.Type = uint32(elf.PT_NULL)
	}
	for _, part := range []any{h, load, interp} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			panic(err)
		}
	}
	b.WriteString(loader + "\x00")
	return append(b.Bytes(), make([]byte, 4096-b.Len())...)
}

func nativeMachine() elf.Machine {
	if runtime.GOARCH == "arm64" {
		return elf.EM_AARCH64
	}
	return elf.EM_X86_64
}

// Failures brought about on purpose are named for what they are, whichever
// runtime runs the step.
func TestCauses(t *testing.T) {
	files := map[string]struct {
		data []byte
		mode os.FileMode
	}{
		"bin/nointerp":  {[]byte("#!/usr/bin/python3 -u\nprint()\n"), 0o755},
		"bin/windows":   {[]byte("#!/bin/sh\r\necho\r\n"), 0o755},
		"bin/nohead":    {[]byte("echo\n"), 0o755},
		"bin/empty":     {nil, 0o755},
		"bin/dynamic":   {elfFile(nativeMachine(), "/lib64/ld-linux-none.so.2"), 0o755},
		"bin/foreign":   {elfFile(elf.EM_S390, ""), 0o755},
		"bin/plain":     {[]byte("#!/bin/sh\n"), 0o644},
		"bin/ownersown": {[]byte("#!/bin/sh\n"), 0o700},
	}
	cases := []struct {
		name   string
		args   []string
		script string // if there are no args
		change func(*Process)
		code   int
		kind   CauseKind
		want   []string
		hint   bool
	}{
		{name: "exit code", script: "exit 7", code: 7},
		{name: "missing in PATH", args: []string{"nonesuch"}, code: 127, kind: CauseNoProgram, want: []string{`"nonesuch"`, "PATH (/bin)"}},
		{name: "missing by path", args: []string{"/opt/nonesuch"}, code: 127, kind: CauseNoProgram, want: []string{"/opt/nonesuch"}},
		{name: "missing behind a link", args: []string{"/bin/dangling"}, code: 127, kind: CauseNoProgram, want: []string{"/bin/dangling leads to /nowhere"}},
		{name: "script's interpreter", args: []string{"/bin/nointerp"}, code: 127, kind: CauseNoInterpreter, want: []string{"/bin/nointerp", "/usr/bin/python3"}},
		{name: "script's interpreter in PATH", args: []string{"nointerp"}, code: 127, kind: CauseNoInterpreter, want: []string{"/bin/nointerp", "/usr/bin/python3"}},
		{name: "Windows line ends", args: []string{"/bin/windows"}, code: 127, kind: CauseNoInterpreter, want: []string{"Windows", `"/bin/sh"`}},
		{name: "no first line", args: []string{"/bin/nohead"}, code: 126, kind: CauseNoInterpreter, want: []string{"#!/bin/sh"}},
		{name: "empty", args: []string{"/bin/empty"}, code: 126, kind: CauseNoInterpreter, want: []string{"/bin/empty is empty"}},
		{name: "loader", args: []string{"/bin/dynamic"}, code: 127, kind: CauseNoInterpreter, want: []string{"/bin/dynamic", "/lib64/ld-linux-none.so.2", "glibc"}},
		{name: "architecture", args: []string{"/bin/foreign"}, code: 126, kind: CauseArchitecture, want: []string{"/bin/foreign is a program for s390x", runtime.GOARCH}},
		{name: "not executable", args: []string{"/bin/plain"}, code: 126, kind: CausePermission, want: []string{"chmod +x /bin/plain", "0644"}},
		{name: "directory", args: []string{"/etc"}, code: 126, kind: CausePermission, want: []string{"/etc is a directory"}},
		{name: "not the user's", args: []string{"/bin/ownersown"}, change: func(p *Process) { p.User = "builder" }, code: 2, kind: CausePermission, want: []string{"user, builder"}, hint: true},
		{name: "signal", script: "kill -SEGV $$; sleep 100", change: notFirst, code: 139, kind: CauseSignal, want: []string{"SIGSEGV", "crashed"}},
		{name: "file too large", script: "ulimit -f 1; cat /bin/busybox > /f; exit $?", code: 153, kind: CauseSignal, want: []string{"SIGXFSZ", "ulimit -f"}},
		{name: "link to itself", args: []string{"/bin/loop"}, code: 126, kind: CauseNoProgram, want: []string{"/bin/loop is a symbolic link", "itself"}},
		{name: "missing in a shell", script: "nonesuch --flag", code: 127, kind: CauseNoProgram, want: []string{`"nonesuch"`, "PATH (/bin)"}, hint: true},
		{name: "interpreter in a shell", script: "/bin/nointerp", code: 127, kind: CauseNoInterpreter, want: []string{"/usr/bin/python3"}, hint: true},
		{name: "loader in a shell", script: "cd /bin; /bin/dynamic", code: 127, kind: CauseNoInterpreter, want: []string{"ld-linux-none"}, hint: true},
		{name: "not executable in a shell", script: "/bin/plain", code: 126, kind: CausePermission, want: []string{"chmod +x"}, hint: true},
		{name: "full tmpfs", script: "cat /bin/busybox > /small/x", change: small, code: 1, kind: CauseDiskFull, want: []string{"of /small", "64KiB"}},
		{name: "name resolution", script: "echo 'ping: bad address '\"'registry.invalid'\" >&2; exit 1", code: 1, kind: CauseDNS, want: []string{"asks", "[dns] nameservers"}, hint: true},
		{name: "no network", script: "echo \"wget: bad address 'x.invalid'\" >&2; exit 1", change: func(p *Process) { p.Network = NetNone }, code: 1, kind: CauseDNS, want: []string{"--network=none"}, hint: true},
		{name: "policy", script: "mount -t tmpfs x /tmp", code: 1, kind: CausePolicy, want: []string{"sandbox", "--security=insecure"}, hint: true},
		{name: "permission", script: "echo > /etc/passwd", change: func(p *Process) { p.User = "builder" }, code: 1, kind: CausePermission, want: []string{"builder"}, hint: true},
		{name: "read-only", script: "echo > /proc/sys/vm/swappiness", code: 1, kind: CausePermission, want: []string{"read-only"}, hint: true},
	}
	root := busyboxRoot(t)
	for name, f := range files {
		if err := os.WriteFile(filepath.Join(root, name), f.data, f.mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink("/nowhere", filepath.Join(root, "bin/dangling")), os.Symlink("loop", filepath.Join(root, "bin/loop"))); err != nil {
		t.Fatal(err)
	}
	each(t, allRuntimes, func(t *testing.T, e *executor) {
		for _, tc := range cases {
			t.Run(tc.name, func(t *testing.T) {
				p := process(t, tc.script)
				p.Root, _ = overlay(t, root)
				if tc.args != nil {
					p.Args = tc.args
				}
				if tc.change != nil {
					tc.change(&p)
				}
				r := run(t, e, p)
				var exit *ExitError
				if !errors.As(r.err, &exit) {
					t.Fatalf("error %v, stderr %s", r.err, r.stderr)
				}
				if exit.Code != tc.code || exit.Cause.Kind != tc.kind || tc.hint != (exit.Cause.Printed != "") {
					t.Errorf("code %d, cause %+v; stderr %s", exit.Code, exit.Cause, r.stderr)
				}
				for _, w := range tc.want {
					if !strings.Contains(exit.Error(), w) {
						t.Errorf("%q lacks %q", exit.Error(), w)
					}
				}
			})
		}
	})
}

// notFirst has the process not be the first of its PID namespace, which signals
// of its own spare: a shell below one that reports what became of it.
func notFirst(p *Process) { p.Args = []string{"sh", "-c", "sh -c '" + p.Args[2] + "'; exit $?"} }

func small(p *Process) {
	p.Mounts = []Mount{{Dest: "/small", Source: []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"size=64k"}}}}}
}

// The program that failed may be in a mount rather than in the root.
func TestCauseInAMount(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tool"), []byte("#!/no/interp\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "")
		p.Mounts = []Mount{{Dest: "/tools", Source: bindMount(dir)}}
		p.Args = []string{"/tools/tool"}
		r := run(t, e, p)
		var exit *ExitError
		if !errors.As(r.err, &exit) || exit.Cause.Kind != CauseNoInterpreter || !strings.Contains(exit.Error(), "/no/interp") {
			t.Errorf("error %v", r.err)
		}
	})
}

func TestTail(t *testing.T) {
	for name, tc := range map[string]struct {
		writes []string
		want   []string
	}{
		"nothing":            {nil, nil},
		"lines":              {[]string{"a\nb", "c\n\n"}, []string{"a", "bc"}},
		"progress bars":      {[]string{"10%\r20%\r\nend\x1b[0m"}, []string{"20%", "end[0m"}},
		"more than it keeps": {[]string{strings.Repeat("x", 3*tailSize) + "\nlast\n"}, []string{strings.Repeat("x", tailSize-6), "last"}},
		"many writes":        {append(slices.Repeat([]string{strings.Repeat("y", 99) + "\n"}, 100), "last"), append(append([]string{strings.Repeat("y", 43)}, slices.Repeat([]string{strings.Repeat("y", 99)}, 20)...), "last")},
	} {
		t.Run(name, func(t *testing.T) {
			var tl tail
			for _, w := range tc.writes {
				tl.note([]byte(w))
			}
			if got := tl.lines(); !slices.Equal(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}

// What programs print is taken for what it means, and never for more: the words
// must be in the last lines of standard error.
func TestHints(t *testing.T) {
	for line, want := range map[string]CauseKind{
		"curl: (6) Could not resolve host: deb.example.org":                                   CauseDNS,
		"E: Temporary failure resolving 'deb.example.org'":                                    CauseDNS,
		"dial tcp: lookup proxy.example.org: no such host":                                    CauseDNS,
		"fatal: unable to access: Could not resolve host: github.com":                         CauseDNS,
		"npm ERR! getaddrinfo ENOTFOUND registry.example.org":                                 CauseDNS,
		"./app: error while loading shared libraries: libssl.so.3: cannot open shared object": CauseNoInterpreter,
		"mount: permission denied (are you root?)":                                            CausePolicy,
		"cat: /x: Permission denied":                                                          CausePermission,
		"chown: /x: Operation not permitted":                                                  CausePolicy,
		"make: *** [all] Error 2":                                                             "",
		"":                                                                                    "",
	} {
		f := &failure{t: &task{p: Process{Args: []string{"sh"}}}, exit: exit{code: 1}, stderr: []string{line}}
		if c := f.hint(); c.Kind != want || want != "" && c.Printed != line {
			t.Errorf("%q: %+v, want %q", line, c, want)
		}
	}
}

func TestSignals(t *testing.T) {
	for _, tc := range []struct {
		exit exit
		kind CauseKind
		want string
	}{
		{exit{code: 128}, "", ""},
		{exit{code: 255}, "", ""},
		{exit{code: 128 + int(unix.SIGKILL), signaled: true}, CauseSignal, "killed by SIGKILL"},
		{exit{code: 128 + int(unix.SIGTERM)}, CauseSignal, "as the exit code says"},
		{exit{code: 128 + int(unix.SIGSYS), signaled: true}, CausePolicy, "refuses a system call"},
	} {
		f := &failure{t: &task{p: Process{Args: []string{"sh"}}}, exit: tc.exit}
		if c := f.signal(); c.Kind != tc.kind || !strings.Contains(c.Text, tc.want) {
			t.Errorf("%+v: %+v", tc.exit, c)
		}
	}
}

// A cause of memory says how much there was, where the kernel counts that, and
// whose limit it was.
func TestOutOfMemoryText(t *testing.T) {
	var e exit
	e.account(cgroup.Usage{OOMKills: 2, MemoryPeak: 64 << 20, OOMLimit: 64 << 20})
	f := &failure{t: &task{}, exit: e}
	if c := f.outOfMemory(); c.Kind != CauseOOM || !strings.Contains(c.Text, "2 of its processes") || !strings.Contains(c.Text, "limit is 64MiB") {
		t.Errorf("%+v", c)
	}
	f.exit.oomLimit = 0
	if c := f.outOfMemory(); !strings.Contains(c.Text, "used up to 64MiB, no limit of its own") {
		t.Errorf("%+v", c)
	}
	f.exit.usage.MemoryPeak, f.exit.oomLimit = 0, 32<<20
	if c := f.outOfMemory(); !strings.Contains(c.Text, "out of memory: the limit is 32MiB; raise it") {
		t.Errorf("without a peak: %+v", c)
	}
}

// What ends because its context has says so, whoever came first: the signal to
// its container, the output that nobody takes any more, or who watches it.
func TestResultOfTheCancelled(t *testing.T) {
	boom := errors.New("boom")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(boom)
	e, unread := &executor{}, errors.New("copy output: context canceled")
	for name, tc := range map[string]struct {
		exit exit
		err  error
		want error
	}{
		"killed":       {exit: exit{killed: true, code: 137}, want: boom},
		"container's":  {exit: exit{code: 143, signaled: true}, want: boom},
		"not read":     {err: unread, want: boom},
		"both":         {exit: exit{killed: true}, err: unread, want: unread},
		"done already": {},
	} {
		t.Run(name, func(t *testing.T) {
			err := e.result(ctx, &task{}, tc.exit, tc.err)
			if !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
	if err := e.result(t.Context(), &task{}, exit{}, unread); !errors.Is(err, unread) || errors.Is(err, boom) {
		t.Errorf("not cancelled: error %v", err)
	}
}
