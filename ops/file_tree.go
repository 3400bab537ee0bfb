package ops

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

// fileTree copies one source, which may be a directory with all that is in it.
//
// One goroutine walks the source and makes directories; a few others copy the
// files of them, in batches of one directory, by names below two open
// directories: no path is ever walked again. A directory gets its metadata when
// the last of what is in it is done, by whoever does that.
type fileTree struct {
	*fileCopy
	asked    string          // the source as it was asked for
	ctx      context.Context // of the goroutines that copy
	cancel   context.CancelCauseFunc
	patterns filePatterns
	copier   files.Copier
	umask    uint32
	uid, gid int // of what this process makes
	jobs     chan fileBatch
	failed   atomic.Bool

	mu    sync.Mutex // guards the fields below
	links map[fileInode]*fileFirst
}

type fileInode struct{ dev, ino uint64 }

// fileFirst is the first copy of a file that has several names.
type fileFirst struct {
	at   string        // where it is, resolved
	done chan struct{} // closed when it is complete
}

// fileBatch is some names in a directory that are no directories.
type fileBatch struct {
	dir   *filePair
	names []fileItem
}

type fileItem struct {
	name string
	kind fs.FileMode
}

const fileBatchSize = 32

// filePair is a directory and its copy.
type filePair struct {
	parent   *filePair
	name     string
	from, at string      // paths of both, for messages and hard links
	src      *os.File    // nil for the directory around a single file's source
	srcFD    int         // of src
	st       unix.Stat_t // of src
	dst      int         // -1 until the copy is needed
	fresh    bool        // this copy made dst, so that nothing of others is in it
	inherits bool        // new files in dst get a group or ACL from it
	finish   fileFinish
	refs     atomic.Int32 // the walk, the batches and the directories in it
}

// fileFinish is what metadata a directory gets in the end.
type fileFinish int

const (
	fileFinishNone fileFinish = iota
	fileFinishTime
	fileFinishAll
)

var fileUmask = sync.OnceValue(files.Umask)

// tree copies what is at from, described by st, to target, whose parent exists.
// asked is from as it was asked for.
func (c *fileCopy) tree(ctx context.Context, asked, from string, st unix.Stat_t, target string) error {
	patterns, err := newFilePatterns(c.action)
	if err != nil {
		return err
	}
	t := &fileTree{
		fileCopy: c, asked: asked, ctx: ctx, patterns: patterns,
		umask: fileUmask(), uid: os.Geteuid(), gid: os.Getegid(),
		links: map[fileInode]*fileFirst{},
	}
	if files.IsDir(&st) {
		return t.copyDir(ctx, from, target)
	}
	return t.copyOne(from, st, target)
}

// copyOne copies a single file.
func (t *fileTree) copyOne(from string, st unix.Stat_t, target string) error {
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
	d := &filePair{from: path.Dir(from), at: path.Dir(target), srcFD: src, dst: dst, inherits: true}
	t.found(t.asked)
	return t.file(d, path.Base(from), name, fileGoType(st.Mode))
}

// copyDir copies a directory: it makes or merges target, then walks.
func (t *fileTree) copyDir(ctx context.Context, from, target string) (err error) {
	top := &filePair{name: path.Base(target), from: from, at: target, srcFD: -1, dst: -1}
	fd, err := t.src.openDir(from)
	if err != nil {
		return err
	}
	if err := top.openSource(fd); err != nil {
		return err
	}
	if err := t.makeTop(top); err != nil {
		return errors.Join(err, top.close())
	}

	var eg errgroup.Group
	t.ctx, t.cancel = context.WithCancelCause(ctx)
	defer t.cancel(nil)
	t.jobs = make(chan fileBatch, 64)
	for range max(2, min(4, runtime.GOMAXPROCS(0))) {
		eg.Go(t.work)
	}
	eg.Go(func() error {
		defer close(t.jobs)
		err := t.walk(top, "", filePatternInfo{})
		return t.release(top, err)
	})
	return eg.Wait()
}

// makeTop makes target or takes what is there. What is above it was made
// before; if the source's contents were asked for, so was target itself.
func (t *fileTree) makeTop(top *filePair) error {
	if top.at == "/" {
		return t.openTop(top, fileFinishTime)
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
		return t.openTop(top, fileFinishAll)
	}
	return t.openTop(top, fileFinishTime)
}

// mkdir makes d's copy in the directory in, and reports whether it is new. What is
// there already stays, unless it is no directory and may be replaced.
func (t *fileTree) mkdir(in int, d *filePair) (fresh bool, err error) {
	err = unix.Mkdirat(in, d.name, 0o700)
	if err == unix.EEXIST && t.action.AlwaysReplaceExistingDestPaths {
		var st unix.Stat_t
		if err := files.Lstat(in, d.name, &st); err != nil {
			return false, fileErr("lstat", d.at, err)
		}
		if files.IsDir(&st) {
			return false, nil
		}
		if err := unix.Unlinkat(in, d.name, 0); err != nil {
			return false, fileErr("replace", d.at, err)
		}
		err = unix.Mkdirat(in, d.name, 0o700)
	}
	if err == unix.EEXIST {
		return false, nil
	}
	return err == nil, fileErr("mkdir", d.at, err)
}

func (t *fileTree) openTop(top *filePair, finish fileFinish) error {
	fd, err := t.dst.open(top.at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return fileNotDir(top.at, err)
	}
	top.finish = finish
	return top.openTarget(fd)
}

// fileNotDir explains why a directory can't be merged into what is at p.
func fileNotDir(p string, err error) error {
	if err == unix.ENOTDIR || err == unix.ELOOP {
		return fmt.Errorf("cannot copy to non-directory: %s", p)
	}
	return fileErr("open", p, err)
}

// openSource takes over the open source directory fd.
func (d *filePair) openSource(fd int) error {
	d.src, d.srcFD = os.NewFile(uintptr(fd), files.Path(fd)), fd
	d.refs.Store(1)
	if err := unix.Fstat(fd, &d.st); err != nil {
		return errors.Join(fileErr("stat", d.from, err), d.src.Close())
	}
	return nil
}

// openTarget takes over the open copy fd.
func (d *filePair) openTarget(fd int) error {
	d.dst = fd
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileErr("stat", d.at, err)
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

func (d *filePair) close() error {
	err := d.src.Close()
	if d.dst >= 0 {
		err = errors.Join(err, unix.Close(d.dst))
	}
	return err
}

// walk copies what is in d. rel is its path below the source.
func (t *fileTree) walk(d *filePair, rel string, info filePatternInfo) error {
	var batch []fileItem
	for {
		entries, err := d.src.ReadDir(1024)
		if err == io.EOF {
			return t.send(d, batch)
		}
		if err != nil {
			return fileErr("read", d.from, fileCause(err))
		}
		for _, e := range entries {
			if err := context.Cause(t.ctx); err != nil {
				return err
			}
			copied, below, sub := true, true, filePatternInfo{}
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
				batch = append(batch, fileItem{e.Name(), e.Type()})
				if len(batch) == fileBatchSize {
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
func (t *fileTree) enter(d *filePair, name, rel string, copied bool, info filePatternInfo) error {
	sub := &filePair{parent: d, name: name, from: path.Join(d.from, name), at: path.Join(d.at, name), dst: -1}
	fd, err := files.OpenDir(d.srcFD, name)
	if err != nil {
		return fileErr("open", sub.from, err)
	}
	if err := sub.openSource(fd); err != nil {
		return err
	}
	d.refs.Add(1)
	if copied {
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
func (t *fileTree) make(d *filePair, selected bool) error {
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
		return fileNotDir(d.at, err)
	}
	if err := d.openTarget(fd); err != nil {
		return err
	}
	if d.fresh || selected {
		d.finish = fileFinishAll
		return nil
	}
	return fileErr("chmod", d.at, unix.Fchmod(fd, d.st.Mode&0o7777))
}

// send hands names in d to the goroutines that copy.
func (t *fileTree) send(d *filePair, names []fileItem) error {
	if len(names) == 0 {
		return nil
	}
	d.refs.Add(1)
	select {
	case t.jobs <- fileBatch{d, names}:
		return nil
	case <-t.ctx.Done():
		d.refs.Add(-1) // the walk's own is still there
		return context.Cause(t.ctx)
	}
}

// work copies batches until there are no more. After a failure it only lets go
// of what they hold.
func (t *fileTree) work() error {
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

func (t *fileTree) batch(b fileBatch) error {
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
func (t *fileTree) release(d *filePair, err error) error {
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

func (t *fileTree) finishDir(d *filePair) error {
	if d.finish == fileFinishAll {
		ids := t.ids(&d.st)
		if err := unix.Fchown(d.dst, ids.uid, ids.gid); err != nil {
			return fileErr("chown", d.at, ids.explain(err))
		}
		if err := unix.Fchmod(d.dst, t.chmod.of(d.st.Mode)); err != nil {
			return fileErr("chmod", d.at, err)
		}
		fileCopyXattrs(files.XattrsOf(d.dst), files.XattrsOf(d.srcFD))
	}
	if d.finish == fileFinishNone {
		return nil
	}
	return fileErr("set time of", d.at, unix.UtimesNanoAt(d.dst, ".", t.times(&d.st), 0))
}

// ids is who owns the copy of a file.
func (t *fileTree) ids(st *unix.Stat_t) fileIDs {
	if t.stamp.owner != nil {
		return *t.stamp.owner
	}
	return fileIDs{int(st.Uid), int(st.Gid)}
}

// times are those of access and change of the copy of a file.
func (t *fileTree) times(st *unix.Stat_t) []unix.Timespec {
	if t.stamp.time != nil {
		return []unix.Timespec{*t.stamp.time, *t.stamp.time}
	}
	return []unix.Timespec{st.Atim, st.Mtim}
}

// fileGoType is the type in a mode of stat(2) as Go has it.
func fileGoType(m uint32) fs.FileMode {
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
