package faulttest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/hack/harness"
)

const waitLong = 30 * time.Second

// daemon is the kilnd under test.
type daemon struct {
	bin, root, addr, config, cgroup string

	cmd *exec.Cmd
	log *harness.Output // of its last life
}

func newDaemon(bin, root string) (*daemon, error) {
	dir, err := os.MkdirTemp("", "kiln-fault-") // paths of sockets are short
	if err != nil {
		return nil, err
	}
	d := &daemon{bin: bin, root: root, addr: "unix://" + filepath.Join(dir, "s"), config: filepath.Join(dir, "kilnd.toml")}
	d.cgroup = fmt.Sprintf("/kiln-fault-%d", os.Getpid())
	conf := fmt.Sprintf("[worker.oci]\ngc = false\ndefaultCgroupParent = %q\n[registry.%q]\nhttp = true\n", d.cgroup, "127.0.0.1")
	return d, os.WriteFile(d.config, []byte(conf), 0o644)
}

// start runs the daemon and waits until it can build.
func (d *daemon) start() error {
	d.log = &harness.Output{}
	d.cmd = exec.Command(d.bin, "--root", d.root, "--addr", d.addr, "--config", d.config)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	err := harness.WaitFor(waitLong, func() error { return harness.Ready(d.addr) })
	if err != nil {
		return fmt.Errorf("kilnd does not answer: %w\n%s", errors.Join(err, d.kill()), d.log)
	}
	return nil
}

// ask calls fn with a client.
func (d *daemon) ask(fn func(ctx context.Context, c *client.Client) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), waitLong)
	defer cancel()
	c, err := client.New(d.addr, client.Options{})
	if err != nil {
		return err
	}
	return errors.Join(fn(ctx, c), c.Close())
}

func (d *daemon) kill() error {
	if d.cmd == nil {
		return nil
	}
	err := d.cmd.Process.Kill()
	d.cmd.Wait() // says that it was killed
	d.cmd = nil
	return err
}

// stop ends it as an init system would. That it ended before is an error.
func (d *daemon) stop() error {
	err := d.cmd.Process.Signal(syscall.SIGTERM)
	err = errors.Join(err, d.cmd.Wait())
	d.cmd = nil
	if err == nil && strings.Contains(d.log.String(), "panic") {
		err = errors.New("it panicked")
	}
	if err != nil {
		return fmt.Errorf("stop kilnd: %w\n%s", err, d.log)
	}
	return nil
}

// close ends a daemon that still runs, and removes what only the next one would.
func (d *daemon) close() error {
	err := d.kill()
	return errors.Join(err, harness.WaitFor(5*time.Second, d.removeCgroups), os.RemoveAll(filepath.Dir(d.config)))
}

func (d *daemon) removeCgroups() (err error) {
	dirs, err := filepath.Glob("/sys/fs/cgroup/*" + d.cgroup)
	dirs = append(dirs, "/sys/fs/cgroup"+d.cgroup)
	for _, top := range dirs {
		var all []string
		filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				all = append(all, path)
			}
			return nil // what goes away meanwhile needs no removal
		})
		for _, dir := range slices.Backward(all) { // children first
			if rerr := os.Remove(dir); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}
	return err
}

// fsck looks at all of the state of the daemon, which doesn't run.
func (d *daemon) fsck(args ...string) (report string, err error) {
	out, err := exec.Command(d.bin, append([]string{"fsck", "--deep", "--root", d.root}, args...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// addsUp returns an error if what du says differs from what there is by more than 1 %.
func (d *daemon) addsUp(ctx context.Context) error {
	var said, on int64
	var report *client.UsageReport
	err := d.ask(func(ctx context.Context, c *client.Client) (err error) {
		report, err = c.UsageReport(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("du: %w", err)
	}
	for _, p := range report.Space {
		said += p.Bytes
	}
	seen := map[uint64]bool{} // files with several names
	err = filepath.WalkDir(d.root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		err = syscall.Lstat(path, &st)
		if !seen[st.Ino] {
			seen[st.Ino] = true
			on += st.Blocks * 512
		}
		return err
	})
	if off := said - on; err == nil && (off > on/100 || -off > on/100) {
		err = fmt.Errorf("du says %d, there are %d bytes: %v", said, on, report.Space)
	}
	return err
}
