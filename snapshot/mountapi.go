package snapshot

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// mountFeatures are what the newer mount calls can do; all kernels since 5.12
// have the rest.
type mountFeatures struct {
	// layers: overlay takes layers one by one (lowerdir+, Linux 6.7). Without
	// it all must fit into a page.
	layers bool
	// clones: a detached mount can be cloned (Linux 6.15).
	clones bool
}

// features asks the kernel, once. Tests replace it.
var features = sync.OnceValue(func() mountFeatures {
	var f mountFeatures
	if fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC); err == nil {
		// Before 6.5 overlay's options are only looked at when it is mounted,
		// so that anything goes here, also what doesn't exist.
		f.layers = unix.FsconfigSetFlag(fd, "no-such-option") != nil &&
			unix.FsconfigSetString(fd, "lowerdir+", "/") == nil
		unix.Close(fd)
	}
	tmpfs := &mountSpec{fstype: "tmpfs", source: "tmpfs"}
	if fd, err := tmpfs.detached(); err == nil {
		if c, err := clone(fd); err == nil {
			f.clones = true
			unix.Close(c)
		}
		unix.Close(fd)
	}
	return f
})

// open makes a view of s.
func (s *mountSpec) open() (*View, error) {
	switch {
	case s.bind:
		fd, err := s.openBind()
		if err != nil {
			return nil, err
		}
		return &View{fd: fd, source: s.source}, nil
	case s.upper != "":
		o, err := shares.acquire(s.upper, s.openShared)
		if err != nil {
			return nil, err
		}
		return s.viewOf(o)
	case features().clones:
		fd, err := s.detached()
		if err != nil {
			return nil, err
		}
		return &View{fd: fd}, nil
	}
	o, err := holder.mount(s)
	if err != nil {
		return nil, err
	}
	return s.viewOf(o)
}

// openShared mounts a writable overlay for the first who asks for it.
func (s *mountSpec) openShared() (*origin, error) {
	if err := resetWork(s.work); err != nil {
		return nil, err
	}
	if !features().clones {
		return holder.mount(s)
	}
	fd, err := s.plain().detached()
	if err != nil {
		return nil, err
	}
	return &origin{fd: fd, close: func() error { return unix.Close(fd) }}, nil
}

// plain is s without properties of the mount, for an origin whose clones may
// differ in them.
func (s *mountSpec) plain() *mountSpec {
	p := *s
	p.set, p.clr = 0, 0
	return &p
}

// special says whether a clone needs properties that its origin hasn't.
func (s *mountSpec) special() bool { return s.set|s.clr&^unix.MOUNT_ATTR_RDONLY != 0 }

// viewOf makes a view of o, which it owns.
func (s *mountSpec) viewOf(o *origin) (*View, error) {
	if !s.special() {
		return &View{fd: o.fd, origin: o}, nil
	}
	fd, err := o.clone()
	if err == nil {
		if err = setAttrs(fd, s.set, s.clr, false); err == nil {
			return &View{fd: fd, origin: o}, nil
		}
		unix.Close(fd)
	}
	return nil, errors.Join(err, o.close())
}

// clone makes a detached mount of o.
func (o *origin) clone() (fd int, err error) {
	err = inHolder(func() error { fd, err = clone(o.fd); return err })
	return fd, err
}

// clone makes another detached mount of the mount that fd is.
func clone(fd int) (int, error) {
	c, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	return c, nil
}

func (s *mountSpec) openBind() (fd int, err error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if s.recursive {
		flags |= unix.AT_RECURSIVE
	}
	if o, rest := views.originOf(&s.source); o != nil {
		// The source is inside a detached mount, of which this kernel clones
		// only the attached origin.
		err = inHolder(func() error {
			dir, err := openIn(o.fd, rest, unix.O_PATH, 0)
			if err != nil {
				return err
			}
			defer unix.Close(dir)
			fd, err = unix.OpenTree(dir, "", flags|unix.AT_EMPTY_PATH)
			return err
		})
	} else {
		fd, err = unix.OpenTree(unix.AT_FDCWD, s.source, flags)
	}
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	if s.special() {
		if err := setAttrs(fd, s.set, s.clr, s.recursive); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

func setAttrs(fd int, set, clr uint64, recursive bool) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(fd, "", flags, &unix.MountAttr{Attr_set: set, Attr_clr: clr}); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// detached mounts s with the new calls.
func (s *mountSpec) detached() (int, error) {
	fs, err := unix.Fsopen(s.fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", s.fstype, err)
	}
	defer unix.Close(fs)
	if err := s.configure(fs); err != nil {
		return -1, fmt.Errorf("%w%s", err, kernelLog(fs))
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(s.set))
	if err != nil {
		return -1, fmt.Errorf("fsmount: %w%s", err, kernelLog(fs))
	}
	return fd, nil
}

func (s *mountSpec) configure(fs int) error {
	set := func(key, value string) error {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return fmt.Errorf("option %s=%s: %w", key, value, err)
		}
		return nil
	}
	source := s.source
	if source == "" {
		source = "none"
	}
	if err := set("source", source); err != nil {
		return err
	}
	for _, opt := range s.data {
		key, value, ok := strings.Cut(opt, "=")
		if ok {
			if err := set(key, value); err != nil {
				return err
			}
		} else if err := unix.FsconfigSetFlag(fs, opt); err != nil {
			return fmt.Errorf("option %s: %w", opt, err)
		}
	}
	for _, l := range s.lower {
		if err := setDir(fs, "lowerdir+", l); err != nil {
			return err
		}
	}
	if s.upper != "" {
		if err := setDir(fs, "upperdir", s.upper); err != nil {
			return err
		}
		if err := setDir(fs, "workdir", s.work); err != nil {
			return err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("fsconfig: %w", err)
	}
	return nil
}

// setDir sets an option that names a directory. The kernel takes strings of 255
// bytes; a longer path goes by way of a descriptor.
func setDir(fs int, key, dir string) error {
	path := dir
	if len(path) > 255 {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s %s: %w", key, dir, err)
		}
		defer unix.Close(fd)
		path = "/proc/self/fd/" + strconv.Itoa(fd)
	}
	if err := unix.FsconfigSetString(fs, key, path); err != nil {
		return fmt.Errorf("%s %s: %w", key, dir, err)
	}
	return nil
}

// kernelLog returns what the kernel has to say about a failed mount.
func kernelLog(fs int) string {
	var out strings.Builder
	buf := make([]byte, 1024)
	for {
		n, err := unix.Read(fs, buf)
		if err != nil || n == 0 {
			return out.String()
		}
		_, text, _ := strings.Cut(string(buf[:n]), " ") // "e text"
		fmt.Fprintf(&out, " (%s)", strings.TrimSpace(text))
	}
}
