//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hostDir is a directory of the machine that this process has open, at a path
// that a step can guess.
func hostDir(t *testing.T) (dir, link string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return dir, fmt.Sprintf("/proc/self/fd/%d", fd)
}

// attack runs p, which may make something wait for ever.
func attack(t *testing.T, e *executor, p Process) result {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the step doesn't end, or doesn't even begin"))
	defer cancel()
	var out, errOut bytes.Buffer
	p.Stdout, p.Stderr = &out, &errOut
	u, err := e.Run(ctx, p)
	if ctx.Err() != nil {
		t.Fatalf("%v\nstdout: %s\nstderr: %s", err, out.String(), errOut.String())
	}
	return result{out.String(), errOut.String(), u, err}
}

// attackFurther runs p as a further process in a container whose first process
// reads its input to the end.
func attackFurther(t *testing.T, e *executor, first, p Process) result {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the process doesn't end, or doesn't even begin"))
	defer cancel()
	s := startFirst(ctx, t, e, first)
	var out, errOut bytes.Buffer
	p.Stdout, p.Stderr = &out, &errOut
	err := s.Exec(ctx, p)
	if cerr := s.stdin.Close(); cerr != nil {
		t.Error(cerr)
	}
	if err := <-s.done; err != nil {
		t.Errorf("the first process: %v", err)
	}
	return result{stdout: out.String(), stderr: errOut.String(), err: err}
}

// checkUntouched fails if something was made in a hostDir.
func checkUntouched(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the machine's directory has %v (%v)", entries, err)
	}
}

// Paths through this process's open files, which a child starts with, must
// lead nowhere: as working directory and as program (the runc leak of 2024), and
// as mount point.
func TestDescriptorsLeadNowhere(t *testing.T) {
	each(t, ours(t), func(t *testing.T, e *executor) {
		dir, link := hostDir(t)
		if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("#!/bin/sh\necho of the machine\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		linked := t.TempDir() // content of a mount, or of an image
		for name, target := range map[string]string{"dir": link, "up": link + "/../.."} {
			if err := os.Symlink(target, filepath.Join(linked, name)); err != nil {
				t.Fatal(err)
			}
		}
		const look = "cat secret ../*/secret ../../../../../etc/hostname /proc/self/cwd/../../../../etc/hostname 2>/dev/null; true"
		for name, change := range map[string]func(p *Process){
			"working directory":                   func(p *Process) { p.Cwd = link },
			"working directory below":             func(p *Process) { p.Cwd = link + "/made" },
			"working directory by link":           func(p *Process) { p.Cwd = "/m/dir" },
			"working directory by link and above": func(p *Process) { p.Cwd = "/m/up/tmp" },
			"mount point": func(p *Process) {
				p.Mounts = append(p.Mounts, Mount{Dest: link + "/made/here", Source: bindMount(linked)})
			},
			"mount point by link": func(p *Process) {
				p.Mounts = append(p.Mounts, Mount{Dest: "/m/dir/made/here", Source: bindMount(linked)})
			},
			"file by link": func(p *Process) {
				p.Mounts = append(p.Mounts, Mount{Dest: "/m/dir/made", Source: bindMount(dir), Selector: "secret"})
			},
			"program":         func(p *Process) { p.Args = []string{link + "/secret"} },
			"program by link": func(p *Process) { p.Args = []string{"/m/dir/secret"} },
		} {
			p := process(t, look)
			p.Mounts = []Mount{{Dest: "/m", Source: bindMount(linked)}}
			change(&p)
			r := attack(t, e, p)
			if strings.Contains(r.stdout, "machine") || strings.TrimSpace(r.stdout) != "" {
				t.Errorf("%s: the step sees %q", name, r.stdout)
			}
			checkUntouched(t, dir)
		}
	})
}

// No number is a way out, whatever this process has open there.
func TestNoDescriptorIsAWayOut(t *testing.T) {
	each(t, ours(t), func(t *testing.T, e *executor) {
		hostDir(t)
		highest := 0
		for _, f := range openFiles(t) {
			var fd int
			fmt.Sscan(f, &fd)
			highest = max(highest, fd)
		}
		if e.cfg.Binary != "" {
			highest = 30 // those of another process
		}
		p := process(t, "ls -d ../../../../proc ../../../../etc/passwd")
		for fd := 3; fd <= highest+3; fd++ {
			p.ID, p.Cwd = newID(), fmt.Sprintf("/proc/self/fd/%d", fd)
			if r := attack(t, e, p); r.err == nil && !strings.HasPrefix(r.stderr, "ls: ") {
				t.Errorf("working directory %s: the step ran: %s", p.Cwd, r.stdout)
			}
		}
	})
}

// A step with nothing to read has a /dev/null of its own: through the
// machine's it could change that one's mode and owner.
func TestNullIsNotTheMachines(t *testing.T) {
	var before, after unix.Stat_t
	if err := unix.Stat(os.DevNull, &before); err != nil {
		t.Fatal(err)
	}
	each(t, ours(t), func(t *testing.T, e *executor) {
		for _, user := range []string{"", "builder"} {
			p := process(t, "for fd in 0 1 2; do busybox chmod 600 /proc/self/fd/$fd; busybox chown 7:7 /proc/self/fd/$fd; done; [ -c /proc/self/fd/0 ] || [ -p /proc/self/fd/0 ]")
			p.User = user
			if _, err := e.Run(t.Context(), p); err != nil {
				t.Error(err)
			}
		}
	})
	if err := unix.Stat(os.DevNull, &after); err != nil {
		t.Fatal(err)
	}
	if after.Mode != before.Mode || after.Uid != before.Uid || after.Gid != before.Gid {
		t.Errorf("the machine's /dev/null is now %o %d:%d, it was %o %d:%d", after.Mode, after.Uid, after.Gid, before.Mode, before.Uid, before.Gid)
		if err := unix.Chmod(os.DevNull, before.Mode&0o7777); err != nil {
			t.Error(err)
		}
		if err := unix.Chown(os.DevNull, int(before.Uid), int(before.Gid)); err != nil {
			t.Error(err)
		}
	}
}
