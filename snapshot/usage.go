package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Usage measures id by walking all that belongs to it: its own layer and the
// directories around it. A stack has none, but for its ground. A copy that a crash
// left, and nobody knows of, isn't of it: the next sweep takes it.
func (o *Overlay) Usage(ctx context.Context, id string) (Usage, error) {
	o.mu.Lock()
	s, err := o.getLocked(id)
	stack, ground := err == nil && len(s.Layers) > 0, err == nil && s.Ground
	also := []string{o.path(id) + "/work"}
	if err == nil && s.Form == formCopy {
		also = append(also, o.portablePath(id))
	}
	o.mu.Unlock()
	if err != nil {
		return Usage{}, err
	}
	u := newUsageWalk(ctx)
	if !stack {
		err = errors.Join(u.own(o.path(id)), u.dir(unix.AT_FDCWD, o.fsPath(id)))
	}
	if ground {
		err = errors.Join(err, u.dir(unix.AT_FDCWD, o.groundPath(id)))
	}
	if err != nil {
		return Usage{}, fmt.Errorf("measure snapshot %s: %w", id, gone(err))
	}
	for _, path := range also {
		if err := u.path(path); err != nil && !errors.Is(err, unix.ENOENT) {
			return Usage{}, fmt.Errorf("measure snapshot %s: %s: %w", id, path, err)
		}
	}
	u.shareLinks()
	return u.Usage, nil
}

type usageWalk struct {
	Usage
	ctx   context.Context
	links map[uint64]*links // inodes with several names, which count in the end
}

func newUsageWalk(ctx context.Context) *usageWalk {
	return &usageWalk{ctx: ctx}
}

// path adds the file or directory tree at path.
func (u *usageWalk) path(path string) error {
	var st unix.Stat_t
	if err := files.Lstat(unix.AT_FDCWD, path, &st); err != nil {
		return err
	}
	if files.IsDir(&st) {
		return u.dir(unix.AT_FDCWD, path)
	}
	u.add(&st)
	return nil
}

// links is an inode with several names.
type links struct {
	bytes        int64
	found, nlink int64
}

// dir adds the directory name in at and all below it. What vanishes meanwhile,
// in a snapshot that is active, doesn't count.
func (u *usageWalk) dir(at int, name string) error {
	if err := context.Cause(u.ctx); err != nil {
		return err
	}
	fd, err := files.OpenDir(at, name)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	u.add(&st)
	names, err := files.Names(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		err := files.Lstat(fd, name, &st)
		switch {
		case err != nil:
		case files.IsDir(&st):
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
	bytes := st.Blocks * 512
	if files.IsDir(st) || st.Nlink <= 1 {
		u.Size += bytes
		u.Inodes++
		return
	}
	if u.links == nil {
		u.links = map[uint64]*links{}
	}
	l := u.links[st.Ino]
	if l == nil {
		l = &links{bytes: bytes, nlink: int64(st.Nlink)}
		u.links[st.Ino] = l
		u.Inodes++
	}
	l.found++
}

// shareLinks counts files that have several names. When all are in this
// snapshot the file is its alone; otherwise it has its share, so that all
// snapshots together have the file once.
func (u *usageWalk) shareLinks() {
	for _, l := range u.links {
		if l.found >= l.nlink {
			u.Size += l.bytes
			continue
		}
		u.Size += l.bytes * l.found / l.nlink
		u.Linked = true
	}
}
