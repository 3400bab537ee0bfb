//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// What a peeking process says: that it is there, that it read the environment of
// a program, and that it read what a process had before its program.
const (
	peeking = "ready\n"
	peeked  = "of a program\n"
	gotten  = "of the daemon\n"
)

// peek reads the environments of all other processes that it sees, again and
// again until its input ends: the first part of their memory.
func peek() {
	end := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // it is the end, then
		close(end)
	}()
	said := map[string]bool{}
	say := func(text string) {
		if !said[text] {
			fmt.Print(text)
			said[text] = true
		}
	}
	say(peeking)
	for {
		others, err := filepath.Glob("/proc/[0-9]*/environ")
		if err != nil {
			panic(err) // of the pattern alone
		}
		for _, name := range others {
			env, err := os.ReadFile(name)
			if err != nil || name == "/proc/1/environ" { // hidden or gone, or its own
				continue
			}
			if bytes.Contains(env, []byte("KILN_PEEK=program")) {
				say(peeked)
			}
			if bytes.Contains(env, []byte("KILN_DAEMON_TOKEN")) {
				say(gotten)
			}
		}
		select {
		case <-end:
			os.Exit(0)
		default:
		}
	}
}

// A process that enters a container is at first one of the daemon's, with a copy
// of its memory. Those in the container can't look into it, neither while it
// is prepared nor when it has no more privileges than they.
func TestEntryIsHidden(t *testing.T) {
	t.Setenv("KILN_DAEMON_TOKEN", "x")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	each(t, ours(t), func(t *testing.T, e *executor) {
		ctx := patience(t, "the container doesn't end, or doesn't even begin")
		p := withProgram(t, exe)
		p.Env = append(p.Env, "KILN_EXECUTOR_TEST=probe-peek")
		ready, program := watchFor(peeking), watchFor(peeked)
		var out bytes.Buffer
		p.Stdout = io.MultiWriter(&out, ready, program)
		s := startFirst(ctx, t, e, p)
		ready.wait(t)
		for range 30 {
			err := s.Exec(ctx, Process{Args: []string{"/bin/true"}, Env: []string{"PATH=/bin"}})
			if err != nil {
				t.Fatal(err)
			}
		}
		// The control: a program without secrets can be looked into.
		r, w := io.Pipe()
		looked := make(chan error, 1)
		go func() {
			looked <- s.Exec(ctx, Process{Args: []string{"/bin/cat"}, Env: []string{"KILN_PEEK=program"}, Stdin: r})
		}()
		program.wait(t)
		if err := errors.Join(w.Close(), <-looked, s.stdin.Close(), <-s.done); err != nil {
			t.Error(err)
		}
		if bytes.Contains(out.Bytes(), []byte(gotten)) {
			t.Error("a process of the container has read the memory of one that entered it")
		}
	})
}

// withProgram is a Process that runs this machine's program exe.
func withProgram(t *testing.T, exe string) Process {
	t.Helper()
	p := process(t, "")
	p.Args = []string{"/probe"}
	p.Mounts = []Mount{{Dest: "/probe", Source: bindMount(filepath.Dir(exe)), Selector: filepath.Base(exe), Readonly: true}}
	for _, lib := range []string{"/lib", "/lib64", "/usr/lib"} { // if it is linked dynamically
		if _, err := os.Stat(lib); err == nil {
			p.Mounts = append(p.Mounts, Mount{Dest: lib, Source: bindMount(lib), Readonly: true})
		}
	}
	return p
}
