//go:build linux

package rootless

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// stateEnv tells the program, executed again, what is left to do.
const stateEnv = "_KILN_ROOTLESS"

// HoldCommand is the first argument with which this program is to call Hold.
const HoldCommand = "hold-namespace"

// Enter returns in a process that is root: of the machine, or of a user
// namespace that it can mount in. In the process of an ordinary user it makes a
// namespace and executes the program once more, with the same arguments, so it
// has to come before everything that can't be done twice.
//
// The namespaces of a process of an earlier run are used again if one is left:
// from others it and its files could not be reached.
func Enter(earlier ...int) error {
	if state, ok := os.LookupEnv(stateEnv); ok {
		return finish(state)
	}
	if os.Geteuid() == 0 {
		if !Here().Mapped() {
			return nil
		}
		return checkMount()
	}
	if err := enter(earlier); err != nil {
		return fmt.Errorf("run without root (user %d): %w", os.Geteuid(), err)
	}
	return nil
}

// enter returns only errors.
func enter(earlier []int) error {
	who, err := whoAmI()
	if err != nil {
		return err
	}
	uids, err := subIDs("/etc/subuid", who.Username, os.Geteuid())
	if err != nil {
		return err
	}
	gids, err := subIDs("/etc/subgid", who.Username, os.Geteuid())
	if err != nil {
		return err
	}
	programs := map[string]string{}
	for name, pkg := range map[string]string{"newuidmap": "uidmap", "newgidmap": "uidmap", "nsenter": "util-linux"} {
		if programs[name], err = exec.LookPath(name); err != nil {
			return fmt.Errorf("the program %s is needed and not in PATH: install Debian's package %s, or what has it elsewhere", name, pkg)
		}
	}
	for _, pid := range earlier {
		// An error is that it has just ended.
		if err := (&holder{pid: pid}).become(programs["nsenter"], who.Username); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	h, err := hold()
	if err != nil {
		return err
	}
	defer h.end()
	if err := h.mapIDs(programs["newuidmap"], mapArgs(h.pid, os.Geteuid(), uids)); err != nil {
		return err
	}
	if err := h.mapIDs(programs["newgidmap"], mapArgs(h.pid, os.Getegid(), gids)); err != nil {
		return err
	}
	return h.become(programs["nsenter"], who.Username)
}

func whoAmI() (*user.User, error) {
	who, err := user.LookupId(strconv.Itoa(os.Geteuid()))
	if err != nil {
		return nil, fmt.Errorf("newuidmap needs the user to have a name: %w", err)
	}
	return who, nil
}

// holder is a process that keeps new namespaces alive until others are in them.
type holder struct {
	pid  int
	cmd  *exec.Cmd // nil for one that isn't this process's
	stop io.Closer
}

func hold() (*holder, error) {
	h := &holder{cmd: exec.Command("/proc/self/exe", HoldCommand)}
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}
	var err error
	if h.stop, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("make a user namespace: %w%s", err, forbidden("/proc/sys"))
	}
	h.pid = h.cmd.Process.Pid
	return h, nil
}

// Hold is what the program does in new namespaces: wait to be told to end.
func Hold() { io.Copy(io.Discard, os.Stdin) } //nolint:errcheck // either end of it is the end

func (h *holder) end() {
	if h.cmd == nil {
		return
	}
	h.stop.Close()
	h.cmd.Wait() //nolint:errcheck // it is of no use any more
}

func (h *holder) mapIDs(program string, args []string) error {
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// become has this process execute its program in the holder's namespaces. It
// returns only errors.
func (h *holder) become(nsenter, name string) error {
	dir, err := os.Getwd()
	if err != nil {
		dir = "/" // it is gone, and nothing can be meant relative to it
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fds := map[string]int{}
	for _, kind := range []string{"user", "mnt"} {
		// Not closed on execve: nsenter reads them after the holder's end.
		if fds[kind], err = unix.Open(fmt.Sprintf("/proc/%d/ns/%s", h.pid, kind), unix.O_RDONLY, 0); err != nil {
			return fmt.Errorf("open the %s namespace of process %d: %w", kind, h.pid, err)
		}
		defer unix.Close(fds[kind])
	}
	h.end()
	args := []string{
		nsenter, fmt.Sprintf("--user=/proc/self/fd/%d", fds["user"]), fmt.Sprintf("--mount=/proc/self/fd/%d", fds["mnt"]), "--", self,
	}
	env := append(os.Environ(), fmt.Sprintf("%s=%d:%d:%s", stateEnv, fds["user"], fds["mnt"], dir))
	if os.Getenv("USER") == "" {
		env = append(env, "USER="+name) // by which defaults are a user's
	}
	return fmt.Errorf("execute %s: %w", nsenter, unix.Exec(nsenter, append(args, os.Args[1:]...), env))
}

// finish does what is left to do in the namespace.
func finish(state string) error {
	if err := os.Unsetenv(stateEnv); err != nil {
		return err
	}
	f := strings.SplitN(state, ":", 3)
	if len(f) != 3 {
		return fmt.Errorf("environment variable %s is %q: it is set by kilnd alone", stateEnv, state)
	}
	for _, text := range f[:2] {
		fd, err := strconv.Atoi(text)
		if err != nil || fd < 3 {
			return fmt.Errorf("environment variable %s is %q: it is set by kilnd alone", stateEnv, state)
		}
		unix.Close(fd) //nolint:errcheck // nothing was written
	}
	// Where the user may not be, such as in root's home, it stays in the top one.
	if err := os.Chdir(f[2]); err != nil && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("return to the working directory: %w", err)
	}
	if os.Geteuid() != 0 || !Here().Mapped() {
		return errors.New("internal error: not root of a user namespace of its own")
	}
	return checkMount()
}

// checkMount fails where this process can't mount: it changes what holds
// already, that mounts here don't appear outside.
func checkMount() error {
	err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, "")
	if err == nil {
		return nil
	}
	return fmt.Errorf("root of a user namespace that has no mounts of its own, or may not mount: %w%s; "+
		"start kilnd as the ordinary user that you are, or by rootlesskit", err, forbidden("/proc/sys"))
}

// forbidden names settings of the machine that forbid user namespaces.
func forbidden(sysctls string) string {
	var hints []string
	for _, s := range []struct{ file, value, hint string }{
		{"user/max_user_namespaces", "0", "it is 0, so there are none; as root: sysctl user.max_user_namespaces=10000"},
		{"kernel/unprivileged_userns_clone", "0", "it is 0, which forbids them to users; as root: sysctl kernel.unprivileged_userns_clone=1"},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "it is 1, so AppArmor restricts them; as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0, or give kilnd a profile that has userns"},
	} {
		data, err := os.ReadFile(sysctls + "/" + s.file)
		if err == nil && strings.TrimSpace(string(data)) == s.value {
			hints = append(hints, fmt.Sprintf("; %s: %s", strings.ReplaceAll(s.file, "/", "."), s.hint))
		}
	}
	return strings.Join(hints, "")
}

// OwnsNetwork says whether the network that this process is in belongs to its
// user namespace, so that links and addresses in it can be changed and its sysfs
// mounted.
func OwnsNetwork() bool {
	if !Here().Mapped() {
		return true
	}
	net, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(net)
	// One of a namespace above isn't shown.
	owner, err := unix.IoctlRetInt(net, unix.NS_GET_USERNS)
	if err != nil {
		return false
	}
	unix.Close(owner) //nolint:errcheck // nothing was written
	return true
}
