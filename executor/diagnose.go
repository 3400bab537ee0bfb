package executor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/executor/native"
	"golang.org/x/sys/unix"
)

// failure is a process that failed, with what is still there of it to look at.
// Looking costs nothing as long as processes succeed.
type failure struct {
	t      *task
	exit   exit
	view   inside
	stderr []string // the last lines it printed
	dns    []byte   // its resolv.conf
}

// diagnose finds out why the process of t failed. What can be seen comes first;
// what it printed is asked last, and a cause that comes of that alone says so.
func (e *executor) diagnose(t *task, exit exit, execErr *native.ExecError) Cause {
	f := &failure{t: t, exit: exit, view: inside{t.root.FD(), t.sources}, stderr: t.watch.stderr.lines()}
	if dns, err := e.dns.get(t.p.Network == NetHost); err == nil {
		f.dns = dns
	}
	if execErr != nil {
		return f.notExecuted(execErr)
	}
	for _, look := range []func() Cause{f.outOfMemory, f.tooMany, f.signal, f.full, f.inShell, f.hint} {
		if c := look(); c.Kind != "" {
			return c
		}
	}
	return Cause{}
}

func (f *failure) outOfMemory() Cause {
	n := f.exit.usage.OOMKills
	if n == 0 {
		return Cause{}
	}
	what := "its process was killed because its cgroup ran out of memory"
	if n > 1 {
		what = fmt.Sprintf("%d of its processes were killed because its cgroup ran out of memory", n)
	}
	limit := "no limit of its own, so the machine or a cgroup above it is out of memory; give those more, or run fewer steps at once"
	if l := f.exit.oomLimit; l > 0 {
		limit = fmt.Sprintf("the limit is %s; raise it, or make the step use less, for example with fewer parallel jobs", bytesText(l))
	}
	if peak := f.exit.usage.MemoryPeak; peak > 0 { // not of version 2 before Linux 5.19
		limit = fmt.Sprintf("it used up to %s, %s", bytesText(peak), limit)
	}
	return Cause{Kind: CauseOOM, Text: what + ": " + limit}
}

// tooMany: programs that can't start another say so in their own ways, and some
// don't.
func (f *failure) tooMany() Cause {
	fix := "raise it (kilnd --step-pids), or make the step use fewer, for example with fewer parallel jobs"
	if n := f.exit.refused; n > 0 {
		return Cause{Kind: CauseProcesses, Text: fmt.Sprintf("it was refused a further process or thread (%d times): the limit is %d at once; %s", n, f.t.p.Resources.Pids, fix)}
	}
	// Where the group that counts refusals went with the container, the most at once
	// is known of one around it.
	r := f.t.p.Resources
	if r == nil || r.Pids == 0 || f.exit.usage.PidsPeak < r.Pids {
		return Cause{}
	}
	printed := f.printed("can't fork", "annot fork", "fork: ", "esource temporarily unavailable", "EAGAIN", "unable to create thread", "annot create thread", "unable to create native thread")
	if printed == "" {
		return Cause{}
	}
	return Cause{Kind: CauseProcesses, Printed: printed, Text: fmt.Sprintf("it had as many processes and threads as the limit allows, %d at once; %s", r.Pids, fix)}
}

func bytesText(n int64) string { return units.BytesSize(float64(n)) }

// signal tells a signal that ended the process, or, if the process is a shell,
// one that ended what it ran: shells then exit with 128 and the signal's number.
func (f *failure) signal() Cause {
	sig := unix.Signal(f.exit.code - 128)
	name := unix.SignalName(sig)
	if f.exit.code <= 128 || name == "" {
		return Cause{}
	}
	if sig == unix.SIGSYS {
		return Cause{Kind: CausePolicy, Text: "killed by SIGSYS: the sandbox of steps refuses a system call that it did; " + insecureFix}
	}
	text := fmt.Sprintf("killed by %s (%s)", name, sig)
	if !f.exit.signaled {
		text = fmt.Sprintf("ended by %s (%s), as the exit code says: %q killed itself, or a program that it ran was killed", name, sig, f.t.p.Args[0])
	}
	switch sig {
	case unix.SIGKILL:
		text += "; the daemon did not do that, nor did it run out of its memory: something else on the machine or the step itself did"
	case unix.SIGSEGV, unix.SIGBUS, unix.SIGILL, unix.SIGFPE, unix.SIGABRT, unix.SIGTRAP:
		text += "; the program crashed"
	case unix.SIGXFSZ:
		text += "; it wrote more to a file than its limit fsize allows: raise that (ulimit -f)"
	case unix.SIGXCPU:
		text += "; it used more processor time than its limit cpu allows: raise that (ulimit -t)"
	case unix.SIGPIPE:
		text += "; it wrote to a pipe that nobody reads any more"
	}
	return Cause{Kind: CauseSignal, Text: text}
}

const insecureFix = "if it must be allowed, run the step with --security=insecure and allow the entitlement security.insecure in daemon and client"

// noSpace are what programs print about a full disk.
var noSpace = []string{"No space left on device", "no space left on device", "Disk quota exceeded", "ENOSPC"}

// full looks for a full file system among those that the process could write to.
func (f *failure) full() Cause {
	if len(f.stderr) == 0 {
		return Cause{}
	}
	printed := f.printed(noSpace...)
	if printed == "" {
		return Cause{}
	}
	for _, m := range append([]source{{dest: "/", fd: f.view.root}}, f.t.sources...) {
		var st unix.Statfs_t
		if m.attrs&unix.MOUNT_ATTR_RDONLY != 0 || unix.Fstatfs(m.fd, &st) != nil || st.Blocks == 0 {
			continue
		}
		free, size := int64(st.Bavail)*st.Bsize, int64(st.Blocks)*st.Bsize
		switch {
		case st.Files > 0 && st.Ffree == 0:
			return Cause{Kind: CauseDiskFull, Text: fmt.Sprintf("the file system of %s has no inodes left for another file (%d are used); remove files, or make it with more", m.dest, st.Files)}
		case free < min(nearlyFull, size/8):
			return Cause{Kind: CauseDiskFull, Text: fmt.Sprintf("of the %s of the file system of %s, %s are free; make room, or write less there", bytesText(size), m.dest, bytesText(free))}
		}
	}
	return Cause{Kind: CauseDiskFull, Printed: printed, Text: "there is room now; what it wrote was in /dev/shm or another file system that ended with it, or has been removed"}
}

// nearlyFull is how little free space makes a file system one that was full.
const nearlyFull = 4 << 20

// printed returns the last line of standard error that contains one of words.
func (f *failure) printed(words ...string) string {
	for _, line := range slices.Backward(f.stderr) {
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(line, w) }) {
			return line
		}
	}
	return ""
}

// result turns an exit into what Run returns.
func (e *executor) result(ctx context.Context, t *task, exit exit, err error) error {
	var exec *native.ExecError
	switch {
	case errors.As(err, &exec):
		code := codeNotExecutable
		if errors.Is(exec, native.ErrNotInPath) || errors.Is(exec, unix.ENOENT) {
			code = codeNotFound
		}
		return &ExitError{Code: code, Err: exec, Cause: e.diagnose(t, exit, exec)}
	case ctx.Err() != nil && (exit.killed || err != nil || exit.code > 128):
		// Also if it ended, by a signal to its whole container or as nobody took its
		// output any more, before the end of its context was seen here.
		var late *timeoutError
		if errors.As(context.Cause(ctx), &late) {
			return errors.Join(&ExitError{Code: exit.code, Cause: Cause{Kind: CauseTimeout, Text: late.text}}, err)
		}
		return errors.Join(context.Cause(ctx), err)
	case err != nil:
		return err
	}
	valid := t.p.ValidExitCodes
	if valid == nil {
		valid = []int{0}
	}
	if slices.Contains(valid, exit.code) {
		return nil
	}
	return &ExitError{Code: exit.code, Cause: e.diagnose(t, exit, nil)}
}
