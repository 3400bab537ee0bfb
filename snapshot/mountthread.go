package snapshot

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

// mountThread is a thread with a mount namespace of its own. Kernels that can't
// clone detached mounts, or have no lowerdir+, mount in it; the namespace, and
// all in it, ends with the process. The thread stays once it was needed. It is
// not the process's first one, whose mounts are the process's for others: a
// rootless daemon enters those of a supervisor that another one has left.
type mountThread struct {
	start sync.Once
	err   error // of starting
	work  chan func()
	next  int // makes names
	base  int // the tmpfs that mounts are attached in
}

var holder mountThread

// holderBase is hidden by the tmpfs in the thread's namespace. No layer is there.
const holderBase = "/sys"

// inHolder runs fn where the mounts are that can be cloned.
func inHolder(fn func() error) error {
	if features().clones {
		return fn()
	}
	return holder.do(fn)
}

// do runs fn on the thread.
func (h *mountThread) do(fn func() error) error {
	h.start.Do(func() {
		h.work = make(chan func())
		ready := make(chan error)
		go thread.Run(func() { h.run(ready) })
		h.err = <-ready
	})
	if h.err != nil {
		return fmt.Errorf("start the mount thread: %w", h.err)
	}
	done := make(chan error, 1)
	h.work <- func() { done <- fn() }
	return <-done
}

func (h *mountThread) run(ready chan<- error) {
	err := h.enter()
	ready <- err
	if err != nil {
		return
	}
	for fn := range h.work {
		fn()
	}
}

// enter makes the namespace. It goes on following the mounts of the daemon's.
func (h *mountThread) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	fd, err := (&mountSpec{fstype: "tmpfs", source: "kiln", data: []string{"mode=0700"}}).detached()
	if err != nil {
		return err
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, holderBase, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount to %s: %w", holderBase, err)
	}
	h.base = fd
	return nil
}

// mount mounts s in the thread's namespace.
func (h *mountThread) mount(s *mountSpec) (o *origin, err error) {
	err = h.do(func() error { o, err = h.attach(s.plain()); return err })
	return o, err
}

// attach runs on the thread.
func (h *mountThread) attach(s *mountSpec) (*origin, error) {
	h.next++
	name := strconv.Itoa(h.next)
	if err := unix.Mkdirat(h.base, name, 0o700); err != nil {
		return nil, fmt.Errorf("make a mount point: %w", err)
	}
	target := holderBase + "/" + name
	fd, err := h.attachAt(s, target)
	if err != nil {
		return nil, errors.Join(err, unix.Rmdir(target))
	}
	return &origin{fd: fd, close: func() error {
		return h.do(func() error {
			return errors.Join(unix.Close(fd), unix.Unmount(target, unix.MNT_DETACH), unix.Rmdir(target))
		})
	}}, nil
}

func (h *mountThread) attachAt(s *mountSpec, target string) (int, error) {
	if s.fstype != "overlay" || features().layers {
		fd, err := s.detached()
		if err != nil {
			return -1, err
		}
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("move_mount: %w", err)
		}
		return fd, nil
	}
	dir, data := s.relative()
	if max := unix.Getpagesize() - 1; len(data) > max {
		return -1, fmt.Errorf("the options for %d layers have %d bytes, and before Linux 6.7 at most %d are possible", len(s.lower), len(data), max)
	}
	if err := unix.Chdir(dir); err != nil { // of this thread alone
		return -1, fmt.Errorf("chdir %s: %w", dir, err)
	}
	defer unix.Chdir("/")
	if err := unix.Mount("overlay", target, "overlay", 0, data); err != nil {
		return -1, err
	}
	fd, err := unix.Open(target, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, errors.Join(err, unix.Unmount(target, unix.MNT_DETACH))
	}
	return fd, nil
}

// relative returns the options of an overlay with paths relative to dir, as
// short as they get.
func (s *mountSpec) relative() (dir, data string) {
	all := append([]string{}, s.lower...)
	if s.upper != "" {
		all = append(all, s.upper, s.work)
	}
	dir = all[0][:strings.LastIndexByte(all[0], '/')+1]
	for _, p := range all {
		for !strings.HasPrefix(p, dir) {
			dir = dir[:strings.LastIndexByte(strings.TrimSuffix(dir, "/"), '/')+1]
		}
	}
	lower := make([]string, len(s.lower))
	escape := strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`)
	for i, l := range s.lower {
		lower[i] = escape.Replace(strings.TrimPrefix(l, dir))
	}
	opts := append([]string{"lowerdir=" + strings.Join(lower, ":")}, s.data...)
	if s.upper != "" {
		opts = append(opts, "upperdir="+escape.Replace(s.upper[len(dir):]), "workdir="+escape.Replace(s.work[len(dir):]))
	}
	if dir == "" {
		dir = "."
	}
	return dir, strings.Join(opts, ",")
}
