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

// reserveStep is by how much less is reserved when there isn't room for all.
const reserveStep = 64 << 10

// fillReserve takes disk space for a time when there is none: reserveSize, or
// as much as there is. Without it a full disk would stay full: files go only
// after a commit that says so.
func (d *DB) fillReserve() (complete bool, err error) {
	f, err := os.OpenFile(d.reservePath(), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, fmt.Errorf("reserve disk space: %w", err)
	}
	for size := int64(reserveSize); size > 0; size -= reserveStep {
		if err = unix.Fallocate(int(f.Fd()), 0, 0, size); !isFull(err) {
			complete = err == nil && size == reserveSize
			break
		}
	}
	switch {
	case errors.Is(err, syscall.EOPNOTSUPP):
		complete, err = true, nil // such a file system can't promise space
	case isFull(err):
		err = nil
	case err != nil:
		err = fmt.Errorf("reserve disk space: %w", err)
	}
	return complete, errors.Join(err, f.Close())
}

func (d *DB) reservePath() string { return filepath.Join(d.root.Name(), reserveName) }

// persistReserved is persist with the reserve given up when the disk is full,
// and taken again as soon as there is room. Only what removes something may have
// it: anything else would use it up, and then nothing could make room any more.
func (d *DB) persistReserved(g *group) error {
	err := d.persist(g)
	lost := (*syncError)(nil) // of files; what the reserve is for are records
	if isFull(err) && g.removes() && !errors.As(err, &lost) {
		if rerr := os.Remove(d.reservePath()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			return errors.Join(err, rerr)
		}
		d.spent = true
		err = d.persist(g)
	}
	if d.spent {
		// What can't be had now is tried for again at the next commit.
		complete, ferr := d.fillReserve()
		d.spent = !complete || ferr != nil
	}
	return err
}

// removes reports whether the group deletes any record.
func (g *group) removes() bool {
	for _, p := range g.buckets {
		for _, e := range p.entries {
			if e.deleted {
				return true
			}
		}
	}
	return false
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
