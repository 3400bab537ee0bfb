// Package faultdisk is a disk for tests that fails when it is told to: an ext4
// file system on a loop device, whose bytes are in a process that this package
// starts and that may answer any write or flush with an error. So what a failing
// disk does to a store can be tried at every point, with the kernel's own file
// system in between.
//
// What the kernel has in memory it doesn't read: a fault of reads is met after
// Unmount and Mount.
//
// It needs root, /dev/fuse, loop devices and mkfs.ext4. The kernel's own ways to
// make a disk fail (dm-flakey, fail_make_request) are often not built in.
package faultdisk

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

const (
	diskSize   = 64 << 20
	deviceName = "device"
	mountName  = "disk"
)

// Torn as a Fault's Errno makes a write end in the middle, with EIO. (Told of a
// short write, the kernel's loop device takes it for a whole one.)
const Torn syscall.Errno = 1 << 20

// Fault says which requests fail: of those that write or flush, or read if Reads is
// set, and that come after it was set, the ones after the first After; Times of
// them, or all if that is 0, with Errno.
type Fault struct {
	After, Times int
	Errno        syscall.Errno
	Reads        bool
}

// Disk is the disk. It isn't for several goroutines.
type Disk struct {
	Dir string // where the file system is, while it is mounted

	parent  string
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	answers *bufio.Scanner
	stderr  bytes.Buffer
	mounted bool
}

// New makes a disk under the directory parent and mounts it. The calling program
// must call Main first thing.
func New(parent string) (_ *Disk, err error) {
	d := &Disk{parent: parent, Dir: filepath.Join(parent, mountName)}
	device := filepath.Join(parent, "fuse")
	if err := errors.Join(os.Mkdir(device, 0o700), os.Mkdir(d.Dir, 0o700)); err != nil {
		return nil, err
	}
	d.cmd = exec.Command("/proc/self/exe", device)
	d.cmd.Env = append(os.Environ(), servesName+"=1")
	d.cmd.Stderr = &d.stderr
	if d.stdin, err = d.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	d.answers = bufio.NewScanner(out)
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the disk: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if answer, err := d.answer(); err != nil || answer != "ready" {
		return nil, fmt.Errorf("start the disk: %q, %w", answer, err)
	}
	if err := command("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", d.device()); err != nil {
		return nil, err
	}
	return d, d.Mount()
}

func (d *Disk) device() string { return filepath.Join(d.parent, "fuse", deviceName) }

func (d *Disk) answer() (string, error) {
	if !d.answers.Scan() {
		return "", fmt.Errorf("the disk's process has ended: %w %s", d.answers.Err(), d.stderr.String())
	}
	return d.answers.Text(), nil
}

// tell gives a command and returns how many requests there were since the last
// one, and how many of them failed.
func (d *Disk) tell(line string) (asked, failed int, err error) {
	if _, err := fmt.Fprintln(d.stdin, line); err != nil {
		return 0, 0, fmt.Errorf("tell the disk: %w", err)
	}
	text, err := d.answer()
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscan(text, &asked, &failed); err != nil {
		return 0, 0, fmt.Errorf("the disk's answer %q: %w", text, err)
	}
	return asked, failed, nil
}

// Fail sets a fault.
func (d *Disk) Fail(f Fault) error {
	_, _, err := d.tell(fmt.Sprint(f.After, f.Times, int(f.Errno), f.Reads))
	return err
}

// Heal ends the fault. It returns how many requests there were of its kind since it
// was set, or since the last Heal, and how many of those failed.
func (d *Disk) Heal() (asked, failed int, err error) { return d.tell("") }

// Mount mounts the file system. What it has noted about errors is repaired first,
// as after a restart of the machine.
func (d *Disk) Mount() error {
	if err := command("e2fsck", "-p", d.device()); err != nil {
		// 1 says that something was repaired.
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			return err
		}
	}
	if err := command("mount", "-t", "ext4", "-o", "loop", d.device(), d.Dir); err != nil {
		return err
	}
	d.mounted = true
	return nil
}

// Unmount unmounts it. Nobody may use it any more.
func (d *Disk) Unmount() error {
	if !d.mounted {
		return nil
	}
	// Processes of steps end a moment after what started them.
	if err := harness.WaitFor(harness.Patience, func() error { return unix.Unmount(d.Dir, 0) }); err != nil {
		return fmt.Errorf("unmount %s: %w", d.Dir, err)
	}
	d.mounted = false
	// The loop device goes a moment after its last user.
	return harness.WaitFor(harness.Patience, func() error {
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			return err
		}
		for _, f := range files {
			if data, _ := os.ReadFile(f); strings.HasPrefix(string(data), d.device()) { // gone meanwhile is fine
				return fmt.Errorf("%s is still in use: %s", d.device(), f)
			}
		}
		return nil
	})
}

// Close unmounts the file system and ends the disk.
func (d *Disk) Close() error {
	err := errors.Join(d.Unmount(), d.stdin.Close())
	if werr := d.cmd.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("the disk's process: %w: %s", werr, d.stderr.String()))
	}
	return err
}

func command(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
