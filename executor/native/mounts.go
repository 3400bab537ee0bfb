//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/kilnbuild/kiln/executor/launch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountFlags are the options that are flags; all others are data for the file
// system.
var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "rw": 0, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"strictatime": unix.MS_STRICTATIME, "noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME,
}

// mounts adds everything in the spec but binds: the standard mounts.
func (b *builder) mounts() error {
	for _, m := range b.spec.Mounts {
		switch m.Type {
		case "bind":
			continue
		case "cgroup":
			b.mountCgroups(m)
			continue
		}
		if path.Dir(m.Destination) != "/" {
			b.mkdir(m.Destination)
		}
		if fd, ok := b.c.Machine[m.Destination]; ok {
			b.attach(fd, m.Destination)
			continue
		}
		if b.c.Machine != nil && visibleOnly(m) {
			continue // mountWhileVisible has
		}
		b.mountAt(m, m.Destination)
		if m.Destination == "/dev" {
			b.devices()
			b.ownNull(b.c.Stdio)
		}
	}
	return nil
}

// nameMounts asks for the name of the mount namespace: of a process that has
// ended nobody can ask.
func (b *builder) nameMounts() error {
	if b.c.MountsName == nil {
		return nil
	}
	const own = "/proc/self/ns/mnt"
	room, at := b.Room(64)
	b.mountsName = room
	b.Call(own, unix.SYS_READLINKAT, atCWD, b.String(own), at, uintptr(len(room)))
	return nil
}

func (b *builder) mount(fstype, source, dest string, options []string) {
	b.mountAt(specs.Mount{Type: fstype, Source: source, Destination: dest, Options: options}, dest)
}

// mountAt mounts m at a path that is its destination now.
func (b *builder) mountAt(m specs.Mount, at string) {
	var flags uintptr
	var data []string
	for _, o := range m.Options {
		if f, ok := mountFlags[o]; ok {
			flags |= f
		} else {
			data = append(data, o)
		}
	}
	b.Call(m.Destination, unix.SYS_MOUNT, b.String(m.Source), b.String(at), b.String(m.Type), flags, b.String(strings.Join(data, ",")))
}

func (b *builder) mkdir(dir string) {
	// A read-only file system may have it already.
	b.Call(dir, unix.SYS_MKDIRAT, atCWD, b.String(dir), 0o755).Tolerate(unix.EEXIST, unix.EROFS)
}

// mountCgroups shows the process its control groups: on version 2 by its
// cgroup namespace, on version 1 as a directory with its own group of each
// hierarchy.
func (b *builder) mountCgroups(m specs.Mount) {
	if b.c.Cgroup.Dir >= 0 {
		if b.c.Machine != nil {
			// The machine's may be there, on which the kernel doesn't mount the same again.
			b.mount("tmpfs", "cgroup", m.Destination, []string{"nosuid", "noexec", "nodev", "ro"})
		}
		b.mount("cgroup2", "cgroup", m.Destination, m.Options)
		return
	}
	b.mount("tmpfs", "cgroup", m.Destination, []string{"nosuid", "noexec", "nodev", "mode=755"})
	for _, h := range b.c.Cgroup.Mounts {
		dest := path.Join(m.Destination, h.Name)
		b.mkdir(dest)
		b.attach(h.FD, dest)
		b.linkControllers(m.Destination, h.Name)
	}
	if slices.Contains(m.Options, "ro") {
		b.setReadonly(m.Destination)
	}
}

// linkControllers has each controller of a hierarchy found by its own name: of
// "cpu,cpuacct", both.
func (b *builder) linkControllers(dir, hierarchy string) {
	controllers := strings.Split(hierarchy, ",")
	if len(controllers) == 1 {
		return
	}
	for _, name := range controllers {
		link := path.Join(dir, name)
		b.Call(link, unix.SYS_SYMLINKAT, b.String(hierarchy), atCWD, b.String(link)).Tolerate(unix.EEXIST)
	}
}

func (b *builder) attach(fd int, dest string) launch.Step {
	return b.Call(dest, unix.SYS_MOVE_MOUNT, uintptr(fd), b.String(""), atCWD, b.String(dest), unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
}

// setReadonly makes the one mount at dest read-only.
func (b *builder) setReadonly(dest string) launch.Step {
	attr := b.mountAttr(unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	return b.Call(dest, unix.SYS_MOUNT_SETATTR, atCWD, b.String(dest), 0, attr, unsafe.Sizeof(unix.MountAttr{}))
}

func (b *builder) mountAttr(a unix.MountAttr) uintptr {
	return b.Words(uintptr(a.Attr_set), uintptr(a.Attr_clr), uintptr(a.Propagation), uintptr(a.Userns_fd))
}

// node is a character device in /dev.
type node struct {
	name         string
	major, minor uint32
}

var defaultNodes = []node{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"tty", 5, 0}, {"random", 1, 8}, {"urandom", 1, 9}}

var hasKcore = sync.OnceValue(func() bool { _, err := os.Lstat("/proc/kcore"); return err == nil })

// DefaultDevices are the paths of the nodes that every container has.
func DefaultDevices() (paths []string) {
	for _, n := range defaultNodes {
		paths = append(paths, "/dev/"+n.name)
	}
	return paths
}

// devices fills /dev.
func (b *builder) devices() {
	for _, n := range defaultNodes {
		b.device("/dev/"+n.name, unix.S_IFCHR, unix.Mkdev(n.major, n.minor))
	}
	b.deviceLinks()
	for _, d := range b.spec.Linux.Devices {
		for _, dir := range parents("/dev", d.Path) {
			b.mkdir(dir)
		}
		mode := uintptr(unix.S_IFCHR)
		if d.Type == "b" {
			mode = unix.S_IFBLK
		}
		b.device(d.Path, mode, unix.Mkdev(uint32(d.Major), uint32(d.Minor))).Tolerate(unix.EEXIST)
	}
}

// device makes a node, or has the machine's in its place.
func (b *builder) device(name string, kind uintptr, number uint64) launch.Step {
	fd, ok := b.c.Machine[name]
	if !ok {
		return b.Call(name, unix.SYS_MKNODAT, atCWD, b.String(name), kind|0o666, uintptr(number))
	}
	b.Call(name, unix.SYS_MKNODAT, atCWD, b.String(name), unix.S_IFREG|0o666, 0)
	return b.attach(fd, name)
}

func (b *builder) deviceLinks() {
	links := [][2]string{{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}}
	if hasKcore() {
		links = append(links, [2]string{"/proc/kcore", "core"})
	}
	for _, l := range links {
		b.Call("/dev/"+l[1], unix.SYS_SYMLINKAT, b.String(l[0]), atCWD, b.String("/dev/"+l[1])).Tolerate(unix.EEXIST)
	}
}

// parents lists the directories between top and name, both exclusive.
func parents(top, name string) (list []string) {
	for dir := path.Dir(name); dir != top && dir != "/" && dir != "."; dir = path.Dir(dir) {
		list = append([]string{dir}, list...)
	}
	return list
}

// masks hides paths and makes others read-only; those that this kernel
// doesn't have are left out.
//
// What a path is on the machine it is in the container: the same kernel's
// files. To try instead would cost: a mount that fails in its last step takes
// the kernel as long as ten others.
func (b *builder) masks() error {
	for _, p := range b.spec.Linux.MaskedPaths {
		var st unix.Stat_t
		switch err := unix.Lstat(p, &st); {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			return fmt.Errorf("stat %s: %w", p, err)
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			b.Call(p, unix.SYS_MOUNT, b.String("tmpfs"), b.String(p), b.String("tmpfs"), unix.MS_RDONLY).Tolerate(unix.ENOENT)
		default:
			b.Call(p, unix.SYS_MOUNT, b.String("/dev/null"), b.String(p), 0, unix.MS_BIND).Tolerate(unix.ENOENT)
		}
	}
	b.readonlyPaths()
	return nil
}

func (b *builder) readonlyPaths() {
	for _, p := range b.spec.Linux.ReadonlyPaths {
		b.Call(p, unix.SYS_MOUNT, b.String(p), b.String(p), 0, unix.MS_BIND|unix.MS_REC).Tolerate(unix.ENOENT)
		b.setReadonly(p).Tolerate(unix.ENOENT)
	}
}

// staging is where a mount is put to bind a part of it; it is covered again or
// gone afterwards.
const staging = "/dev/shm"

// binds adds the step's own mounts, parents before children, and makes the
// root read-only if it shall be.
func (b *builder) binds() error {
	binds := slices.Clone(b.c.Binds)
	slices.SortStableFunc(binds, func(x, y Bind) int { return depth(x.Dest) - depth(y.Dest) })
	for _, m := range binds {
		if m.Make != "" {
			b.mountPoint(m)
		}
		if m.Selector != "" {
			b.bindPart(m)
			continue
		}
		b.attach(m.FD, m.Dest)
	}
	if b.spec.Root.Readonly {
		b.setReadonly("/")
	}
	return nil
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

// mountPoint makes the place for m inside another mount.
func (b *builder) mountPoint(m Bind) {
	for _, dir := range parents("/", m.Make) {
		b.mkdir(dir)
	}
	if !m.File {
		b.mkdir(m.Make)
		return
	}
	// Never an existing one: a FIFO that somebody put there would block.
	const flags = unix.O_CREAT | unix.O_EXCL | unix.O_RDONLY | unix.O_CLOEXEC
	b.Call(m.Make, unix.SYS_OPENAT, atCWD, b.String(m.Make), flags, 0o755).Tolerate(unix.EEXIST, unix.EROFS)
}

// bindPart mounts a path below a detached mount: attached, it can be cloned
// from.
func (b *builder) bindPart(m Bind) {
	empty := b.String("")
	b.attach(m.FD, staging)
	how := b.Words(unix.O_PATH|unix.O_CLOEXEC, 0, unix.RESOLVE_IN_ROOT)
	open := b.Call(fmt.Sprintf("%s from %s", m.Dest, m.Selector), unix.SYS_OPENAT2, uintptr(m.FD), b.String(m.Selector), how, unsafe.Sizeof(unix.OpenHow{}))
	tree := b.Call(m.Dest, unix.SYS_OPEN_TREE, 0, empty, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	open.Into(tree, 0)
	tree.Into(b.attach(-1, m.Dest), 0)
	if m.Readonly {
		b.setReadonly(m.Dest)
	}
	b.Call(m.Dest, unix.SYS_UMOUNT2, b.String(staging), unix.MNT_DETACH)
}
