//go:build linux

// Command probe prints what a process sees of the container that it runs in,
// one fact a line, so that runtimes can be compared. Its arguments are further
// facts to find out: see facts.
//
// It is static and starts fast, and it looks before it leaves traces: what Go
// opens or changes for itself isn't told.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// report collects lines.
type report struct{ strings.Builder }

func (r *report) add(section, format string, args ...any) {
	fmt.Fprintf(r, "%s: %s\n", section, fmt.Sprintf(format, args...))
}

// result adds a value, or the error instead.
func (r *report) result(section, name string, value any, err error) {
	if err != nil {
		r.add(section, "%s: %s", name, reason(err))
		return
	}
	r.add(section, "%s = %v", name, value)
}

// reason is an error without the path, which is told already.
func reason(err error) string {
	var errno unix.Errno
	if asErrno(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func main() {
	r := &report{}
	r.files()
	r.process()
	r.names()
	r.mounts()
	r.devices()
	r.control()
	code := r.facts(os.Args[1:])
	if _, err := os.Stdout.WriteString(r.String()); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(99)
	}
	os.Exit(code)
}

// facts finds out what is asked for:
//
//	read:FILE         its text
//	stat:FILE         its kind, mode and owner
//	list:DIR          its files
//	write:FILE        whether it can be created or opened for writing
//	mknod:FILE:KIND:MAJOR:MINOR
//	open:FILE         whether it can be opened for reading
//	call:NR:ARG:...   a system call's result
//	wait:FILE         waits until the FIFO is opened by somebody
//	exit:CODE         ends with it; kill:N ends by the signal
func (r *report) facts(list []string) int {
	for _, fact := range list {
		verb, rest, _ := strings.Cut(fact, ":")
		args := strings.Split(rest, ":")
		switch verb {
		case "read":
			b, err := os.ReadFile(rest)
			r.result("read", rest, fmt.Sprintf("%q", b), err)
		case "stat":
			text, err := describe(rest)
			r.result("stat", rest, text, err)
		case "list":
			entries, err := os.ReadDir(rest)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			r.result("list", rest, names, err)
		case "write":
			f, err := os.OpenFile(rest, os.O_CREATE|os.O_WRONLY, 0o644)
			if err == nil {
				err = f.Close()
			}
			r.result("write", rest, "yes", err)
		case "open":
			f, err := os.Open(rest)
			if err == nil {
				err = f.Close()
			}
			r.result("open", rest, "yes", err)
		case "mknod":
			mode := map[string]uint32{"c": unix.S_IFCHR, "b": unix.S_IFBLK, "p": unix.S_IFIFO}[args[1]]
			r.result("mknod", rest, "yes", unix.Mknod(args[0], mode|0o600, int(unix.Mkdev(uint32(number(args[2])), uint32(number(args[3]))))))
		case "call":
			var words [7]uintptr
			for i, a := range args {
				words[i] = uintptr(number(a))
			}
			n, _, errno := unix.Syscall6(words[0], words[1], words[2], words[3], words[4], words[5], words[6])
			if errno != 0 {
				r.add("call", "%s: %s", rest, unix.ErrnoName(errno))
			} else {
				r.add("call", "%s = %d", rest, n)
			}
		case "wait":
			f, err := os.OpenFile(rest, os.O_RDONLY, 0)
			if err == nil {
				err = f.Close()
			}
			r.result("wait", rest, "over", err)
		case "exit":
			return number(rest)
		case "kill":
			os.Stdout.WriteString(r.String())                 //nolint:errcheck // the end is what is looked at
			unix.Kill(os.Getpid(), unix.Signal(number(rest))) //nolint:errcheck // itself
			select {}
		default:
			r.add("probe", "unknown fact %s", fact)
			return 98
		}
	}
	return 0
}

func number(text string) int {
	n, err := strconv.ParseInt(text, 0, 64)
	if err != nil {
		panic(err)
	}
	return int(n)
}

// describe tells what a file is.
func describe(name string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return "", err
	}
	text := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		text += fmt.Sprintf(" device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case unix.S_IFLNK:
		to, err := os.Readlink(name)
		return text + " -> " + to, err
	}
	return text, nil
}

// devices lists everything below /dev that is on the same file system.
func (r *report) devices() {
	top, ok := device("/dev")
	err := filepath.WalkDir("/dev", func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		text, err := describe(name)
		r.result("dev", name, text, err)
		if dev, known := device(name); d.IsDir() && known && ok && dev != top {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		r.add("dev", "%s", reason(err))
	}
}

func device(name string) (uint64, bool) {
	var st unix.Stat_t
	err := unix.Lstat(name, &st)
	return st.Dev, err == nil
}
