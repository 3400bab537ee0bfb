package crashtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

const diskSize = 1 << 30

// disk is an ext4 file system in a file whose power can be cut.
type disk struct {
	image, dir string
	mounted    bool
}

func newDisk(parent string) (_ *disk, err error) {
	d := &disk{image: filepath.Join(parent, "disk.img"), dir: filepath.Join(parent, "disk")}
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Create(d.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if err := command("mkfs.ext4", "-q", "-F", d.image); err != nil {
		return nil, err
	}
	return d, d.mount()
}

func command(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, out.String())
	}
	return nil
}

func (d *disk) mount() error {
	// The loop device goes with the last user of it.
	if err := command("mount", "-o", "loop", d.image, d.dir); err != nil {
		return err
	}
	d.mounted = true
	return nil
}

const (
	extShutdown   = 0x8004587d // EXT4_IOC_SHUTDOWN: _IOR('X', 125, __u32)
	noFlushOfLogs = 2          // EXT4_GOING_FLAGS_NOLOGFLUSH
)

// cut ends all writing to the disk at once: what isn't there by now is lost.
func (d *disk) cut() error {
	f, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	flags := uint32(noFlushOfLogs)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), extShutdown, uintptr(unsafe.Pointer(&flags)))
	if errno != 0 {
		err = fmt.Errorf("shut down the file system of %s: %w", d.dir, errno)
	}
	return errors.Join(err, f.Close())
}

// remount brings the power back. Nobody may use the disk any more.
func (d *disk) remount() error {
	if err := d.unmount(); err != nil {
		return err
	}
	return d.mount()
}

func (d *disk) unmount() error {
	if !d.mounted {
		return nil
	}
	// Processes of steps end a moment after their daemon.
	err := harness.WaitFor(harness.Patience, func() error { return unix.Unmount(d.dir, 0) })
	if err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	d.mounted = false
	// A process with a mount namespace of its own keeps the file system, and the
	// loop device.
	return harness.WaitFor(harness.Patience, func() error {
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			return err
		}
		for _, f := range files {
			if data, _ := os.ReadFile(f); strings.HasPrefix(string(data), d.image) { // gone meanwhile is fine
				return fmt.Errorf("%s is still in use: %s", d.image, f)
			}
		}
		return nil
	})
}

func (d *disk) close() error {
	err := d.unmount()
	if err != nil && d.mounted {
		err = errors.Join(err, unix.Unmount(d.dir, unix.MNT_DETACH))
	}
	return errors.Join(err, os.Remove(d.image))
}
