package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// View is a mounted snapshot that is attached nowhere: it is reachable through
// Path only, and gone when closed or when the process dies.
//
// Views of the same writable overlay share one mount. So whoever moves the mount
// behind FD elsewhere keeps the View open as long as it is in use there.
type View struct {
	fd     int // what Path shows; the origin's unless the view has its own
	path   string
	source string  // of a bind mount
	origin *origin // nil if the mount is the view's alone

	once  sync.Once
	given int // what FD returns
}

// origin is a mount that several views may show. It is never given away: moved
// elsewhere, it couldn't be cloned any more.
type origin struct {
	fd    int
	close func() error
}

// Open makes mounts visible. No mounts give an empty read-only directory.
func Open(mounts []mount.Mount) (*View, error) {
	switch len(mounts) {
	case 0:
		mounts = []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"ro", "mode=0755", "size=4k"}}}
	case 1:
	default:
		return nil, fmt.Errorf("open a view: %d mounts on top of each other can't be attached nowhere", len(mounts))
	}
	s, err := parseMount(mounts[0])
	if err != nil {
		return nil, fmt.Errorf("open a view: %w", err)
	}
	v, err := s.open()
	if err != nil {
		return nil, fmt.Errorf("open a view: mount %s: %w", s, gone(err))
	}
	v.path = "/proc/self/fd/" + strconv.Itoa(v.fd)
	views.add(v)
	return v, nil
}

// Path is a directory path valid in this process until Close. Resolve user
// controlled paths below it only with Resolve, or with openat2 and
// RESOLVE_IN_ROOT.
func (v *View) Path() string { return v.path }

// FD is a detached mount of what Path shows; the view keeps it. It may be given
// to move_mount, once.
func (v *View) FD() int {
	v.once.Do(func() {
		v.given = v.fd
		if v.origin == nil || v.fd != v.origin.fd {
			return
		}
		// Cloned only now, as most views are used by path alone, and letting go
		// of a mount waits for all processors. Without a clone (there are no
		// descriptors left) the origin itself goes, and others can't share it.
		if fd, err := v.origin.clone(); err == nil {
			v.given = fd
		}
	})
	return v.given
}

// Close lets go of the view. It must be called exactly once.
func (v *View) Close() error {
	views.remove(v)
	var errs []error
	v.once.Do(func() { v.given = v.fd })
	if v.given != v.fd {
		errs = append(errs, unix.Close(v.given))
	}
	if v.origin == nil || v.fd != v.origin.fd {
		errs = append(errs, unix.Close(v.fd))
	}
	if v.origin != nil {
		errs = append(errs, v.origin.close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close a view: %w", err)
	}
	return nil
}

// Resolve opens path with the view as its root: symlinks, absolute ones too, and
// .. stay inside. The file can be named, but not read (O_PATH).
func (v *View) Resolve(path string) (*os.File, error) {
	return v.OpenFile(path, unix.O_PATH, 0)
}

// OpenFile is os.OpenFile with the view as its root, as for Resolve.
func (v *View) OpenFile(path string, flag int, perm os.FileMode) (*os.File, error) {
	fd, err := openIn(v.fd, path, flag, uint32(perm.Perm()))
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(v.path, path)), nil
}

// openIn opens path with dir as its root.
func openIn(dir int, path string, flag int, mode uint32) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flag | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	if flag&unix.O_CREAT != 0 {
		how.Mode = uint64(mode)
	}
	for {
		fd, err := unix.Openat2(dir, path, &how)
		// EAGAIN: something was renamed meanwhile, so that the kernel couldn't
		// tell whether .. is still inside.
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// attached holds the views behind attached mounts.
var attached = struct {
	mu    sync.Mutex // guards views
	views map[string][]*View
}{views: map[string][]*View{}}

// Attach mounts at the existing directory target, in this process's mount
// namespace. Used for runtimes that need a path, such as runc. Detach undoes
// it (lazily, and is fine with nothing being mounted).
func Attach(mounts []mount.Mount, target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return fmt.Errorf("attach at %s: %w", target, err)
	}
	v, err := Open(mounts)
	if err != nil {
		return fmt.Errorf("attach at %s: %w", target, err)
	}
	if err := unix.MoveMount(v.FD(), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach at %s: move_mount: %w", target, errors.Join(err, v.Close()))
	}
	attached.mu.Lock()
	defer attached.mu.Unlock()
	attached.views[target] = append(attached.views[target], v)
	return nil
}

// Detach unmounts everything at target.
func Detach(target string) error {
	target, err := filepath.Abs(target)
	if err != nil {
		return fmt.Errorf("detach %s: %w", target, err)
	}
	for err == nil {
		err = unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if err == unix.EINVAL || err == unix.ENOENT { // nothing is mounted there
		err = nil
	}
	attached.mu.Lock()
	mine := attached.views[target]
	delete(attached.views, target)
	attached.mu.Unlock()
	errs := []error{err}
	for _, v := range mine {
		errs = append(errs, v.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("detach %s: %w", target, err)
	}
	return nil
}
