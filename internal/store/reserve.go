package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	reserveName = "kiln.reserve"
	// reserveSize is room for a few commits: enough to record what is removed,
	// after which files go and the disk has room again.
	reserveSize = 1 << 20
)

// fillReserve takes disk space for a time when there is none. Without it a full
// disk would stay full: files go only after a commit that says so.
func (d *DB) fillReserve() error {
	f, err := os.OpenFile(d.reservePath(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("reserve disk space: %w", err)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = nil // such a file system can't promise space
	}
	if err != nil {
		err = fmt.Errorf("reserve disk space: %w", err)
	}
	return errors.Join(err, f.Close())
}

// Size is what the database and its reserve take on disk, in bytes of allocated
// blocks, and the paths of both.
func (d *DB) Size() (database, reserve int64, paths []string, err error) {
	paths = []string{d.path, d.reservePath()}
	var sizes [2]int64
	for i, path := range paths {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil && !errors.Is(err, syscall.ENOENT) {
			return 0, 0, nil, fmt.Errorf("measure %s: %w", path, err)
		}
		sizes[i] = st.Blocks * 512
	}
	return sizes[0], sizes[1], paths, nil
}

func (d *DB) reservePath() string { return filepath.Join(d.root.Name(), reserveName) }

// persistReserved is persist with the reserve given up when the disk is full, and
// taken again as soon as there is room.
func (d *DB) persistReserved(g *group) error {
	err := d.persist(g)
	if isFull(err) && !d.spent {
		if rerr := os.Remove(d.reservePath()); rerr != nil {
			return errors.Join(err, rerr)
		}
		d.spent = true
		err = d.persist(g)
	}
	if err == nil && d.spent {
		// As long as the disk is full this fails, and is tried at the next commit.
		d.spent = d.fillReserve() != nil
	}
	return err
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
