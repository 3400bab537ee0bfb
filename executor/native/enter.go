//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Target is a running container's first process.
type Target struct {
	Pid   int
	PidFD *os.File
}

// joinable are the namespaces that a process enters, by their file in /proc.
// A PID namespace is entered by the thread that forks.
var joinable = map[string]int{
	"user": unix.CLONE_NEWUSER, "mnt": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS,
	"cgroup": unix.CLONE_NEWCGROUP, "time": unix.CLONE_NEWTIME,
}

// Enter starts a further process in a container, on the calling thread, which
// must not be used for anything else afterwards: it makes children in the
// container's PID namespace. s.Spec is the container's with another process.
// The child waits at its first gate, to be put into cgroups, and executes its
// program after it.
func Enter(s *Setup, t Target) (*Child, error) {
	var flags int
	for name, flag := range joinable {
		differs, err := elsewhere(t.Pid, name)
		if err != nil {
			return nil, err
		}
		if differs {
			flags |= flag
		}
	}
	differs, err := elsewhere(t.Pid, "pid")
	if err != nil {
		return nil, err
	}
	if differs {
		if err := unix.Setns(int(t.PidFD.Fd()), unix.CLONE_NEWPID); err != nil {
			return nil, fmt.Errorf("enter PID namespace of process %d: %w", t.Pid, err)
		}
	}
	e := &entrant{member: newMember(s), target: t, flags: flags}
	return e.start(e.build, 0)
}

// elsewhere says whether a process is in another namespace than this thread. A kernel
// without namespaces of that kind has one for all.
func elsewhere(pid int, name string) (bool, error) {
	var theirs, ours unix.Stat_t
	err := unix.Stat("/proc/thread-self/ns/"+name, &ours)
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at own %s namespace: %w", name, err)
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, name), &theirs); err != nil {
		return false, fmt.Errorf("look at %s namespace of process %d: %w", name, pid, err)
	}
	return theirs.Ino != ours.Ino || theirs.Dev != ours.Dev, nil
}

// entrant adds the steps of a further process.
type entrant struct {
	member
	target Target
	flags  int
}

func (e *entrant) build() error {
	var cpus specs.CPUAffinity
	if a := e.spec.Process.ExecCPUAffinity; a != nil {
		cpus = *a
	}
	steps := []stage{
		{"session", e.begin},
		{"affinity", func() error { return e.affinity("process.execCPUAffinity.initial", cpus.Initial) }},
		{"namespace", e.enter},
		{"keyring", e.keyring},
		{"terminal", func() error { return e.terminal(e.s.Terminal, false) }},
		{"cwd", e.cwd},
		{"affinity", func() error { return e.affinity("process.execCPUAffinity.final", cpus.Final) }},
	}
	return e.add(slices.Concat(steps, e.process(), []stage{{"ready", e.outlive}}, e.execution()))
}

func (e *entrant) enter() error {
	e.wait()
	if err := e.label(); err != nil {
		return err
	}
	if e.flags != 0 {
		e.Call(fmt.Sprintf("of process %d", e.target.Pid), unix.SYS_SETNS, e.target.PidFD.Fd(), uintptr(e.flags))
	}
	if e.flags&unix.CLONE_NEWUSER != 0 {
		e.rootOfUsers()
		e.dieWithParent()
		e.hide(true)
	}
	// From here on paths are followed that the container's processes can change.
	e.closeBut(3+e.s.Preserve, append(e.terminalFiles(e.s.Terminal), e.theirs)...)
	e.ownNull(e.streams)
	return nil
}

// cwd must be there already.
func (e *entrant) cwd() error {
	e.closeOthers()
	return e.enterCwd()
}

func (e *entrant) outlive() error {
	e.Call("outlive the parent", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, 0)
	return nil
}

// Joins opens the namespaces of other processes that a spec names and that a
// thread can enter, and the flag each is joined with. The caller closes them.
func Joins(s *specs.Spec) (files []*os.File, flags []int, err error) {
	for _, ns := range s.Linux.Namespaces {
		flag, known := cloneFlags[ns.Type]
		if !known {
			err = fmt.Errorf("namespace %q is not one that this runtime knows", ns.Type)
		}
		// The child joins the others itself.
		if err == nil && ns.Path != "" && ns.Type != specs.UserNamespace && ns.Type != specs.MountNamespace {
			var f *os.File
			if f, err = openNamespace(ns.Type, ns.Path); err == nil {
				files, flags = append(files, f), append(flags, int(flag))
			}
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, nil, err
		}
	}
	return files, flags, nil
}

// openNamespace opens a namespace of a kind that is to be joined.
func openNamespace(kind specs.LinuxNamespaceType, name string) (*os.File, error) {
	failed := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("join %s namespace %s: %w", kind, name, err)
	}
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed(err)
	}
	f := os.NewFile(uintptr(fd), name)
	switch is, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); {
	case err != nil:
		return failed(errors.Join(errors.New("it is no namespace"), f.Close()))
	case uint64(is) != cloneFlags[kind]:
		return failed(errors.Join(errors.New("it is a namespace of another kind"), f.Close()))
	}
	return f, nil
}

// openJoined opens the namespace of a kind that the spec has the container
// join, until the child has its copy. It returns -1 if the spec names none, or
// the one that this process is in.
func (m *member) openJoined(kind specs.LinuxNamespaceType) (int, error) {
	i := slices.IndexFunc(m.spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == kind && ns.Path != "" })
	if i < 0 {
		return -1, nil
	}
	theirs := m.spec.Linux.Namespaces[i].Path
	f, err := openNamespace(kind, theirs)
	if err != nil {
		return -1, err
	}
	m.fds.Add(f.Close)
	fd := int(f.Fd())
	ours := "/proc/self/ns/" + map[specs.LinuxNamespaceType]string{specs.UserNamespace: "user", specs.MountNamespace: "mnt"}[kind]
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &a), unix.Stat(ours, &b)); err != nil {
		return -1, fmt.Errorf("join %s namespace %s: %w", kind, theirs, err)
	}
	if a.Dev == b.Dev && a.Ino == b.Ino {
		return -1, nil
	}
	return fd, nil
}
