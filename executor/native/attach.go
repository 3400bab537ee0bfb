//go:build linux && (amd64 || arm64)

package native

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/executor/rootfs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

type processSpec = specs.Process

// openTree clones the mount at a path of the machine, for the child to attach.
// Unless the container's mounts are to be shared with the machine's, what is
// mounted below the clone stays the container's own.
func (c *creator) openTree(source string, recursive bool, o mountOptions) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	all := uint(0)
	if recursive {
		flags |= unix.AT_RECURSIVE
		all = unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
	if err != nil {
		return -1, fmt.Errorf("clone mount of %s: %w", source, err)
	}
	c.keep(fd)
	if !slices.Contains([]string{"shared", "rshared"}, c.spec.Linux.RootfsPropagation) {
		attr := unix.MountAttr{Propagation: unix.MS_SLAVE}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|all, &attr); err != nil {
			return -1, fmt.Errorf("set propagation of %s: %w", source, err)
		}
	}
	if err := o.setAttrs(fd); err != nil {
		return -1, fmt.Errorf("mount of %s: %w", source, err)
	}
	return fd, nil
}

// mounts adds all mounts of the spec, in its order.
func (c *creator) mounts() error {
	if err := c.checkMountLabel(); err != nil {
		return err
	}
	for _, m := range c.spec.Mounts {
		if err := c.mountOne(m); err != nil {
			return fmt.Errorf("%s: %w", m.Destination, err)
		}
	}
	return nil
}

func (c *creator) mountOne(m specs.Mount) error {
	o, err := parseMountOptions(m.Type, m.Options)
	if err != nil {
		return err
	}
	dest, err := c.place(m.Destination)
	if err != nil {
		return err
	}
	switch {
	case (m.Type == "proc" || m.Type == "sysfs") && dest != path.Join("/", m.Destination):
		return fmt.Errorf("the root has a symbolic link there, to %s, where nothing of %s would be masked; it must be a directory or missing", dest, m.Type)
	case dest == "/" && !o.bind:
		return errors.New("it is the root itself")
	case rootfs.InProc(dest):
		return errors.New("nothing can be mounted below /proc")
	}
	switch {
	case !o.bind && (o.idmap || len(m.UIDMappings)+len(m.GIDMappings) > 0):
		return errors.New("uidMappings of a mount: they are for binds")
	case o.bind:
		err = c.mountBind(m, dest, o)
	case o.copyUp:
		// What is in it is what the root has there.
		return c.mountCopyUp(m, dest, o)
	case m.Type == "cgroup" || m.Type == "cgroup2":
		c.makePoint(dest, false)
		err = c.mountOwnCgroups(dest, o)
	default:
		c.makePoint(dest, false)
		if m.Type == "tmpfs" {
			if laterReadonly(m, o) {
				o.flags &^= unix.MS_RDONLY
			}
			if o, err = c.withMode(o, dest); err != nil {
				return err
			}
		}
		source, data := cmp.Or(m.Source, m.Type), strings.Join(c.withLabel(m.Type, o.data), ",")
		what := fmt.Sprintf("%s (%s)", dest, strings.TrimSpace(m.Type+" "+data))
		c.Call(what, unix.SYS_MOUNT, c.String(source), c.String(dest), c.String(m.Type), o.flags, c.String(data))
		c.labelMade(m, dest)
	}
	c.done = append(c.done, dest)
	for _, p := range o.propagation {
		c.Call(dest+" propagation", unix.SYS_MOUNT, 0, c.String(dest), 0, p, 0)
	}
	return err
}

// withMode gives a tmpfs the mode of the root's directory that it covers, unless
// the options have one: what was private before stays so.
func (c *creator) withMode(o mountOptions, dest string) (mountOptions, error) {
	if c.covered(dest) || slices.ContainsFunc(o.data, func(s string) bool { return strings.HasPrefix(s, "mode=") }) {
		return o, nil
	}
	mode, err := rootfs.New(c.root).Mode(dest)
	if err != nil || mode == 0 {
		return o, err
	}
	o.data = append(slices.Clone(o.data), fmt.Sprintf("mode=%o", mode))
	return o, nil
}

// covered says whether dest is in one of the mounts made so far that show
// something else than the root does.
func (c *creator) covered(dest string) bool {
	return slices.ContainsFunc(c.done, func(m string) bool { return m == dest || strings.HasPrefix(dest, m+"/") })
}

// place is where name leads in the container. In what is mounted already, the
// links of the root are none.
func (c *creator) place(name string) (string, error) {
	resolved, _, err := rootfs.New(c.root).ResolveBeside(path.Join("/", name), c.done)
	return resolved, err
}

// laterReadonly: mounts and devices are still made in a tmpfs.
func laterReadonly(m specs.Mount, o mountOptions) bool {
	return m.Type == "tmpfs" && !o.bind && o.flags&unix.MS_RDONLY != 0
}

func (c *creator) mountBind(m specs.Mount, dest string, o mountOptions) error {
	source := m.Source
	if !filepath.IsAbs(source) {
		source = filepath.Join(c.s.Bundle, source)
	}
	fd, err := c.openTree(source, o.rec, o)
	if err != nil {
		return err
	}
	if err := c.mapMount(fd, m, o); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", source, err)
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if err := c.checkPoint(dest, isDir); err != nil {
		return fmt.Errorf("mount of %s: %w", source, err)
	}
	c.makePoint(dest, !isDir)
	c.attach(fd, dest)
	return nil
}

// checkPoint fails if the root has a file where a directory is to be mounted, or
// the other way round.
func (c *creator) checkPoint(dest string, isDir bool) error {
	if c.covered(dest) {
		return nil
	}
	st, err := rootfs.New(c.root).Stat(dest)
	switch pointIsDir := st.Mode&unix.S_IFMT == unix.S_IFDIR; {
	case err != nil: // it is made, or making it fails
	case isDir && !pointIsDir:
		return fmt.Errorf("it is a directory, and %s in the container is a file", dest)
	case !isDir && pointIsDir:
		return fmt.Errorf("it is a file, and %s in the container is a directory", dest)
	}
	return nil
}

// makePoint makes what a mount goes to, unless it is there.
func (c *creator) makePoint(dest string, file bool) {
	for _, dir := range parents("/", dest) {
		c.mkdirInside(dir)
	}
	switch {
	case dest == "/":
	case !file:
		c.mkdirInside(dest)
	default:
		how := unix.OpenHow{Flags: unix.O_CREAT | unix.O_EXCL | unix.O_RDONLY | unix.O_CLOEXEC, Mode: 0o755}
		c.openInside(dest, how).Tolerate(unix.EEXIST, unix.EROFS)
	}
}

// mkdirInside makes a directory below the root. The root isn't the only one yet:
// files of the machine are open in the child, and links in what is already
// mounted could lead to them through /proc/self/fd.
func (c *creator) mkdirInside(dir string) {
	c.inDir(path.Dir(dir), dir, unix.SYS_MKDIRAT, 0, c.String(path.Base(dir)), 0o755).Tolerate(unix.EEXIST, unix.EROFS)
}

func (c *creator) openInside(name string, how unix.OpenHow) launch.Step {
	words := c.Words(uintptr(how.Flags), uintptr(how.Mode), unix.RESOLVE_NO_MAGICLINKS)
	return c.Call(name, unix.SYS_OPENAT2, atCWD, c.String(name), words, unsafe.Sizeof(how))
}

// mountOwnCgroups shows the container its own groups.
func (c *creator) mountOwnCgroups(dest string, o mountOptions) error {
	if c.s.Cgroups == nil {
		c.Call(dest, unix.SYS_MOUNT, c.String("cgroup"), c.String(dest), c.String("cgroup2"), o.flags, c.String(""))
		return nil
	}
	data := strings.Join(c.withLabel("tmpfs", []string{"mode=755"}), ",")
	c.Call(dest, unix.SYS_MOUNT, c.String("tmpfs"), c.String(dest), c.String("tmpfs"), o.flags&^unix.MS_RDONLY, c.String(data))
	o.set |= unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	for _, name := range slices.Sorted(maps.Keys(c.s.Cgroups)) {
		fd, err := c.openTree(c.s.Cgroups[name], false, o)
		if err != nil {
			return err
		}
		at := path.Join(dest, name)
		c.mkdir(at)
		c.attach(fd, at)
		c.linkControllers(dest, name)
	}
	if o.flags&unix.MS_RDONLY != 0 {
		c.setReadonly(dest)
	}
	return nil
}

// devices fills /dev, unless it is one of the machine's.
func (c *creator) devices() error {
	for _, m := range c.spec.Mounts {
		if o, err := parseMountOptions(m.Type, m.Options); err == nil && o.bind && path.Clean(m.Destination) == "/dev" {
			return nil
		}
	}
	c.mkdir("/dev")
	list := slices.Clone(c.spec.Linux.Devices)
	for _, d := range list {
		if err := c.checkNode(d); err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	for _, n := range defaultNodes {
		if name := "/dev/" + n.name; !slices.ContainsFunc(list, func(d specs.LinuxDevice) bool { return d.Path == name }) {
			list = append(list, specs.LinuxDevice{Path: name, Type: "c", Major: int64(n.major), Minor: int64(n.minor)})
		}
	}
	for _, d := range list {
		if err := c.device(d); err != nil {
			return err
		}
	}
	c.Call("/dev/ptmx", unix.SYS_UNLINKAT, atCWD, c.String("/dev/ptmx"), 0).Tolerate(unix.ENOENT)
	c.deviceLinks()
	if c.s.Terminal.Socket != nil {
		return nil
	}
	null, err := c.nullPath()
	if err != nil {
		return err
	}
	for i, f := range c.s.Stdio {
		if isNull(int(f.Fd())) {
			c.openNull(null, unix.O_RDWR).Into(c.Call("stdio", unix.SYS_DUP3, 0, uintptr(i), 0), 0)
		}
	}
	return nil
}

// nullPath is where the container's /dev/null is.
func (c *creator) nullPath() (string, error) {
	dir, err := c.place("/dev")
	if err != nil {
		return "", fmt.Errorf("/dev: %w", err)
	}
	return path.Join(dir, "null"), nil
}

// openNull opens the container's null device. A link there may come from an image
// or a volume, and lead to what is about to be masked or made read-only.
func (c *creator) openNull(name string, flags uint64) launch.Step {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
	return c.Call(name, unix.SYS_OPENAT2, atCWD, c.String(name), c.Words(uintptr(how.Flags), uintptr(how.Mode), uintptr(how.Resolve)), unsafe.Sizeof(how))
}

var deviceTypes = map[string]uintptr{"c": unix.S_IFCHR, "u": unix.S_IFCHR, "b": unix.S_IFBLK, "p": unix.S_IFIFO}

func (c *creator) device(d specs.LinuxDevice) error {
	kind, ok := deviceTypes[d.Type]
	if !ok {
		return fmt.Errorf("device %s: type %q is none of c, u, b and p", d.Path, d.Type)
	}
	if !path.IsAbs(d.Path) {
		return fmt.Errorf("device %s: its path must be absolute", d.Path)
	}
	dir, err := c.place(path.Dir(d.Path))
	if err != nil {
		return fmt.Errorf("device %s: %w", d.Path, err)
	}
	name := path.Join(dir, path.Base(d.Path))
	if c.mapped {
		// Root of a user namespace can't make nodes, but bind the machine's.
		fd, err := c.openTree(d.Path, false, mountOptions{})
		if err != nil {
			return err
		}
		c.makePoint(name, true)
		c.attach(fd, name)
		return nil
	}
	for _, dir := range parents("/", name) {
		c.mkdirInside(dir)
	}
	mode := kind | 0o666
	if d.FileMode != nil {
		mode = kind | uintptr(d.FileMode.Perm())
	}
	base := c.String(path.Base(name))
	c.inDir(dir, name, unix.SYS_MKNODAT, 0, base, mode, uintptr(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))).Tolerate(unix.EEXIST)
	if d.UID != nil || d.GID != nil {
		c.inDir(dir, name, unix.SYS_FCHOWNAT, 0, base, id(d.UID), id(d.GID), unix.AT_SYMLINK_NOFOLLOW)
	}
	return nil
}

// inDir adds a call whose first argument becomes the open directory dir.
func (c *creator) inDir(dir, what string, nr uintptr, args ...uintptr) launch.Step {
	parent := c.openInside(dir, unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC})
	call := c.Call(what, nr, args...)
	parent.Into(call, 0)
	return call
}

// checkNode fails if the root has something else than the device at its path.
func (c *creator) checkNode(d specs.LinuxDevice) error {
	name, err := c.place(path.Dir(d.Path))
	if err != nil {
		return err
	}
	name = path.Join(name, path.Base(d.Path))
	if c.covered(name) {
		return nil
	}
	st, err := rootfs.New(c.root).Stat(name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return err
	case uintptr(st.Mode&unix.S_IFMT) != deviceTypes[d.Type], d.Type != "p" && st.Rdev != unix.Mkdev(uint32(d.Major), uint32(d.Minor)):
		return errors.New("the root file system has something else there; remove that, or mount something over its directory")
	}
	return nil
}

func id(n *uint32) uintptr {
	if n == nil {
		return 0
	}
	return uintptr(*n)
}
