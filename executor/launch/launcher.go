//go:build linux && (amd64 || arm64)

package launch

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

// Staging is a directory in the file system that a child starts in, for
// mounting its root on. The rest of that file system is empty, but for the
// machine's /proc and /sys in a user namespace.
const Staging = "/root"

// Launcher starts programs. All methods are safe for concurrent use.
type Launcher struct {
	jobs  chan *job
	done  sync.WaitGroup
	grace time.Duration
}

// setUpGrace is how long a child may go on with its set-up when nobody wants
// it any more. It takes a millisecond, and one that has just executed its
// program is to end in a more orderly way.
const setUpGrace = time.Second

type job struct {
	p    *Program
	pid  int64
	done chan struct{}
}

// New starts n threads for launching. dir is any existing directory.
func New(n int, dir string) (*Launcher, error) {
	l := &Launcher{jobs: make(chan *job), grace: setUpGrace}
	ready := make(chan error, n)
	for range n {
		l.done.Go(func() { thread.Run(func() { l.serve(dir, ready) }) })
	}
	var err error
	for range n {
		if e := <-ready; e != nil { // that of one tells what all met
			err = e
		}
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Close ends the launcher threads. No process started by them may be running:
// it would be killed.
func (l *Launcher) Close() error {
	close(l.jobs)
	l.done.Wait()
	return nil
}

// serve does jobs on a thread of its own, with whose end its odd view of the
// file system ends.
func (l *Launcher) serve(dir string, ready chan<- error) {
	if err := enterEmptyRoot(dir); err != nil {
		ready <- fmt.Errorf("prepare launcher thread: %w", err)
		return
	}
	ready <- nil
	dumpable, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	for j := range l.jobs {
		j.pid = clone(j.p.args, &j.p.steps[0], j.p.out)
		// A child that changes its user marks the memory it shares with us as
		// not to be dumped; undo that.
		if now, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); now != dumpable {
			unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(dumpable), 0, 0, 0) //nolint:errcheck // can't fail for 0 and 1
		}
		close(j.done)
	}
}

// enterEmptyRoot moves the calling thread to a new mount namespace with nothing
// but an empty tmpfs with a directory Staging.
func enterEmptyRoot(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare mount namespace: %w", err)
	}
	err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err == unix.EINVAL {
		err = fmt.Errorf("%w: / is no mount point, as below chroot: make the directory one first (mount --bind DIR DIR; chroot DIR)", err)
	}
	if err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("kiln", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=4k,nr_inodes=8"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	if rootless.Here().Mapped() {
		if err := keepVisible(dir); err != nil {
			return err
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return fmt.Errorf("enter %s: %w", dir, err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", dir, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter new root: %w", err)
	}
	if err := unix.Mkdir(Staging, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", Staging, err)
	}
	return nil
}

// keepVisible leaves the machine's /proc and /sys in the file system: where they
// aren't seen in full, the kernel lets root of a user namespace mount none of
// that kind.
func keepVisible(dir string) error {
	for _, name := range []string{"/proc", "/sys"} {
		if err := unix.Mkdir(dir+name, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", name, err)
		}
		if err := unix.Mount(name, dir+name, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", name, err)
		}
	}
	return nil
}

// Options are what a child gets at its creation.
type Options struct {
	Namespaces uint64 // CLONE_NEW* flags
	CgroupFD   int    // open v2 cgroup directory to start in, or -1
}

// Launch runs p in a new process and returns when it has executed its program.
// A step that failed is a *StepError. A child that hangs when ctx ends is killed;
// one that has executed its program is returned even then.
func (l *Launcher) Launch(ctx context.Context, p *Program, o Options) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	p.assemble()
	p.args = &cloneArgs{
		flags:      unix.CLONE_VM | unix.CLONE_VFORK | unix.CLONE_CLEAR_SIGHAND | unix.CLONE_PIDFD | o.Namespaces,
		pidfd:      uint64(uintptr(unsafe.Pointer(&p.out.pidfd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	if o.CgroupFD >= 0 {
		p.args.flags |= unix.CLONE_INTO_CGROUP
		p.args.cgroup = uint64(o.CgroupFD)
	}
	j := &job{p: p, done: make(chan struct{})}
	select {
	case l.jobs <- j:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case <-j.done:
		return j.result(ctx)
	case <-ctx.Done():
	}
	if !j.interrupt(l.grace) {
		return j.result(ctx)
	}
	proc, err := j.result(ctx)
	if err == nil {
		_, err = proc.Wait(context.WithoutCancel(ctx), 0)
	}
	return nil, errors.Join(context.Cause(ctx), err)
}

// interrupt kills a child that hangs in its set-up, and says whether it did.
func (j *job) interrupt(grace time.Duration) bool {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-j.done:
		return false
	case <-timer.C:
	}
	// The kernel writes the pidfd before the child runs. Before that there is
	// nothing that could block for long.
	if fd := atomic.LoadInt32(&j.p.out.pidfd); fd >= 0 {
		unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) //nolint:errcheck // it has ended, then
	}
	<-j.done
	return true
}

func (j *job) result(ctx context.Context) (*Process, error) {
	runtime.KeepAlive(j.p)
	if j.pid < 0 {
		return nil, fmt.Errorf("clone: %w", unix.Errno(-j.pid))
	}
	proc, err := newProcess(int(j.pid), int(j.p.out.pidfd))
	if err != nil {
		return nil, err
	}
	if err := j.p.err(); err != nil {
		_, werr := proc.Wait(context.WithoutCancel(ctx), 0)
		return nil, errors.Join(err, werr)
	}
	return proc, nil
}
