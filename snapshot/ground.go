package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// groundPrefix is what the names of grounds start with; no snapshot's does.
//
// The ground of a snapshot is a directory that stands for it and all that it
// stands on: the tree that one sees, of hard links to the files of its layers. It
// is made where there would be more layers than the kernel's overlay can stack,
// belongs to the snapshot, and goes with it.
const groundPrefix = "="

func (o *Overlay) groundPath(id string) string { return o.dir + "/" + groundPrefix + id }

// groundOf returns the snapshot whose ground has that name in the directory of all.
func groundOf(name string) (id string, ok bool) { return strings.CutPrefix(name, groundPrefix) }

// Ground sees to it that another snapshot can stand on the committed snapshot id,
// however many layers it has. grown are the snapshots that share more files now.
func (o *Overlay) Ground(ctx context.Context, id string) (grown []string, err error) {
	for {
		o.mu.Lock()
		s, err := o.committedLocked(id)
		var layers []string
		if err == nil {
			layers, err = o.layersLocked(id)
		}
		if err != nil || !s.Ground && o.roomAbove(layers) {
			o.mu.Unlock()
			return nil, err
		}
		name := groundPrefix + id
		other, doubts := o.copying[name], o.doubts.n
		if other == nil && !s.Ground {
			o.copying[name] = make(chan struct{})
		}
		o.mu.Unlock()
		switch {
		case other != nil:
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		case s.Ground:
			return nil, nil
		}
		return o.layGround(ctx, s, layers, doubts)
	}
}

// roomAbove says whether the kernel can stack one more on top of layers. One that
// doesn't take them one by one has to find the paths of all in a page, relative to
// the directory that all are in.
func (o *Overlay) roomAbove(layers []string) bool {
	if len(layers) >= o.most || features().layers {
		return len(layers) < o.most
	}
	need := len("lowerdir=") + len(",upperdir=/fs,workdir=/work") + 2*maxID
	need += len("/fs:") + maxID // of the one on top, for what stands on that
	for _, option := range o.options {
		need += len(",") + len(option)
	}
	for _, l := range layers {
		need += len(l) - len(o.dir) // its colon is as long as the slash
	}
	return need < unix.Getpagesize()
}

// layGround makes the ground of s out of layers, lowest first.
func (o *Overlay) layGround(ctx context.Context, s *snap, layers []string, doubts int) (grown []string, err error) {
	path := o.groundPath(s.id)
	err = os.RemoveAll(path) // of an earlier attempt
	if err == nil {
		err = (&flattener{ctx, o.xattr}).flatten(layers, path)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	name := groundPrefix + s.id
	close(o.copying[name])
	delete(o.copying, name)
	if err == nil {
		err = o.doubts.since(doubts)
	}
	if err == nil {
		grown, err = o.belowLocked(s)
	}
	if err != nil {
		err = fmt.Errorf("make one directory of the %d layers of %s: %w", len(layers), s.id, err)
		return nil, errors.Join(err, os.RemoveAll(path))
	}
	s.Ground, s.stored, s.written = true, false, time.Now()
	return grown, nil
}

// belowLocked returns all whose files the ground of s has links to: its layers,
// and what it stands on.
func (o *Overlay) belowLocked(s *snap) (ids []string, err error) {
	for {
		if ids, err = o.ownLocked(ids, s); err != nil {
			return nil, err
		}
		if len(s.Layers) > 0 {
			ids = append(ids, s.id)
		}
		if s.Parent == "" {
			return ids, nil
		}
		if s = o.snaps[s.Parent]; s == nil {
			return nil, ErrNotFound
		}
	}
}

// flattener makes one directory of many.
type flattener struct {
	ctx   context.Context
	xattr string // the prefix of overlay's own xattrs
}

// flatten makes the directory path, with the tree that overlay shows of the layer
// directories, lowest first.
func (f *flattener) flatten(layers []string, path string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	to, err := files.OpenDir(unix.AT_FDCWD, path)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(to)
	for _, layer := range layers {
		from, err := files.OpenDir(unix.AT_FDCWD, layer)
		if err != nil {
			return fmt.Errorf("open layer %s: %w", layer, gone(err))
		}
		err = f.layOn(from, to)
		unix.Close(from)
		if err != nil {
			return fmt.Errorf("layer %s: %w", layer, err)
		}
	}
	return nil
}

// layOn puts the layer's directory from on the tree to: what it deletes goes, what
// it has replaces what is there.
func (f *flattener) layOn(from, to int) error {
	if err := context.Cause(f.ctx); err != nil {
		return err
	}
	names, err := files.Names(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		var st unix.Stat_t
		err := files.Lstat(from, name, &st)
		switch {
		case err != nil:
		case isWhiteout(&st):
			err = files.RemoveAll(to, name)
		case files.IsDir(&st):
			err = f.layDir(from, to, name)
		default:
			if err = files.RemoveAll(to, name); err == nil {
				err = linkOrCopy(f.ctx, from, to, name, &st)
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return lookLike(from, to)
}

// layDir puts the directory name of from on that of to.
func (f *flattener) layDir(from, to int, name string) error {
	sub, err := files.OpenDir(from, name)
	if err != nil {
		return err
	}
	defer unix.Close(sub)
	opaque, _, err := files.XattrsOf(sub).Get(f.xattr + "opaque")
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = files.Lstat(to, name, &st)
	if err == nil && (string(opaque) == "y" || !files.IsDir(&st)) {
		if err = files.RemoveAll(to, name); err == nil {
			err = unix.ENOENT
		}
	}
	if err == unix.ENOENT {
		err = unix.Mkdirat(to, name, 0o700)
	}
	if err != nil {
		return err
	}
	dir, err := files.OpenDir(to, name)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return f.layOn(sub, dir)
}

// lookLike gives the directory to the metadata of from, and no xattrs but those.
func lookLike(from, to int) error {
	old, err := files.XattrsOf(to).Names()
	if err != nil {
		return err
	}
	for _, name := range old {
		if err := unix.Fremovexattr(to, name); err != nil && err != unix.ENOTSUP && err != unix.ENODATA && err != unix.EPERM {
			return fmt.Errorf("remove xattr %s: %w", name, err)
		}
	}
	return copyMeta(from, to)
}

// linkOrCopy makes name in to the file that it is in from, which isn't a directory.
func linkOrCopy(ctx context.Context, from, to int, name string, st *unix.Stat_t) error {
	err := error(unix.EPERM)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFIFO, unix.S_IFSOCK:
		// Shared, they would connect processes that have nothing to do with each other.
	default:
		err = unix.Linkat(from, name, to, name, 0)
	}
	if err == unix.EMLINK || err == unix.EPERM { // EPERM: an immutable file, or the owner of another namespace
		err = (&walker{}).copyUp(ctx, &layerDir{fd: to, lower: from}, name, st)
	}
	return err
}
