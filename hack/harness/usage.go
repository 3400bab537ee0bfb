package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/client"
	"golang.org/x/sys/unix"
)

// AddsUp compares what the kilnd at addr reports to take on disk with what is
// below root, its state directory: an error if they differ by more than 1 %. It
// gives a daemon that deletes files, or ends a step, time to finish.
func AddsUp(ctx context.Context, addr, root string) error {
	c, err := client.New(addr, client.Options{})
	if err != nil {
		return err
	}
	err = WaitFor(Patience, func() error { return addsUp(ctx, c, root) })
	return errors.Join(err, c.Close())
}

func addsUp(ctx context.Context, c *client.Client, root string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	report, err := c.UsageReport(ctx)
	if err != nil {
		return err
	}
	said := int64(0)
	for _, p := range report.Space {
		said += p.Bytes
	}
	held, err := onDisk(root)
	if err != nil {
		return err
	}
	if off := said - held; off > held/100 || -off > held/100 {
		return fmt.Errorf("du says %d bytes, %s has %d: %s", said, root, held, describe(report.Space))
	}
	return nil
}

func describe(parts []client.SpacePart) string {
	var out []string
	for _, p := range parts {
		out = append(out, fmt.Sprintf("%s %d", p.Name, p.Bytes))
	}
	return strings.Join(out, ", ")
}

// onDisk is what is allocated below root. A file with several names counts once,
// and what is mounted there not at all.
func onDisk(root string) (bytes int64, err error) {
	var top unix.Stat_t
	if err := unix.Lstat(root, &top); err != nil {
		return 0, fmt.Errorf("measure %s: %w", root, err)
	}
	seen := map[uint64]bool{}
	err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		switch {
		case errors.Is(err, unix.ENOENT): // gone since its directory was read
			return nil
		case err != nil:
			return fmt.Errorf("measure %s: %w", path, err)
		case st.Dev != top.Dev:
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes, err
}
