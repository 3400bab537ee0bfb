package executor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// runcRuntime runs containers with an OCI runtime binary: runc or one with the
// same command line.
type runcRuntime struct {
	binary  string
	root    string // for bundles
	state   string // the binary's own
	cgroups *cgroup.Manager
	keep    bool // it can be told to leave the cgroup when the container has ended
	attach  func([]mount.Mount, string) error
	grace   time.Duration
	confinement
}

func newRunc(cfg Config, cgroups *cgroup.Manager, confined confinement) (*runcRuntime, error) {
	binary, err := exec.LookPath(cfg.Binary)
	if err != nil {
		return nil, fmt.Errorf("find OCI runtime: %w", err)
	}
	r := &runcRuntime{
		binary: binary, root: filepath.Join(cfg.Root, bundlesDir), state: filepath.Join(cfg.Root, runcStateDir),
		cgroups: cgroups, attach: snapshot.Attach, grace: cfg.Grace, confinement: confined,
	}
	// Versions of crun before 1.9 lack the flag.
	if help, err := exec.Command(binary, "run", "--help").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ask OCI runtime %s for its flags: %w: %s", binary, err, bytes.TrimSpace(help))
	} else {
		r.keep = bytes.Contains(help, []byte("--keep"))
	}
	// What an old state describes was killed with its cgroups.
	if err := removeMemory(r.state); err != nil {
		return nil, fmt.Errorf("remove old state of OCI runtime: %w", err)
	}
	for i, dir := range []string{r.root, r.state} {
		if err := inMemory(dir); err != nil {
			if i == 1 {
				err = errors.Join(err, snapshot.Detach(r.root))
			}
			return nil, err
		}
	}
	return r, nil
}

func (r *runcRuntime) close() error {
	return errors.Join(snapshot.Detach(r.root), snapshot.Detach(r.state))
}

// inMemory makes dir a directory that is never written to disk: a bundle has
// the environment of its process, and so has what runtimes note, and secrets can
// be in it.
func inMemory(dir string) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make directory for OCI runtime: %w", err)
	}
	options := []string{"nosuid", "nodev", "mode=0711"}
	err := snapshot.Attach([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: append(options, "noswap")}}, dir)
	if err != nil { // a kernel before 6.4
		err = snapshot.Attach([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: options}}, dir)
	}
	if err != nil {
		return fmt.Errorf("mount file system for OCI runtime at %s: %w", dir, err)
	}
	return nil
}

// removeMemory removes what inMemory made before a crash.
func removeMemory(dir string) error {
	if err := unmountAll(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func (r *runcRuntime) bundle(p Process) string { return filepath.Join(r.root, p.ID) }

// attached is a view that is mounted at a path.
type attached struct {
	*os.File
	dir string
}

func (a *attached) FD() int { return int(a.File.Fd()) }

func (a *attached) Close() error {
	return errors.Join(a.File.Close(), snapshot.Detach(a.dir))
}

// opener makes the bundle of p and attaches what is opened in it: the root
// first, then mounts.
func (r *runcRuntime) opener(p Process, undo *cleanup.Stack) (openView, error) {
	bundle := r.bundle(p)
	if err := os.Mkdir(bundle, 0o711); err != nil {
		return nil, fmt.Errorf("make bundle: %w", err)
	}
	undo.Add(func() error { return removeBundle(bundle) })
	n := 0
	return func(mounts []mount.Mount) (view, error) {
		dir := filepath.Join(bundle, "mount"+strconv.Itoa(n))
		n++
		if err := os.Mkdir(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make bundle: %w", err)
		}
		if err := r.attach(mounts, dir); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, errors.Join(err, snapshot.Detach(dir))
		}
		return &attached{f, dir}, nil
	}, nil
}

func (r *runcRuntime) run(ctx context.Context, t *task) (exit exit, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	bundle := r.bundle(t.p)
	t.spec.Root.Path = t.root.(*attached).dir
	t.spec.Process.Terminal = t.p.Terminal
	group, counted, err := r.group(t, &undo)
	if err != nil {
		return exit, err
	}
	if err := r.bindSources(t, bundle, &undo); err != nil {
		return exit, err
	}
	if err := writeJSON(filepath.Join(bundle, "config.json"), t.spec); err != nil {
		return exit, err
	}
	args := []string{"--bundle", bundle}
	if r.keep {
		args = append(args, "--keep")
	}
	c := &runcContainer{runcRuntime: r, shared: &shared{ctx: ctx, task: t}, group: group, bundle: bundle}
	c.further = c.exec
	a, err := c.start(t.p, "run", args, t.p.Started != nil)
	if err != nil {
		return exit, err
	}
	undo.Add(func() error { return r.forget(t.p.ID) })
	err = c.attend(ctx, a, t, func() { c.kill(a) }, &exit)
	usage, uerr := counted.Usage()
	exit.account(usage)
	if err = errors.Join(err, uerr); err != nil || exit.code == 0 || exit.killed {
		return exit, err
	}
	return exit, a.startError(t, exit)
}

// counted is where what a container used is counted.
type counted interface{ Usage() (cgroup.Usage, error) }

// group returns the group that the runtime is to make for t, and the one that is
// there when the container has ended. undo removes them.
func (r *runcRuntime) group(t *task, undo *cleanup.Stack) (*cgroup.Group, counted, error) {
	if r.keep {
		g, err := r.cgroups.Reserve(cgroupSpec(t.p))
		if err != nil {
			return nil, nil, err
		}
		t.spec.Linux.CgroupsPath = g.Path()
		undo.Add(g.Remove)
		return g, g, nil
	}
	around, err := r.cgroups.Around(cgroupSpec(t.p))
	if err != nil {
		return nil, nil, err
	}
	undo.Add(around.Remove)
	t.spec.Linux.CgroupsPath = around.Inside.Path()
	t.spec.Linux.Resources.Memory = nil
	return around.Inside, around, nil
}

func writeJSON(name string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		err = os.WriteFile(name, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write for OCI runtime: %w", err)
	}
	return nil
}

func (r *runcRuntime) command(args ...string) *exec.Cmd {
	cmd := exec.Command(r.binary, append([]string{"--root", r.state}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// startWith starts cmd with the process's ends of io.
func startWith(cmd *exec.Cmd, io *stdio) (err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	files, err := io.files(&undo)
	if err != nil {
		return err
	}
	if files[0] != nil {
		cmd.Stdin = files[0]
	}
	if files[1] != nil {
		cmd.Stdout = files[1]
	}
	if files[2] != nil {
		cmd.Stderr = files[2]
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	return io.started()
}

// bindSources gives the binds of the spec paths that no container can change.
func (r *runcRuntime) bindSources(t *task, bundle string, undo *cleanup.Stack) (err error) {
	at := len(t.spec.Mounts) - len(t.sources)
	for i, s := range t.sources {
		target := filepath.Join(bundle, "bind"+strconv.Itoa(i))
		if err := bindPart(s, target); err != nil {
			return fmt.Errorf("mount %s: %w", s.dest, err)
		}
		undo.Add(func() error { return snapshot.Detach(target) })
		m := &t.spec.Mounts[at+i]
		m.Source = target
		if m.Options, err = withFlags(m.Options, target); err != nil {
			return fmt.Errorf("mount %s: %w", s.dest, err)
		}
	}
	return nil
}

// withFlags adds to a bind's options the flags that what is mounted at target
// has: crun gives the bind those of the options alone.
func withFlags(options []string, target string) ([]string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: target, Err: err}
	}
	for _, f := range []struct {
		flag int64 // the kernel has the same numbers for ST_* as for MS_*
		name string
	}{{unix.MS_NOSUID, "nosuid"}, {unix.MS_NOEXEC, "noexec"}, {unix.MS_NODEV, "nodev"}, {unix.MS_RDONLY, "ro"}} {
		if st.Flags&f.flag != 0 && !slices.Contains(options, f.name) {
			options = append(options, f.name)
		}
	}
	return options, nil
}

// bindPart mounts the selected part of s at target, which it makes.
func bindPart(s source, target string) error {
	part, closePart, err := openPart(s.fd, s.selector)
	if err != nil {
		return err
	}
	defer closePart()
	if s.file {
		err = os.WriteFile(target, nil, 0o600)
	} else {
		err = os.Mkdir(target, 0o700)
	}
	if err != nil {
		return err
	}
	return unix.Mount(fmt.Sprintf("/proc/self/fd/%d", part), target, "", unix.MS_BIND|unix.MS_REC, "")
}

// forget makes the runtime forget the container.
func (r *runcRuntime) forget(id string) error {
	out, err := r.command("delete", "--force", id).CombinedOutput()
	if err != nil {
		return fmt.Errorf("delete container: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}
