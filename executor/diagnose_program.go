package executor

import (
	"debug/elf"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/executor/rootfs"
	"golang.org/x/sys/unix"
)

// inside looks into the file system that a process had, mounts included.
type inside struct {
	root    int
	sources []source // parents first
}

// program looks at the file at name. place is where it is after links, as far
// as the root has them.
func (in inside) program(name string) (p rootfs.Program, place string, err error) {
	root := rootfs.New(in.root)
	place, _, err = root.Resolve(name)
	if err != nil {
		return rootfs.Program{Path: name}, name, err
	}
	for _, s := range slices.Backward(in.sources) {
		if !rootfs.Below(place, []string{s.dest}) || s.file {
			continue
		}
		part, closePart, err := openPart(s.fd, s.selector)
		if err != nil {
			return rootfs.Program{Path: name}, place, err
		}
		defer closePart()
		p, err = rootfs.New(part).Program(path.Join("/", strings.TrimPrefix(place, s.dest)))
		return p, place, err
	}
	p, err = root.Program(place)
	return p, place, err
}

func (in inside) has(name string) bool {
	_, _, err := in.program(name)
	return err == nil
}

// notExecuted says why the process's program could not be executed.
func (f *failure) notExecuted(err *native.ExecError) Cause {
	name := f.t.p.Args[0]
	if place := f.find(name); place != "" {
		if c := f.program(place, err.Err); c.Kind != "" {
			return c
		}
	}
	return f.noProgram(name)
}

// find returns where name is: in PATH, in the working directory or as it says. It
// is "" if it isn't in PATH.
func (f *failure) find(name string) string {
	if strings.Contains(name, "/") {
		return f.absolute(name)
	}
	for _, dir := range f.searched() {
		if at := f.absolute(path.Join(dir, name)); f.view.has(at) {
			return at
		}
	}
	return ""
}

func (f *failure) absolute(name string) string {
	if path.IsAbs(name) {
		return path.Clean(name)
	}
	return path.Join("/", f.t.p.Cwd, name)
}

func (f *failure) searched() []string {
	for _, kv := range slices.Backward(f.t.spec.Process.Env) {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			return strings.Split(v, ":")
		}
	}
	return nil
}

func (f *failure) noProgram(name string) Cause {
	if strings.Contains(name, "/") {
		at := f.absolute(name)
		if _, _, err := f.view.program(at); errors.Is(err, unix.ELOOP) {
			return Cause{Kind: CauseNoProgram, Text: fmt.Sprintf("%s is a symbolic link that leads to itself, or one of too many; correct the links", at)}
		}
		text := fmt.Sprintf("there is no file %s in the root file system", at)
		if _, place, err := f.view.program(at); err != nil && place != at {
			text = fmt.Sprintf("%s leads to %s, and there is no such file in the root file system", at, place)
		}
		return Cause{Kind: CauseNoProgram, Text: text + "; install or COPY it in an earlier step, or correct the path"}
	}
	dirs := strings.Join(f.searched(), ":")
	return Cause{Kind: CauseNoProgram, Text: fmt.Sprintf("no directory of PATH (%s) has a program %q; install it in an earlier step, or write its full path", dirs, name)}
}

// program says why the file at name, which is there, can't be executed: err is
// what the kernel said, or nil if that isn't known.
func (f *failure) program(name string, err error) Cause {
	p, _, perr := f.view.program(name)
	switch {
	case perr != nil:
		return Cause{}
	case p.Mode.IsDir():
		return Cause{Kind: CausePermission, Text: fmt.Sprintf("%s is a directory, not a program", name)}
	case !p.Mode.IsRegular():
		return Cause{Kind: CausePermission, Text: fmt.Sprintf("%s is no regular file (%s), and can't be executed", name, p.Mode.Type())}
	case p.Mode.Perm()&0o111 == 0:
		return Cause{Kind: CausePermission, Text: fmt.Sprintf("%s may not be executed: its mode is %#o; add `chmod +x %s`, or COPY it with --chmod=755", name, p.Mode.Perm(), name)}
	}
	if p.Binary && !runsHere(p) {
		return Cause{Kind: CauseArchitecture, Text: fmt.Sprintf("%s is a program for %s, and this machine runs %s; use one for this platform, or install an emulator (binfmt_misc, qemu-user-static)", name, machineName(p), runtime.GOARCH)}
	}
	if c := f.interpreter(name, p); c.Kind != "" {
		return c
	}
	switch {
	case errors.Is(err, unix.EACCES):
		return Cause{Kind: CausePermission, Text: fmt.Sprintf("user %s may not execute %s, whose mode is %#o, or enter a directory on the way to it; change the mode or the user, or see that its mount isn't noexec", f.user(), name, p.Mode.Perm())}
	case errors.Is(err, unix.ENOEXEC) && p.Size == 0:
		return Cause{Kind: CauseNoInterpreter, Text: fmt.Sprintf("%s is empty", name)}
	case errors.Is(err, unix.ENOEXEC):
		return Cause{Kind: CauseNoInterpreter, Text: fmt.Sprintf("%s is no binary, and names no interpreter: begin it with a line such as #!/bin/sh", name)}
	}
	return Cause{}
}

// interpreter says what is wrong with the program that executes p.
func (f *failure) interpreter(name string, p rootfs.Program) Cause {
	if p.Interpreter == "" || f.view.has(f.absolute(p.Interpreter)) {
		return Cause{}
	}
	at := strings.TrimRight(p.Interpreter, "\r")
	switch {
	case p.Script && at != p.Interpreter && f.view.has(f.absolute(at)):
		return Cause{Kind: CauseNoInterpreter, Text: fmt.Sprintf("the first line of the script %s ends like lines of Windows, so that its interpreter is %q with a carriage return; save it with the line ends of Unix", name, at)}
	case p.Script:
		return Cause{Kind: CauseNoInterpreter, Text: fmt.Sprintf("the script %s is executed by %s, as its first line says, and there is no such file in the root file system; install that, or change the line", name, at)}
	}
	return Cause{Kind: CauseNoInterpreter, Text: fmt.Sprintf("%s is linked dynamically and needs the loader %s, which isn't in the root file system%s; use a base image that has it, or a static binary", name, at, libcOf(at))}
}

// libcOf names the C library that a loader belongs to, as images differ in that.
func libcOf(loader string) string {
	switch base := path.Base(loader); {
	case strings.HasPrefix(base, "ld-linux"), strings.HasPrefix(base, "ld64"):
		return " (it is that of glibc, which for example Alpine and busybox images lack)"
	case strings.HasPrefix(base, "ld-musl"):
		return " (it is that of musl, as in Alpine)"
	}
	return ""
}

func (f *failure) user() string {
	if f.t.p.User == "" {
		return "root"
	}
	return f.t.p.User
}

var machineNames = map[elf.Machine]string{
	elf.EM_X86_64: "amd64", elf.EM_386: "386", elf.EM_AARCH64: "arm64", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64",
	elf.EM_PPC64: "ppc64le", elf.EM_S390: "s390x", elf.EM_LOONGARCH: "loong64", elf.EM_MIPS: "mips",
}

func machineName(p rootfs.Program) string {
	if name, ok := machineNames[p.Machine]; ok {
		return name
	}
	return p.Machine.String()
}

// runsHere reports whether the machine's processor may run p. What is foreign
// and has an emulator is executed and doesn't come here.
func runsHere(p rootfs.Program) bool {
	name := machineName(p)
	switch runtime.GOARCH {
	case "amd64":
		return name == "amd64" || name == "386"
	case "arm64":
		return name == "arm64" || name == "arm"
	}
	return name == runtime.GOARCH
}
