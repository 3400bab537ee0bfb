package faultdisk

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// aloneName is set in the environment of a program that has its mounts to itself.
const aloneName = "KILN_FAULTDISK_ALONE"

// beAlone starts the program over with mounts of its own: others that copy theirs
// meanwhile would keep the disk in use. A user who may not do that goes on as he is,
// and can't mount the disk either.
func beAlone() error {
	if os.Getenv(aloneName) != "" {
		return nil
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return nil
	}
	err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), letGo())
	if err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), aloneName+"=1"))
	}
	return fmt.Errorf("start over with mounts of its own: %w", err)
}

// letGo unmounts the copies of others' disks, which would keep those in use.
func letGo() (err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || len(kind) < 2 || !strings.HasPrefix(kind[1], "/dev/loop") {
			continue
		}
		if uerr := detach(fields[4]); uerr != nil {
			err = errors.Join(err, uerr)
		}
	}
	return errors.Join(err, lines.Err())
}
