//go:build linux && (amd64 || arm64)

package native

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/executor/rootfs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountCopyUp adds a tmpfs that has what the root's directory at dest has. It is
// made and filled here, as the child can't copy.
func (c *creator) mountCopyUp(m specs.Mount, dest string, o mountOptions) error {
	if m.Type != "tmpfs" {
		return fmt.Errorf("mount option tmpcopyup: it is for file systems of type tmpfs, not %s", m.Type)
	}
	if c.covered(dest) {
		return errors.New("mount option tmpcopyup: it is for directories of the root file system, and this one is in another mount")
	}
	if c.s.CopyUp == nil {
		return errors.New("internal error: nobody copies for the mount option tmpcopyup")
	}
	options := strings.Split(strings.Join(o.data, ","), ",")
	fd, err := newTmpfs(cmp.Or(m.Source, m.Type), c.withLabel("tmpfs", options))
	if err != nil {
		return err
	}
	c.keep(fd)
	from, err := rootfs.New(c.root).OpenDir(dest)
	if err != nil {
		return err
	}
	if from >= 0 {
		if err := errors.Join(c.s.CopyUp(from, fd), unix.Close(from)); err != nil {
			return fmt.Errorf("copy %s up: %w", dest, err)
		}
	}
	o.set &^= unix.MOUNT_ATTR_RDONLY // see laterReadonly
	if err := o.setAttrs(fd); err != nil {
		return err
	}
	c.makePoint(dest, false)
	c.attach(fd, dest)
	return nil
}

// newTmpfs makes a detached tmpfs with options as mount has them in its data.
func newTmpfs(source string, options []string) (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("make tmpfs: %w", err)
	}
	defer unix.Close(fs)
	err = unix.FsconfigSetString(fs, "source", source)
	for _, option := range options {
		name, value, hasValue := strings.Cut(option, "=")
		switch {
		case err != nil || option == "":
		case hasValue:
			err = unix.FsconfigSetString(fs, name, strings.Trim(value, `"`))
		default:
			err = unix.FsconfigSetFlag(fs, name)
		}
		if err != nil {
			return -1, fmt.Errorf("make tmpfs: option %q: %w", option, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("make tmpfs: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make tmpfs: %w", err)
	}
	return fd, nil
}
