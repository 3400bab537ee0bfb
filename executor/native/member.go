//go:build linux && (amd64 || arm64)

package native

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/executor/launch"
	"golang.org/x/sys/unix"
)

// member adds what a container's first process and those that enter it later
// have in common.
type member struct {
	builder
	s            *Setup
	ours, theirs int    // ends of the socket pair by which they wait for each other
	streams      [3]int // the child\'s Stdio; -1 is the container\'s /dev/null
}

func newMember(s *Setup) member {
	return member{builder: builder{Program: new(launch.Program), spec: s.Spec, seccomp: s.Filter, inherit: s.Preserve, path: s.Program}, s: s}
}

// start builds and forks the child.
func (m *member) start(build func() error, namespaces uint64) (_ *Child, err error) {
	defer func() { err = errors.Join(err, m.fds.Run()) }()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair: %w", err)
	}
	m.ours, m.theirs = pair[0], m.keep(pair[1])
	ours := os.NewFile(uintptr(m.ours), "child's gate")
	err = m.reserveTerminal(m.s.Terminal, m.theirs)
	if err == nil {
		err = build()
	}
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	forked, err := launch.Fork(m.Program, namespaces)
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	return &Child{Forked: forked, gate: ours, process: m.spec.Process}, nil
}

// keep has fd closed when the child has its copy.
func (b *builder) keep(fd int) int {
	b.fds.Add(func() error { return unix.Close(fd) })
	return fd
}

// reserve returns a number that the child can use for a file of its own,
// because nothing that it needs has it. open is any file that is open.
func (b *builder) reserve(open int) (int, error) {
	fd, err := unix.FcntlInt(uintptr(open), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("reserve a file descriptor: %w", err)
	}
	return b.keep(fd), nil
}

func (m *member) tell() {
	m.Call("tell parent", unix.SYS_WRITE, uintptr(m.theirs), m.Bytes([]byte{1}), 1)
}

func (m *member) wait() {
	m.Call("wait for parent", unix.SYS_READ, uintptr(m.theirs), m.Bytes(make([]byte, 1)), 1)
}

// begin is what comes before the first gate.
func (m *member) begin() error {
	m.dieWithParent()
	m.hide(true)
	m.freshSession()
	if m.s.Terminal.Socket != nil {
		return nil
	}
	for i, f := range m.s.Stdio {
		if f == nil {
			m.streams[i] = -1
			continue
		}
		// Above the numbers that are about to be replaced.
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return fmt.Errorf("copy file descriptor of %s: %w", f.Name(), err)
		}
		m.streams[i] = m.keep(fd)
	}
	m.stdio(m.streams)
	return nil
}

// keyring joins the container's session keyring, which belongs to its user
// namespace. Processes that enter later find it by its name, for which it has to
// be open to searches of its owner.
func (m *member) keyring() error {
	if m.s.Keyring == "" {
		return nil
	}
	const open = 0x3f1b0000 // all to who possesses it; view, read, search and link to its owner
	permit := m.joinKeyring(m.String(m.s.Keyring))
	permit.Into(m.Call("keyring", unix.SYS_KEYCTL, unix.KEYCTL_SETPERM, 0, open).Tolerate(unix.ENOSYS, unix.EPERM, unix.EACCES, unix.EINVAL), 1)
	return nil
}

// dieWithParent ends the child if the thread that made it ends. A change of
// user clears it.
func (m *member) dieWithParent() {
	m.Call("parent-death signal", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL))
}

// hide keeps other processes of the container from reading this one's memory
// and files, which are those of the runtime until it executes its program.
func (m *member) hide(on bool) {
	dumpable := uintptr(1)
	if on {
		dumpable = 0
	}
	m.Call("dumpable", unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, dumpable)
}

// writeFile adds the steps that write value to a file.
func (b *builder) writeFile(what, file, value string) {
	open := b.Call(what, unix.SYS_OPENAT, atCWD, b.String(file), unix.O_WRONLY|unix.O_CLOEXEC)
	open.Into(b.Call(what, unix.SYS_WRITE, 0, b.Bytes([]byte(value)), uintptr(len(value))), 0)
}

// closeOthers closes every file but those that are still needed, none of which
// is a directory: a working directory below /proc/self/fd must not lead to the
// machine's files.
func (m *member) closeOthers() {
	needed := []int{m.theirs}
	if m.s.Gate != nil {
		needed = append(needed, int(m.s.Gate.Fd()))
	}
	m.closeBut(3+m.s.Preserve, needed...)
}

// process is what makes the child the spec's process.
func (m *member) process() []stage {
	return []stage{
		{stageExec, m.find},
		{"umask", m.umask},
		{"limits", m.limits},
		{"scheduler", m.schedule},
		{"seccomp", m.filterUnlessNoNewPrivileges},
		{"user", m.user},
	}
}

// execution comes after the last gate.
func (m *member) execution() []stage {
	return []stage{{"seccomp", m.filterIfNoNewPrivileges}, {stageExec, m.exec}}
}

func (m *member) umask() error {
	if mask := m.spec.Process.User.Umask; mask != nil {
		m.Call("umask", unix.SYS_UMASK, uintptr(*mask))
	}
	if p := m.spec.Linux.Personality; p != nil {
		const linux32 = 8
		domain := uintptr(0)
		if p.Domain == "LINUX32" {
			domain = linux32
		}
		m.Call("personality", unix.SYS_PERSONALITY, domain)
	}
	return nil
}

// find fails unless the program is there, so that a container that can't run
// isn't created.
func (m *member) find() error {
	const notThere = 99 // no system call; see notFoundStage
	program := m.program()
	access := func(file string) launch.Step {
		return m.Call(file, unix.SYS_FACCESSAT2, atCWD, m.String(file), unix.X_OK, unix.AT_EACCESS)
	}
	if strings.Contains(program, "/") {
		const directory = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
		m.Call(program, unix.SYS_OPENAT, atCWD, m.String(program), directory).Tolerate(unix.ENOTDIR, unix.ENOENT, unix.EACCES).Skip(1)
		access(program).Skip(1)
		m.Call(program, unix.SYS_EXECVE, m.String(program), m.Strings(nil), m.Strings(nil)) // to fail as that does
		return nil
	}
	dirs := strings.Split(getenv(m.spec.Process.Env, "PATH"), ":")
	for i, dir := range dirs {
		access(path.Join(dir, program)).Tolerate(unix.ENOENT, unix.EACCES, unix.ENOTDIR).Skip(len(dirs) - i)
	}
	m.Stage(notFoundStage)
	m.Call(program, ^uintptr(0)-notThere)
	m.Stage(stageExec)
	return nil
}

// notFoundStage has a step that always fails, reached if no directory in PATH
// has the program.
const notFoundStage = "not found"

// ready lets go of the parent and waits for being started.
func (m *member) ready() error {
	m.Call("outlive the parent", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, 0)
	m.tell()
	m.Call("wait for start", unix.SYS_READ, m.s.Gate.Fd(), m.Bytes(make([]byte, 1)), 1)
	return nil
}

// Child is a process on its way to its program.
type Child struct {
	*launch.Forked
	gate    *os.File
	process *processSpec
}

// Continue lets the child go on from the gate it waits at.
func (c *Child) Continue() error {
	if _, err := c.gate.Write([]byte{1}); err != nil {
		return errors.Join(fmt.Errorf("tell process %d to go on: %w", c.Pid, err), c.Failure())
	}
	return nil
}

// Await returns when the child has reached its next gate. done means that
// there was none left: it executed its program. What the child failed at is
// the error; it has ended, then, and must be waited for.
func (c *Child) Await() (done bool, err error) {
	var b [1]byte
	n, rerr := c.gate.Read(b[:])
	if n == 1 {
		return false, nil
	}
	if err := c.Failure(); err != nil {
		return false, err
	}
	if !errors.Is(rerr, io.EOF) {
		return false, fmt.Errorf("wait for process %d: %w", c.Pid, rerr)
	}
	return true, nil
}

// Execute lets the child go on from its last gate and returns when it has
// executed its program. When ctx ends before that, the child is killed; it must
// be waited for after an error.
func (c *Child) Execute(ctx context.Context) error {
	if err := c.Continue(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.Signal(unix.SIGKILL) }) //nolint:errcheck // it is waited for in any case
	defer stop()
	executed, err := c.Await()
	switch {
	case err != nil:
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !executed:
		return fmt.Errorf("internal error: process %d waits at a gate that nobody knows", c.Pid)
	}
	return nil
}

// Failure says what the child failed at, if it did.
func (c *Child) Failure() error {
	err := c.Err()
	if err == nil {
		return nil
	}
	var step *launch.StepError
	if errors.As(err, &step) && step.Stage == notFoundStage {
		return execError(c.process, notFound(c.Results(stageExec)))
	}
	return setUpError(err, c.process, c.Results)
}

// Leave lets go of its gates. It can still be asked for its Failure.
func (c *Child) Leave() error { return c.gate.Close() }

// Detach lets go of what is for the set-up; the process stays.
func (c *Child) Detach() error { return errors.Join(c.gate.Close(), c.Forget()) }
