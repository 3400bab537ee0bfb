package snapshot

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Usage measures id by walking its own layer. A stack has none.
func (o *Overlay) Usage(ctx context.Context, id string) (Usage, error) {
	o.mu.Lock()
	s, err := o.getLocked(id)
	stack := err == nil && len(s.Layers) > 0
	o.mu.Unlock()
	if err != nil || stack {
		return Usage{}, err
	}
	u := usageWalk{ctx: ctx, buf: make([]byte, 16<<10)}
	if err := u.dir(unix.AT_FDCWD, o.fsPath(id)); err != nil {
		return Usage{}, fmt.Errorf("measure snapshot %s: %w", id, gone(err))
	}
	return u.Usage, nil
}

type usageWalk struct {
	Usage
	ctx   context.Context
	buf   []byte
	links map[uint64]bool // inodes with several names that were counted
}

// dir adds the directory name in at and all below it. What vanishes meanwhile,
// in a snapshot that is active, doesn't count.
func (u *usageWalk) dir(at int, name string) error {
	if err := context.Cause(u.ctx); err != nil {
		return err
	}
	fd, err := openDir(at, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	u.add(&st)
	names, err := readNames(fd, u.buf)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := lstatAt(fd, name, &st)
		switch {
		case err != nil:
		case isDir(&st):
			err = u.dir(fd, name)
		default:
			u.add(&st)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (u *usageWalk) add(st *unix.Stat_t) {
	if !isDir(st) && st.Nlink > 1 {
		if u.links[st.Ino] {
			return
		}
		if u.links == nil {
			u.links = map[uint64]bool{}
		}
		u.links[st.Ino] = true
	}
	u.Size += st.Blocks * 512
	u.Inodes++
}
