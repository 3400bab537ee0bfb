//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/rootless"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// machineMounts are what root of a user namespace can't make and mounts from the
// machine instead: device nodes, and sysfs unless the container's network belongs
// to that namespace; proc if that is what processes shall see. They are detached mounts by destination, closed by undo.
// Devices that the machine doesn't have are left out of the spec. On the machine
// itself it is nil.
func (c confinement) machineMounts(t *task, undo *cleanup.Stack) (map[string]int, error) {
	if !rootless.Here().Mapped() {
		return nil, nil
	}
	mounts := map[string]int{}
	for _, name := range native.DefaultDevices() {
		if err := cloneMount(mounts, name, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, undo); err != nil {
			return nil, err
		}
	}
	var devices []specs.LinuxDevice
	for _, d := range t.spec.Linux.Devices {
		err := cloneMount(mounts, d.Path, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, undo)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	t.spec.Linux.Devices = devices
	if c.machinePIDs {
		if err := cloneMount(mounts, "/proc", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, undo); err != nil {
			return nil, err
		}
	}
	if t.netns != nil || rootless.OwnsNetwork() {
		return mounts, nil
	}
	attrs := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	for _, m := range t.spec.Mounts {
		if m.Destination == "/sys" && slices.Contains(m.Options, "ro") {
			attrs |= unix.MOUNT_ATTR_RDONLY
		}
	}
	return mounts, cloneMount(mounts, "/sys", attrs, undo)
}

func cloneMount(mounts map[string]int, name string, attrs uint64, undo *cleanup.Stack) error {
	fd, err := openTree(unix.AT_FDCWD, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone the machine's %s: %w", name, err)
	}
	undo.Add(func() error { return unix.Close(fd) })
	attr := unix.MountAttr{Attr_set: attrs, Propagation: unix.MS_PRIVATE}
	if err := mountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		return fmt.Errorf("set attributes of the machine's %s: %w", name, err)
	}
	mounts[name] = fd
	return nil
}

// explainHidden is err of starting a container, with the cause if that is what
// the machine hides from root of a user namespace.
func explainHidden(err error) error {
	step, ok := errors.AsType[*launch.StepError](err)
	if !ok || step.Errno != unix.EPERM || step.What != "/proc" && step.What != "/sys" || !rootless.Here().Mapped() {
		return err
	}
	return fmt.Errorf("%w: a part of the machine's %s is hidden from this daemon, as in a container, so that it can mount none; show it all (docker run --security-opt systempaths=unconfined)%s", err, step.What, orNoSandbox(step.What))
}

func orNoSandbox(what string) string {
	if what != "/proc" {
		return ""
	}
	return ", or have steps among the machine's processes (--oci-worker-no-process-sandbox)"
}
