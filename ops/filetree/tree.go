package filetree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// treeCopy copies one source, which may be a directory with all that is in it.
//
// One goroutine walks the source and makes directories; a few others copy the
// files of them, in batches of one directory, by names below two open
// directories: no path is ever walked again. A directory gets its metadata when
// the last of what is in it is done, by whoever does that.
type treeCopy struct {
	*copying
	asked    string          // the source as it was asked for
	ctx      context.Context // of the goroutines that copy
	cancel   context.CancelCauseFunc
	patterns patterns
	copier   files.Copier
	umask    uint32
	uid, gid int // of what this process makes
	jobs     chan batch
	failed   atomic.Bool

	mu    sync.Mutex // guards the fields below
	links map[inode]*firstCopy
}

type inode struct{ dev, ino uint64 }

// firstCopy is the first copy of a file that has several names.
type firstCopy struct {
	at   string        // where it is, resolved
	done chan struct{} // closed when it is complete
}

// batch is some names in a directory that are no directories.
type batch struct {
	dir   *pair
	names []item
}

type item struct {
	name string
	kind fs.FileMode
}

const batchSize = 32

// pair is a directory and its copy.
type pair struct {
	parent   *pair
	name     string
	from, at string      // paths of both, for messages and hard links
	src      *os.File    // nil for the directory around a single file's source
	srcFD    int         // of src
	st       unix.Stat_t // of src
	dst      int         // -1 until the copy is needed
	fresh    bool        // this copy made dst, so that nothing of others is in it
	inherits bool        // new files in dst get a group or ACL from it
	finish   finish
	refs     atomic.Int32 // the walk, the batches and the directories in it
}

// finish is what metadata a directory gets in the end.
type finish int

const (
	finishNone finish = iota
	finishTime
	finishAll
)

var processUmask = sync.OnceValue(files.Umask)

func (c *copying) newTree(ctx context.Context) *treeCopy {
	return &treeCopy{
		copying: c, ctx: ctx,
		umask: processUmask(), uid: os.Geteuid(), gid: os.Getegid(),
		links: map[inode]*firstCopy{},
	}
}

// tree copies what is at from, described by st, to target, whose parent exists.
// asked is from as it was asked for.
func (c *copying) tree(ctx context.Context, asked, from string, st unix.Stat_t, target string) (err error) {
	t := c.newTree(ctx)
	t.asked = asked
	if t.patterns, err = newPatterns(c.Copy); err != nil {
		return err
	}
	if files.IsDir(&st) {
		return t.copyDir(ctx, from, target)
	}
	return t.copyOne(from, st, target)
}

// copyOne copies a single file.
func (t *treeCopy) copyOne(from string, st unix.Stat_t, target string) error {
	if target == "/" {
		return fmt.Errorf("copy %s: the root directory can't be replaced by a file", from)
	}
	src, _, err := t.src.openParent(from)
	if err != nil {
		return err
	}
	defer unix.Close(src)
	dst, name, err := t.dst.openParent(target)
	if err != nil {
		return err
	}
	defer unix.Close(dst)
	d := &pair{from: path.Dir(from), at: path.Dir(target), srcFD: src, dst: dst, inherits: true}
	t.found(t.asked)
	return t.file(d, path.Base(from), name, goType(st.Mode))
}

// copyDir copies a directory: it makes or merges target, then walks.
func (t *treeCopy) copyDir(ctx context.Context, from, target string) (err error) {
	top := &pair{name: path.Base(target), from: from, at: target, srcFD: -1, dst: -1}
	fd, err := t.src.openDir(from)
	if err != nil {
		return err
	}
	if err := top.openSource(fd); err != nil {
		return err
	}
	if err := t.read(ctx, from, &top.st); err != nil {
		return errors.Join(err, top.close())
	}
	if err := t.makeTop(top); err != nil {
		return errors.Join(err, top.close())
	}

	var eg errgroup.Group
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	defer t.cancel(nil)
	t.jobs = make(chan batch, 64)
	for range max(2, min(4, runtime.GOMAXPROCS(0))) {
		eg.Go(t.work)
	}
	eg.Go(func() error {
		defer close(t.jobs)
		err := t.walk(top, "", patternInfo{})
		return t.release(top, err)
	})
	return eg.Wait()
}

// makeTop makes target or takes what is there. What is above it was made
// before; if the source's contents were asked for, so was target itself.
func (t *treeCopy) makeTop(top *pair) error {
	if top.at == "/" {
		return t.openTop(top, finishTime)
	}
	dir, _, err := t.dst.openParent(top.at)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	if top.fresh, err = t.mkdir(dir, top); err != nil {
		return err
	}
	if top.fresh {
		return t.openTop(top, finishAll)
	}
	return t.openTop(top, finishTime)
}

// mkdir makes d's copy in the directory in, and reports whether it is new. What is
// there already stays, unless it is no directory and may be replaced.
func (t *treeCopy) mkdir(in int, d *pair) (fresh bool, err error) {
	err = unix.Mkdirat(in, d.name, 0o700)
	if err == unix.EEXIST && t.Replace {
		var st unix.Stat_t
		if err := files.Lstat(in, d.name, &st); err != nil {
			return false, pathErr("lstat", d.at, err)
		}
		if files.IsDir(&st) {
			return false, nil
		}
		if err := unix.Unlinkat(in, d.name, 0); err != nil {
			return false, pathErr("replace", d.at, err)
		}
		err = unix.Mkdirat(in, d.name, 0o700)
	}
	if err == unix.EEXIST {
		return false, nil
	}
	return err == nil, pathErr("mkdir", d.at, err)
}

func (t *treeCopy) openTop(top *pair, finish finish) error {
	fd, err := t.dst.open(top.at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return notDir(top.at, err)
	}
	top.finish = finish
	return top.openTarget(fd)
}

// notDir explains why a directory can't be merged into what is at p.
func notDir(p string, err error) error {
	if err == unix.ENOTDIR || err == unix.ELOOP {
		return fmt.Errorf("cannot copy to non-directory: %s", p)
	}
	return pathErr("open", p, err)
}

// openSource takes over the open source directory fd.
func (d *pair) openSource(fd int) error {
	d.src, d.srcFD = os.NewFile(uintptr(fd), files.Path(fd)), fd
	d.refs.Store(1)
	if err := unix.Fstat(fd, &d.st); err != nil {
		return errors.Join(pathErr("stat", d.from, err), d.src.Close())
	}
	return nil
}

// openTarget takes over the open copy fd.
func (d *pair) openTarget(fd int) error {
	d.dst = fd
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return pathErr("stat", d.at, err)
	}
	switch {
	case st.Mode&unix.S_ISGID != 0:
		d.inherits = true
	case d.fresh && d.parent != nil:
		d.inherits = d.parent.inherits
	default:
		n, err := unix.Fgetxattr(fd, "system.posix_acl_default", nil)
		d.inherits = err == nil && n > 0
	}
	return nil
}

func (d *pair) close() error {
	err := d.src.Close()
	if d.dst >= 0 {
		err = errors.Join(err, unix.Close(d.dst))
	}
	return err
}

// walk copies what is in d. rel is its path below the source.
func (t *treeCopy) walk(d *pair, rel string, info patternInfo) error {
	var batch []item
	for {
		entries, err := d.src.ReadDir(1024)
		if err == io.EOF {
			return t.send(d, batch)
		}
		if err != nil {
			return pathErr("read", d.from, cause(err))
		}
		for _, e := range entries {
			if err := context.Cause(t.ctx); err != nil {
				return err
			}
			copied, below, sub := true, true, patternInfo{}
			if !t.patterns.none() {
				copied, below, sub, err = t.patterns.match(path.Join(rel, e.Name()), info)
				if err != nil {
					return err
				}
			}
			if copied {
				t.found(path.Join(t.asked, rel, e.Name()))
			}
			switch {
			case e.IsDir():
				if copied || below {
					if err := t.enter(d, e.Name(), path.Join(rel, e.Name()), copied, sub); err != nil {
						return err
					}
				}
			case copied:
				if err := t.make(d, false); err != nil {
					return err
				}
				batch = append(batch, item{e.Name(), e.Type()})
				if len(batch) == batchSize {
					if err := t.send(d, batch); err != nil {
						return err
					}
					batch = nil
				}
			}
		}
	}
}

// enter walks the directory name in d. One that isn't copied for its own sake
// is made once something in it is.
func (t *treeCopy) enter(d *pair, name, rel string, copied bool, info patternInfo) error {
	sub := &pair{parent: d, name: name, from: path.Join(d.from, name), at: path.Join(d.at, name), dst: -1}
	fd, err := files.OpenDir(d.srcFD, name)
	if err != nil {
		return pathErr("open", sub.from, err)
	}
	if err := sub.openSource(fd); err != nil {
		return err
	}
	d.refs.Add(1)
	err = t.read(t.ctx, sub.from, &sub.st)
	if err == nil && copied {
		err = t.make(sub, true)
	}
	if err == nil {
		err = t.walk(sub, rel, info)
	}
	return t.release(sub, err)
}

// make makes the copy of d, and before it those above, if they aren't there.
// One that is selected gets the source's metadata also if it was there; one
// that is only on the way to what is selected just its permissions.
func (t *treeCopy) make(d *pair, selected bool) error {
	if d.dst >= 0 {
		return nil
	}
	if err := t.make(d.parent, false); err != nil {
		return err
	}
	in := d.parent.dst
	var err error
	if d.fresh, err = t.mkdir(in, d); err != nil {
		return err
	}
	fd, err := files.OpenDir(in, d.name)
	if err != nil {
		return notDir(d.at, err)
	}
	if err := d.openTarget(fd); err != nil {
		return err
	}
	if d.fresh || selected {
		d.finish = finishAll
		return nil
	}
	return pathErr("chmod", d.at, unix.Fchmod(fd, d.st.Mode&0o7777))
}

// send hands names in d to the goroutines that copy.
func (t *treeCopy) send(d *pair, names []item) error {
	if len(names) == 0 {
		return nil
	}
	d.refs.Add(1)
	select {
	case t.jobs <- batch{d, names}:
		return nil
	case <-t.ctx.Done():
		d.refs.Add(-1) // the walk's own is still there
		return context.Cause(t.ctx)
	}
}

// work copies batches until there are no more. After a failure it only lets go
// of what they hold.
func (t *treeCopy) work() error {
	var first error
	for b := range t.jobs {
		err := t.release(b.dir, t.batch(b))
		if first == nil && err != nil {
			first = err
			t.failed.Store(true)
			t.cancel(err)
		}
	}
	return first
}

func (t *treeCopy) batch(b batch) error {
	for _, n := range b.names {
		if t.failed.Load() {
			return nil // whoever failed reports it
		}
		if err := context.Cause(t.ctx); err != nil {
			return err
		}
		if err := t.file(b.dir, n.name, n.name, n.kind); err != nil {
			return err
		}
	}
	return nil
}

// release lets go of d. The last to do so finishes it. err is what happened
// before; it is returned, joined with what fails now.
func (t *treeCopy) release(d *pair, err error) error {
	for ; d != nil; d = d.parent {
		if err != nil {
			t.failed.Store(true)
		}
		if d.refs.Add(-1) > 0 {
			return err
		}
		if d.dst >= 0 && !t.failed.Load() {
			err = errors.Join(err, t.finishDir(d))
		}
		err = errors.Join(err, d.close())
	}
	return err
}

func (t *treeCopy) finishDir(d *pair) error {
	if d.finish == finishAll {
		owner := t.owner(&d.st)
		if err := unix.Fchown(d.dst, owner.UID, owner.GID); err != nil {
			return pathErr("chown", d.at, owner.explain(err))
		}
		if err := unix.Fchmod(d.dst, t.Chmod.of(d.st.Mode)); err != nil {
			return pathErr("chmod", d.at, err)
		}
		copyXattrs(files.XattrsOf(d.dst), files.XattrsOf(d.srcFD))
	}
	if d.finish == finishNone {
		return nil
	}
	return pathErr("set time of", d.at, unix.UtimesNanoAt(d.dst, ".", t.times(&d.st), 0))
}

// owner is who owns the copy of a file.
func (t *treeCopy) owner(st *unix.Stat_t) Owner {
	if t.Stamp.Owner != nil {
		return *t.Stamp.Owner
	}
	return Owner{int(st.Uid), int(st.Gid)}
}

// times are those of access and change of the copy of a file.
func (t *treeCopy) times(st *unix.Stat_t) []unix.Timespec {
	if t.Stamp.Time != nil {
		return []unix.Timespec{*t.Stamp.Time, *t.Stamp.Time}
	}
	return []unix.Timespec{st.Atim, st.Mtim}
}

// goType is the type in a mode of stat(2) as Go has it.
func goType(m uint32) fs.FileMode {
	switch m & unix.S_IFMT {
	case unix.S_IFREG:
		return 0
	case unix.S_IFDIR:
		return fs.ModeDir
	case unix.S_IFLNK:
		return fs.ModeSymlink
	}
	return fs.ModeIrregular // one that mknod makes
}
