//go:build linux && (amd64 || arm64)

package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/executor/launch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mapMount gives the detached mount fd the ids that m has in the container, if
// it has some of its own: those of its file system are mapped to others.
func (c *creator) mapMount(fd int, m specs.Mount, o mountOptions) error {
	uids, gids := m.UIDMappings, m.GIDMappings
	switch {
	case len(uids)+len(gids) == 0 && !o.idmap:
		return nil
	case len(uids)+len(gids) == 0: // those of the container
		uids, gids = c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings
	}
	if len(uids) == 0 || len(gids) == 0 {
		return errors.New("a mount with ids of its own needs uidMappings and gidMappings, of the mount or of the container")
	}
	users, err := newUsers(uids, gids)
	if err != nil {
		return fmt.Errorf("map ids of a mount: %w", err)
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if o.idmapRec {
		flags |= unix.AT_RECURSIVE
	}
	err = unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users.Fd())})
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("its file system can't do that with this kernel: %w", err)
	}
	if err != nil {
		err = fmt.Errorf("map ids of a mount: %w", err)
	}
	return errors.Join(err, users.Close())
}

// newUsers makes a user namespace, with a process that waits in it to be ended
// again.
func newUsers(uids, gids []specs.LinuxIDMapping) (_ *os.File, err error) {
	p := new(launch.Program)
	p.Stage("user namespace")
	p.Call("parent-death signal", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL))
	p.Call("wait", unix.SYS_PPOLL, 0, 0, 0, 0, 0)
	child, err := launch.Fork(p, unix.CLONE_NEWUSER)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, child.Signal(unix.SIGKILL))
		_, werr := child.Wait(context.Background(), 0)
		err = errors.Join(err, werr, child.Forget())
	}()
	if err := WriteMappings(child.Pid, uids, gids); err != nil {
		return nil, err
	}
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", child.Pid))
}

// WriteMappings maps the users and groups of a process's new user namespace.
func WriteMappings(pid int, uids, gids []specs.LinuxIDMapping) error {
	for file, list := range map[string][]specs.LinuxIDMapping{"uid_map": uids, "gid_map": gids} {
		if len(list) == 0 {
			continue
		}
		var b strings.Builder
		for _, m := range list {
			fmt.Fprintf(&b, "%d %d %d\n", m.ContainerID, m.HostID, m.Size)
		}
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/%s", pid, file), os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString(b.String())
			err = errors.Join(err, f.Close())
		}
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: ranges may not be empty, overlap each other or go beyond what the runtime's own user namespace has", err)
		}
		if err != nil {
			return fmt.Errorf("map users: write %s %q: %w", file, b.String(), err)
		}
	}
	return nil
}

// idmapOptions turn on what mapMount does, for the mount or also for those
// below it.
var idmapOptions = []string{"idmap", "ridmap"}

func (o *mountOptions) setIDMap(name string) bool {
	if !slices.Contains(idmapOptions, name) {
		return false
	}
	o.idmap, o.idmapRec = true, name == "ridmap"
	return true
}
