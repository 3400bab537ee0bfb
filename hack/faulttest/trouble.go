package faulttest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/kilnbuild/kiln/hack/faultdisk"
	"golang.org/x/sys/unix"
)

// failing is a disk whose requests fail.
type failing struct {
	disk  *faultdisk.Disk
	fault faultdisk.Fault
}

func (f *failing) String() string {
	what, times, errno := "writes", "all", f.fault.Errno.Error()
	if f.fault.Reads {
		what = "reads"
	}
	if f.fault.Times > 0 {
		times = fmt.Sprint(f.fault.Times)
	}
	if f.fault.Errno == faultdisk.Torn {
		errno = "torn"
	}
	return fmt.Sprintf("%s %s fail after %d, %s", times, what, f.fault.After, errno)
}

func (f *failing) begin() error { return f.disk.Fail(f.fault) }

func (f *failing) end() (bool, error) {
	_, failed, err := f.disk.Heal()
	return failed > 0, err
}

func (f *failing) cold() bool { return f.fault.Reads }

func (f *failing) known(text, _ string) bool {
	text = strings.ToLower(text)
	for _, known := range []string{"input/output error", "i/o error", "no space left", "read-only file system", "structure needs cleaning", "bus error"} {
		if strings.Contains(text, known) {
			return true
		}
	}
	// A program that can't be read from the disk any more.
	return f.fault.Reads && strings.Contains(text, "segmentation fault")
}

// full is a disk with room for few bytes.
type full struct {
	disk *faultdisk.Disk
	room int64
}

func (f *full) String() string { return fmt.Sprintf("full but for %d bytes", f.room) }

func (f *full) filler() string { return filepath.Join(f.disk.Dir, "filler") }

func (f *full) begin() error {
	file, err := os.Create(f.filler())
	if err != nil {
		return err
	}
	// What was written must have its place first.
	if err := unix.Syncfs(int(file.Fd())); err != nil {
		return errors.Join(err, file.Close())
	}
	size := int64(0)
	for step := int64(16 << 20); step >= 4096; { // to the last block
		if err = unix.Fallocate(int(file.Fd()), 0, size, step); err == nil {
			size += step
		} else if errors.Is(err, syscall.ENOSPC) {
			err, step = nil, step/2
		} else {
			break
		}
	}
	if err == nil {
		err = file.Truncate(max(size-f.room, 0))
	}
	return errors.Join(err, file.Close())
}

func (f *full) end() (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(f.disk.Dir, &st)
	return int64(st.Bfree)*st.Bsize < f.room, errors.Join(err, os.Remove(f.filler()))
}

func (f *full) cold() bool { return false }

// known wants the numbers.
func (f *full) known(text, root string) bool {
	return strings.Contains(text, "the disk that holds "+root+" is full: more is needed than the ") && strings.Contains(text, " that are free")
}
