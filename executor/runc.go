package executor

import (
	"bufio"
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
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/native"
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
	keep    []string // flag for run: its cgroup can be read when the container has ended
	attach  func([]mount.Mount, string) error
	grace   time.Duration
}

func newRunc(cfg Config, cgroups *cgroup.Manager) (*runcRuntime, error) {
	binary, err := exec.LookPath(cfg.Binary)
	if err != nil {
		return nil, fmt.Errorf("find OCI runtime: %w", err)
	}
	r := &runcRuntime{
		binary: binary, root: filepath.Join(cfg.Root, bundlesDir), state: filepath.Join(cfg.Root, runcStateDir),
		cgroups: cgroups, attach: snapshot.Attach, grace: cfg.Grace,
	}
	// Old versions of crun lack the flag: what steps use isn't known then.
	if help, err := exec.Command(binary, "run", "--help").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ask OCI runtime %s for its flags: %w: %s", binary, err, bytes.TrimSpace(help))
	} else if bytes.Contains(help, []byte("--keep")) {
		r.keep = []string{"--keep"}
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
	if p.Terminal || p.Started != nil {
		return nil, fmt.Errorf("containers that several processes run in, and terminals, need the built-in runtime, not %s", r.binary)
	}
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
	group := r.cgroups.Existing(cgroupSpec(t.p))
	t.spec.Linux.CgroupsPath = group.Path()
	if err := r.bindSources(t, bundle, &undo); err != nil {
		return exit, err
	}
	config, err := json.Marshal(t.spec)
	if err != nil {
		return exit, fmt.Errorf("encode spec: %w", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), config, 0o600); err != nil {
		return exit, fmt.Errorf("write spec: %w", err)
	}
	io, err := newStdio(t.p)
	if err != nil {
		return exit, err
	}
	logfile := filepath.Join(bundle, "log.json")
	run := slices.Concat([]string{"--log", logfile, "--log-format", "json", "run", "--bundle", bundle}, r.keep, []string{t.p.ID})
	cmd := r.command(run...)
	if err := startWith(cmd, io); err != nil {
		return exit, errors.Join(fmt.Errorf("start %s: %w", r.binary, err), io.abort())
	}
	undo.Add(func() error { return r.remove(t.p.ID, group) })
	err = errors.Join(r.wait(ctx, cmd, t.p.ID, group, &exit), io.ended(ctx))
	usage, uerr := group.Usage()
	exit.account(usage)
	if err = errors.Join(err, uerr); err != nil || exit.code == 0 || exit.killed {
		return exit, err
	}
	return exit, startError(logfile, t.p.Args[0])
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
func (r *runcRuntime) bindSources(t *task, bundle string, undo *cleanup.Stack) error {
	at := len(t.spec.Mounts) - len(t.sources)
	for i, s := range t.sources {
		target := filepath.Join(bundle, "bind"+strconv.Itoa(i))
		if err := bindPart(s, target); err != nil {
			return fmt.Errorf("mount %s: %w", s.dest, err)
		}
		undo.Add(func() error { return snapshot.Detach(target) })
		t.spec.Mounts[at+i].Source = target
	}
	return nil
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

// wait waits for the end of cmd, and brings it about when ctx ends.
func (r *runcRuntime) wait(ctx context.Context, cmd *exec.Cmd, id string, group *cgroup.Group, exit *exit) error {
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		exit.killed = true
		err = r.kill(cmd, id, group, done)
	}
	exit.code = cmd.ProcessState.ExitCode()
	var status *exec.ExitError
	if errors.As(err, &status) {
		err = nil
	}
	exit.usage.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return err
}

// kill sends TERM, then KILL, and at last kills whatever there is. Errors of
// the first two are of a container that isn't or is no longer there.
func (r *runcRuntime) kill(cmd *exec.Cmd, id string, group *cgroup.Group, done <-chan error) error {
	for _, attempt := range []func(){
		func() { group.Signal(unix.SIGTERM) },                             //nolint:errcheck
		func() { r.command("kill", id, "KILL").Run() },                    //nolint:errcheck
		func() { unix.Kill(-cmd.Process.Pid, unix.SIGKILL) },              //nolint:errcheck
		func() { group.Kill(); r.command("delete", "--force", id).Run() }, //nolint:errcheck
	} {
		attempt()
		timer := time.NewTimer(r.grace)
		select {
		case err := <-done:
			timer.Stop()
			return errors.Join(err, group.Kill())
		case <-timer.C:
		}
	}
	return errors.Join(<-done, group.Kill())
}

// remove makes the runtime forget the container, and removes its cgroup if
// that was all it did.
func (r *runcRuntime) remove(id string, group *cgroup.Group) error {
	out, err := r.command("delete", "--force", id).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("delete container: %w: %s", err, bytes.TrimSpace(out))
	}
	return errors.Join(err, group.Remove())
}

// startError finds out whether the runtime failed rather than the process.
func startError(logfile, program string) error {
	f, err := os.Open(logfile)
	if err != nil {
		return nil // it logs only when something is wrong
	}
	defer f.Close()
	var message string
	for scan := bufio.NewScanner(f); scan.Scan(); {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(scan.Bytes(), &entry) == nil && entry.Level == "error" {
			message = entry.Msg
		}
	}
	if message == "" {
		return nil
	}
	_, text, isExec := strings.Cut(message, `exec: "`)
	if !isExec {
		return fmt.Errorf("OCI runtime: %s", message)
	}
	for _, known := range []error{native.ErrNotInPath, unix.ENOENT, unix.EACCES, unix.ENOEXEC} {
		if strings.Contains(text, known.Error()) {
			return &native.ExecError{Path: program, Err: known}
		}
	}
	return &native.ExecError{Path: program, Err: errors.New(text)}
}
