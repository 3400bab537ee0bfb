package faultdisk

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, size))
	return errors.Join(err, f.Sync(), f.Close())
}

// What fails on the disk fails the sync of a file on it, and no longer once the
// disk is whole again.
func TestFaults(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
	d, err := New(t.TempDir())
	must(t, err)
	defer func() { must(t, d.Close()) }()
	file := filepath.Join(d.Dir, "f")
	must(t, write(file, 1<<20))
	must(t, d.Fail(Fault{After: 1 << 30, Errno: syscall.EIO}))
	must(t, write(file, 1<<20))
	asked, failed, err := d.Heal()
	must(t, err)
	if asked < 2 || failed != 0 {
		t.Errorf("%d of %d requests failed", failed, asked)
	}
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC, Torn} {
		must(t, d.Fail(Fault{Errno: errno}))
		if err := write(file, 1<<20); err == nil {
			t.Errorf("errno %d: no error", errno)
		}
		if _, failed, err := d.Heal(); err != nil || failed == 0 {
			t.Errorf("errno %d: %d requests failed, %v", errno, failed, err)
		}
		must(t, d.Unmount())
		must(t, d.Mount())
		must(t, write(file, 1<<20))
	}
	must(t, d.Unmount())
	must(t, d.Mount())
	must(t, d.Fail(Fault{Errno: syscall.EIO, Reads: true}))
	if _, err := os.ReadFile(file); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	if _, failed, err := d.Heal(); err != nil || failed == 0 {
		t.Errorf("read: %d requests failed, %v", failed, err)
	}
	must(t, d.Unmount())
	must(t, d.Mount())
	if data, err := os.ReadFile(file); err != nil || len(data) != 1<<20 {
		t.Errorf("afterwards: %d bytes, %v", len(data), err)
	}
	root, err := os.Open(d.Dir)
	must(t, err)
	defer root.Close()
	must(t, d.Fail(Fault{Times: 1, Errno: syscall.EIO}))
	must(t, os.WriteFile(file, make([]byte, 1<<20), 0o600))
	if err := unix.Syncfs(int(root.Fd())); err == nil {
		t.Error("the sync of the file system didn't fail")
	}
}
