package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/tonistiigi/fsutil"
)

// wholeTree fails its walk when a directory can't be read. The tree of a result
// doesn't change, so that whatever is missing is an error; fsutil takes a root
// that it can't read for an empty one.
type wholeTree struct {
	fsutil.FS
	dirs *dirReader
}

func (t wholeTree) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	if err := t.FS.Walk(ctx, target, fn); err != nil {
		return err
	}
	if err := t.dirs.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// watchedRoot is a root whose directories are read through a dirReader.
type watchedRoot struct {
	fsutil.Root
	dirs *dirReader
}

func watchRoot(root *os.Root) watchedRoot {
	return watchedRoot{fsutil.NewRoot(root), &dirReader{FS: anyNames{root}}}
}

func (r watchedRoot) FS() fs.FS { return r.dirs }

// dirReader remembers the first directory that can't be read.
type dirReader struct {
	fs.FS
	failure atomic.Pointer[error]
}

func (d *dirReader) ReadDir(name string) ([]fs.DirEntry, error) {
	entries, err := fs.ReadDir(d.FS, name)
	if err != nil {
		err = fmt.Errorf("read the directory /%s of the result: %w", name, err)
		d.failure.CompareAndSwap(nil, &err)
	}
	return entries, err
}

// Stat, Lstat and ReadLink are those of the FS, which asks by type.
func (d *dirReader) Stat(name string) (fs.FileInfo, error)  { return fs.Stat(d.FS, name) }
func (d *dirReader) Lstat(name string) (fs.FileInfo, error) { return fs.Lstat(d.FS, name) }
func (d *dirReader) ReadLink(name string) (string, error)   { return fs.ReadLink(d.FS, name) }

// anyNames is the FS of a root whose files have names of any bytes. That of
// os.Root itself refuses names that are no text, which Linux doesn't.
type anyNames struct{ root *os.Root }

func (a anyNames) Open(name string) (fs.File, error)      { return a.root.Open(name) }
func (a anyNames) Stat(name string) (fs.FileInfo, error)  { return a.root.Stat(name) }
func (a anyNames) Lstat(name string) (fs.FileInfo, error) { return a.root.Lstat(name) }
func (a anyNames) ReadLink(name string) (string, error)   { return a.root.Readlink(name) }

func (a anyNames) ReadDir(name string) ([]fs.DirEntry, error) {
	f, err := a.root.Open(name)
	if err != nil {
		return nil, err
	}
	entries, err := f.ReadDir(-1)
	slices.SortFunc(entries, func(x, y fs.DirEntry) int { return strings.Compare(x.Name(), y.Name()) })
	return entries, errors.Join(err, f.Close())
}
