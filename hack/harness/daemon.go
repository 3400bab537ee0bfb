package harness

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Daemon is a kilnd that is started and taken down again and again, on the same
// state. One caller at a time uses it.
type Daemon struct {
	Root string // its state
	Addr string // of its socket

	bin, config, cgroup string
	cmd                 *exec.Cmd // nil while it doesn't run
	log                 *Output   // of its last life
}

// NewDaemon returns the daemon with that binary, state directory and kilnd.toml,
// to which the cgroup of its steps is added. It doesn't run yet.
func NewDaemon(bin, root, config string) (*Daemon, error) {
	dir, err := os.MkdirTemp("", "kiln-daemon-") // paths of sockets are short
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		Root: root, Addr: "unix://" + filepath.Join(dir, "s"),
		bin: bin, config: filepath.Join(dir, "kilnd.toml"), cgroup: fmt.Sprintf("/kiln-test-%d-%s", os.Getpid(), filepath.Base(dir)), log: &Output{},
	}
	config = fmt.Sprintf("[worker.oci]\ndefaultCgroupParent = %q\n", d.cgroup) + config
	return d, os.WriteFile(d.config, []byte(config), 0o644)
}

// Log is what it wrote since it was last started.
func (d *Daemon) Log() string { return d.log.String() }

// Start runs the daemon and waits until it can build.
func (d *Daemon) Start() error {
	if err := d.run(); err != nil {
		return err
	}
	// A gRPC client that finds nobody would come back after a second only.
	err := WaitFor(Patience, func() error {
		c, err := net.Dial("unix", strings.TrimPrefix(d.Addr, "unix://"))
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err == nil {
		err = Ready(d.Addr)
	}
	if err != nil {
		return fmt.Errorf("kilnd does not answer: %w\n%s", errors.Join(err, d.Kill()), d.Log())
	}
	return nil
}

func (d *Daemon) run() error {
	d.log = &Output{}
	cmd := exec.Command(d.bin, "--root", d.Root, "--addr", d.Addr, "--config", d.config)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	if err := cmd.Start(); err != nil {
		return err
	}
	d.cmd = cmd
	return nil
}

// StartAndKill kills a daemon that may not have opened its state yet.
func (d *Daemon) StartAndKill(after time.Duration) error {
	if err := d.run(); err != nil {
		return err
	}
	timer := time.NewTimer(after)
	<-timer.C
	return d.Kill()
}

// Kill ends the daemon as the kernel would, if it runs.
func (d *Daemon) Kill() error {
	if d.cmd == nil {
		return nil
	}
	err := d.cmd.Process.Kill()
	d.cmd.Wait() // says that it was killed
	d.cmd = nil
	return err
}

// Stop ends it as an init system would. That it ended before, or panicked, is an
// error.
func (d *Daemon) Stop() error {
	err := d.cmd.Process.Signal(syscall.SIGTERM)
	err = errors.Join(err, d.cmd.Wait())
	d.cmd = nil
	if err == nil && strings.Contains(d.Log(), "panic") {
		err = errors.New("it panicked")
	}
	if err != nil {
		return fmt.Errorf("stop kilnd: %w\n%s", err, d.Log())
	}
	return nil
}

// Close ends a daemon that still runs, and removes what only the next one would.
func (d *Daemon) Close() error {
	err := d.Kill()
	// A step's processes end a moment after their daemon.
	gone := WaitFor(Patience, d.removeCgroups)
	return errors.Join(err, gone, os.RemoveAll(filepath.Dir(d.config)))
}

func (d *Daemon) removeCgroups() (err error) {
	for _, dir := range slices.Backward(d.cgroups()) { // children first
		if rerr := os.Remove(dir); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// cgroups are the directories of the daemon's cgroups. What goes away while they
// are looked for is none.
func (d *Daemon) cgroups() (dirs []string) {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*" + d.cgroup) // the pattern is good
	for _, top := range append(tops, "/sys/fs/cgroup"+d.cgroup) {
		filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	return dirs
}

// Fsck looks at the state of the daemon, which doesn't run. args are further
// flags of kilnd fsck.
func (d *Daemon) Fsck(args ...string) (report string, err error) {
	cmd := exec.Command(d.bin, append([]string{"fsck", "--root", d.Root}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%w\n%s%s", err, out.String(), errs.String())
	}
	return strings.TrimSpace(out.String()), err
}

// Leftovers says which mounts and processes of steps of the daemon's are there,
// while nothing is built. It is empty if there are none.
func (d *Daemon) Leftovers() (string, error) {
	var out strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.Root+"/") {
			fmt.Fprintf(&out, "mounted: %s", line)
		}
	}
	for _, dir := range d.cgroups() {
		procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENODEV) {
			return "", err
		}
		if len(bytes.TrimSpace(procs)) > 0 {
			fmt.Fprintf(&out, "processes in %s: %q\n", dir, procs)
		}
	}
	return out.String(), nil
}
