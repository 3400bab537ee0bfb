package rootfs

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// MountPoint is a place in the root that something is to be mounted on.
type MountPoint struct {
	Path string // absolute
	File bool   // a file rather than a directory
	Keep bool   // stays after the run, as /proc, /sys and /dev do in every container
	// Plain: it must be a directory where it says, not a symbolic link. Through a
	// link the mount could come to be where those that hide parts of it don't.
	Plain bool
}

// Stubs are the mount points that were made for a run.
type Stubs struct {
	root  Root
	paths []string // resolved
}

// Prepare makes the mount points that are missing and remembers them. Those
// below another mount point are left out: they are looked for in what is
// mounted there. With recursive, the parents made for a mount point are
// remembered, too. The returned error leaves nothing behind.
func (r Root) Prepare(points []MountPoint, recursive bool) (_ *Stubs, err error) {
	s := &Stubs{root: r}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Remove())
		}
	}()
	var covered []string
	for _, p := range points {
		resolved, exists, err := r.Resolve(p.Path)
		if err != nil {
			return nil, fmt.Errorf("make mount point %s: %w", p.Path, err)
		}
		below := Below(resolved, covered)
		if err := p.check(resolved, below); err != nil {
			return nil, err
		}
		covered = append(covered, resolved)
		if exists || below {
			continue
		}
		if !p.Keep {
			s.paths = append(s.paths, s.missing(resolved, recursive)...)
		}
		if p.File {
			err = r.create(resolved)
		} else {
			err = r.mkdirAll(resolved, owner{})
		}
		if err != nil {
			return nil, fmt.Errorf("make mount point %s: %w", p.Path, err)
		}
	}
	return s, nil
}

func (p MountPoint) check(resolved string, below bool) error {
	switch {
	case p.Plain && resolved != p.Path, p.Keep && below:
		return fmt.Errorf("mount point %s: the file system has a symbolic link there, to %s; it must be a directory or missing", p.Path, resolved)
	case resolved == "/":
		return fmt.Errorf("mount point %s: the file system has a symbolic link there that leads to the root itself", p.Path)
	}
	return nil
}

// Below says whether name is one of dirs or below one.
func Below(name string, dirs []string) bool {
	for _, d := range dirs {
		if name == d || d == "/" || strings.HasPrefix(name, d+"/") {
			return true
		}
	}
	return false
}

// procFiles are what may be replaced in /proc, as file systems for containers
// do it.
var procFiles = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/loadavg", "/proc/meminfo", "/proc/net/dev", "/proc/slabinfo", "/proc/stat", "/proc/swaps", "/proc/uptime",
	"/proc/sys/crypto/fips_enabled", "/proc/sys/kernel/ns_last_pid",
}

// InProc says that a mount point is where a container could fake what /proc
// tells.
func InProc(resolved string) bool {
	return strings.HasPrefix(resolved, "/proc/") && !slices.Contains(procFiles, resolved)
}

// missing lists name and, if recursive, its missing parents.
func (s *Stubs) missing(name string, recursive bool) []string {
	list := []string{name}
	for p := path.Dir(name); recursive && p != "/"; p = path.Dir(p) {
		fd, err := s.root.open(p, unix.O_PATH)
		if err == nil {
			unix.Close(fd)
			break
		}
		list = append(list, p)
	}
	return list
}

// Remove removes the stubs that are still as they were made: empty. Times of
// their parents stay.
func (s *Stubs) Remove() error {
	var errs []error
	slices.Sort(s.paths)
	for _, p := range slices.Backward(s.paths) { // what is in a directory before it
		if err := s.remove(p); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			errs = append(errs, fmt.Errorf("remove mount point %s: %w", p, err))
		}
	}
	s.paths = nil
	return errors.Join(errs...)
}

func (s *Stubs) remove(name string) error {
	// The process may have turned a parent into a symbolic link: not ours, then.
	resolved, exists, err := s.root.Resolve(path.Dir(name))
	if err != nil || !exists || resolved != path.Dir(name) {
		return err
	}
	return s.root.inParent(name, func(parent int, base string) error {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			if err := unix.Unlinkat(parent, base, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
				return err
			}
		case unix.S_IFREG:
			if st.Size == 0 {
				return unix.Unlinkat(parent, base, 0)
			}
		}
		return nil
	})
}
