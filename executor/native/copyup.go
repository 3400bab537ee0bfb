//go:build linux && (amd64 || arm64)

package native

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
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
	limit := mostCopied(c.spec.Linux.Resources)
	fd, err := newTmpfsWithin(limit, cmp.Or(m.Source, m.Type), c.withLabel("tmpfs", options))
	if err != nil {
		return err
	}
	c.keep(fd)
	from, err := rootfs.New(c.root).OpenDir(dest)
	if err != nil {
		return err
	}
	if from >= 0 {
		err := errors.Join(c.s.CopyUp(from, fd), unix.Close(from))
		if errors.Is(err, unix.ENOSPC) && limit > 0 {
			err = fmt.Errorf("%w: the mount has room for what its options allow, at most for the memory limit of the container, %d bytes", err, limit)
		}
		if err != nil {
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

// mostCopied is how much memory what is copied may take, 0 for any. It isn't
// counted in the container's cgroup, as this process copies it: without a limit
// an image with large directories would get more than the container has.
func mostCopied(r *specs.LinuxResources) int64 {
	if r == nil || r.Memory == nil || r.Memory.Limit == nil || *r.Memory.Limit <= 0 {
		return 0
	}
	limit := *r.Memory.Limit
	switch swap := r.Memory.Swap; {
	case swap != nil && *swap < 0:
		return 0
	case swap != nil: // of both together
		limit = max(limit, *swap)
	}
	return limit
}

// inodeSize is about what a file without content takes.
const inodeSize = 1 << 10

// newTmpfsWithin is newTmpfs with room for at most limit bytes, whatever its
// options say; 0 is no limit.
func newTmpfsWithin(limit int64, source string, options []string) (int, error) {
	fd, err := newTmpfs(source, options)
	if err != nil || limit == 0 {
		return fd, err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return -1, errors.Join(fmt.Errorf("look at tmpfs: %w", err), unix.Close(fd))
	}
	inodes := max(limit/inodeSize, 1)
	size, files := int64(st.Blocks)*st.Bsize, int64(st.Files) // 0 is any
	if size > 0 && size <= limit && files > 0 && files <= inodes {
		return fd, nil
	}
	if size == 0 || size > limit {
		options = append(slices.Clone(options), fmt.Sprintf("size=%d", limit))
	}
	if files == 0 || files > inodes {
		options = append(slices.Clone(options), fmt.Sprintf("nr_inodes=%d", inodes))
	}
	if err := unix.Close(fd); err != nil {
		return -1, err
	}
	return newTmpfs(source, options)
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
