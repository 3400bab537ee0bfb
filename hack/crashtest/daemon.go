package crashtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/hack/harness"
	control "github.com/moby/buildkit/api/services/control"
)

// daemon is the kilnd under test.
type daemon struct {
	bin, root, addr, config, cgroup string

	cmd *exec.Cmd
	log *logBuffer
}

func newDaemon(bin, dir, root string, alone bool) (*daemon, error) {
	// Paths of sockets are short.
	sock, err := os.MkdirTemp("", "kiln-crash-")
	if err != nil {
		return nil, err
	}
	d := &daemon{bin: bin, root: root, addr: "unix://" + filepath.Join(sock, "s"), config: filepath.Join(sock, "kilnd.toml"), log: &logBuffer{}}
	d.cgroup = fmt.Sprintf("/kiln-crash-%d-%s", os.Getpid(), filepath.Base(sock))
	conf := fmt.Sprintf("[worker.oci]\ndefaultCgroupParent = %q\n[[worker.oci.gcpolicy]]\nall = true\nkeepDuration = %q\nmaxUsedSpace = %d\n",
		d.cgroup, kept, mostUsed)
	if alone {
		conf += "[kiln]\nunclaimedStepTimeout = 0\n" // its steps end with it
	}
	return d, os.WriteFile(d.config, []byte(conf), 0o644)
}

const (
	// kept is how long what was used isn't collected as garbage. What is younger
	// and gone is lost.
	kept = 30 * time.Second
	// mostUsed is when garbage is collected: always.
	mostUsed = 1 << 20
)

// prune has the daemon remove what its garbage collection would.
func (d *daemon) prune(ctx context.Context) (removed int, err error) {
	c, err := client.New(d.addr, client.Options{})
	if err != nil {
		return 0, err
	}
	err = c.Prune(ctx, client.PruneOptions{All: true, KeepDuration: kept, MaxUsedSpace: mostUsed}, func(*control.UsageRecord) error {
		removed++
		return nil
	})
	return removed, errors.Join(err, c.Close())
}

// run starts the process.
func (d *daemon) run() error {
	d.cmd = exec.Command(d.bin, "--root", d.root, "--addr", d.addr, "--config", d.config)
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	return d.cmd.Start()
}

// startAndKill kills a daemon that may not have opened its state yet.
func (d *daemon) startAndKill(after time.Duration) error {
	if err := d.run(); err != nil {
		return err
	}
	timer := time.NewTimer(after)
	<-timer.C
	return d.kill()
}

// start runs the daemon and waits until it can build.
func (d *daemon) start() error {
	if err := d.run(); err != nil {
		return err
	}
	// A client that finds nobody would come back after a second only.
	err := harness.WaitFor(30*time.Second, func() error {
		c, err := net.Dial("unix", strings.TrimPrefix(d.addr, "unix://"))
		if err != nil {
			return err
		}
		return c.Close()
	})
	if err == nil {
		err = harness.Ready(d.addr)
	}
	if err != nil {
		return fmt.Errorf("kilnd does not answer: %w\n%s", errors.Join(err, d.kill()), d.tail())
	}
	return nil
}

// kill ends the daemon as the kernel would.
func (d *daemon) kill() error {
	if d.cmd == nil {
		return nil
	}
	err := d.cmd.Process.Kill()
	d.cmd.Wait() // says that it was killed
	d.cmd = nil
	return err
}

// stop ends it as an init system would.
func (d *daemon) stop() error {
	err := d.cmd.Process.Signal(syscall.SIGTERM)
	err = errors.Join(err, d.cmd.Wait())
	d.cmd = nil
	if err != nil {
		return fmt.Errorf("stop kilnd: %w\n%s", err, d.tail())
	}
	return nil
}

// close ends a daemon that still runs, and removes what only the next one would.
func (d *daemon) close() error {
	err := d.kill()
	// A step's processes end a moment after their daemon.
	gone := harness.WaitFor(5*time.Second, d.removeCgroups)
	return errors.Join(err, gone, os.RemoveAll(filepath.Dir(d.config)))
}

func (d *daemon) removeCgroups() error {
	var dirs []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && strings.Contains(path, d.cgroup) {
			dirs = append(dirs, path)
		}
		return nil // what goes away meanwhile needs no removal
	})
	for _, dir := range slices.Backward(dirs) { // children first
		if rerr := os.Remove(dir); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// fsck looks at the state of the daemon, which doesn't run; if deep, at all
// content too.
func (d *daemon) fsck(deep bool) (report string, err error) {
	cmd := exec.Command(d.bin, "fsck", "--root", d.root, fmt.Sprintf("--deep=%t", deep))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return strings.TrimSpace(out.String()), fmt.Errorf("%w\n%s%s", err, out.String(), errs.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// leftovers says which mounts and processes of the daemon's are there. It must
// be called while nothing is built.
func (d *daemon) leftovers() string {
	var out strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, d.root+"/") {
			fmt.Fprintf(&out, "mounted: %s", line)
		}
	}
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.Name() != "cgroup.procs" || !strings.Contains(path, d.cgroup) {
			return nil // what goes away meanwhile is nothing left
		}
		if data, _ := os.ReadFile(path); len(bytes.TrimSpace(data)) > 0 {
			fmt.Fprintf(&out, "processes in %s: %q\n", path, data)
		}
		return nil
	})
	if err != nil {
		return err.Error()
	}
	return out.String()
}

// tail is the end of the daemon's log.
func (d *daemon) tail() string { return d.log.tail() }

// logBuffer keeps the end of a log.
type logBuffer struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

const logKept = 16 << 10

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if len(b.buf) > 2*logKept {
		b.buf = append([]byte(nil), b.buf[len(b.buf)-logKept:]...)
	}
	return len(p), nil
}

func (b *logBuffer) tail() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.buf[max(0, len(b.buf)-logKept):])
}
