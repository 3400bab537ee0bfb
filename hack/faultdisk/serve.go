package faultdisk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// servesName is set in the environment of the process that is the disk.
const servesName = "KILN_FAULTDISK"

// Main is for TestMain to call first. In a process that New started it is the disk,
// and doesn't return. In any other it gives the program mounts of its own.
//
// The disk is a process of its own because it must answer while all threads of the test
// wait for it, the garbage collector's included: a page fault can't be interrupted.
func Main() {
	if os.Getenv(servesName) == "" {
		if err := beAlone(); err != nil {
			fmt.Fprintln(os.Stderr, "faultdisk:", err)
			os.Exit(1)
		}
		return
	}
	// A signal of the terminal is for who started it, and still needs the disk.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	if err := serve(os.Args[1], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "faultdisk:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve shows the disk as a file in the directory dir until there are no more
// commands.
func serve(dir string, commands io.Reader, answers io.Writer) (err error) {
	d := &device{}
	if d.data, err = unix.Mmap(-1, 0, diskSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE); err != nil {
		return fmt.Errorf("memory for the disk: %w", err)
	}
	root := &fs.Inode{}
	options := &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "faultdisk", DisableXAttrs: true, MaxWrite: 1 << 20}}
	options.OnAdd = func(ctx context.Context) {
		root.AddChild(deviceName, root.NewPersistentInode(ctx, d, fs.StableAttr{Mode: unix.S_IFREG}), false)
	}
	if _, err := fs.Mount(dir, root, options); err != nil {
		return fmt.Errorf("mount the disk at %s: %w", dir, err)
	}
	fmt.Fprintln(answers, "ready")
	lines := bufio.NewScanner(commands)
	for lines.Scan() {
		if _, err := fmt.Fprintln(answers, d.command(lines.Text())); err != nil {
			break
		}
	}
	// Whoever gave the commands may have died with the file system still mounted.
	return errors.Join(lines.Err(), detach(filepath.Join(filepath.Dir(dir), mountName)), detach(dir))
}

// detach unmounts what is at path, if anything.
func detach(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// device is the file that the loop device stands on.
type device struct {
	fs.Inode

	mu    sync.Mutex // guards the fields below
	data  []byte
	fault Fault
	armed bool
	asked int // requests of the fault's kind, since it was set
	hit   int // of those, the ones that failed
}

var _ interface {
	fs.NodeGetattrer
	fs.NodeOpener
	fs.NodeReader
	fs.NodeWriter
	fs.NodeFsyncer
} = (*device)(nil)

// command obeys a line and returns the answer.
func (d *device) command(line string) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	asked, hit := d.asked, d.hit
	d.asked, d.hit, d.armed, d.fault.Reads = 0, 0, false, false
	if line != "" {
		d.armed = true
		if _, err := fmt.Sscan(line, &d.fault.After, &d.fault.Times, &d.fault.Errno, &d.fault.Reads); err != nil {
			return fmt.Sprintf("command %q: %v", line, err)
		}
	}
	return fmt.Sprint(asked, hit)
}

// failsLocked counts a request, and says whether it fails.
func (d *device) failsLocked(reads bool) bool {
	f := d.fault
	if reads != f.Reads {
		return false
	}
	d.asked++
	if !d.armed || d.asked <= f.After || f.Times > 0 && d.hit >= f.Times {
		return false
	}
	d.hit++
	return true
}

func (d *device) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Nlink = unix.S_IFREG|0o600, diskSize, 1
	return 0
}

func (d *device) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (d *device) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failsLocked(true) {
		return nil, d.fault.errno()
	}
	n := 0
	if off < diskSize {
		n = copy(dest, d.data[off:])
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (d *device) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off+int64(len(data)) > diskSize {
		return 0, syscall.ENOSPC
	}
	if !d.failsLocked(false) {
		return uint32(copy(d.data[off:], data)), 0
	}
	if d.fault.Errno == Torn {
		copy(d.data[off:], data[:len(data)/2])
	}
	return 0, d.fault.errno()
}

func (d *device) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.failsLocked(false) {
		return 0
	}
	return d.fault.errno()
}

// errno is what who asked is told.
func (f Fault) errno() syscall.Errno {
	if f.Errno == Torn {
		return syscall.EIO
	}
	return f.Errno
}
