package local

import (
	"errors"
	"fmt"
	"io/fs"
	"sort"

	"github.com/tonistiigi/fsutil/types"
)

// errStartOver: the tree to change isn't the one compared with.
var errStartOver = errors.New("internal error: start over")

// pass makes the tree have e; an empty e is the end.
func (r *receiver) pass(e entry) error {
	if r.changed {
		return r.accept(e)
	}
	r.seen = append(r.seen, e)
	err := r.accept(e)
	if !errors.Is(err, errStartOver) {
		return err
	}
	for _, e := range r.seen {
		if err := r.accept(e); err != nil {
			return err
		}
	}
	r.seen = nil
	return nil
}

func (r *receiver) accept(e entry) error {
	if e.st == nil {
		if err := r.dropUntil(""); err != nil {
			return err
		}
		return r.acceptMetadata()
	}
	if err := r.dropUntil(e.st.Path); err != nil {
		return err
	}
	st := e.st
	r.state.add(st)
	var target *seenFile
	if e.kind == kindHardlink {
		if target = r.find(st.Linkname); target == nil {
			return fmt.Errorf("client sent %q as a hard link to %q, which isn't a file sent before it", st.Path, st.Linkname)
		}
	}
	var was *types.Stat
	if r.old.more && r.old.cur.Path == st.Path {
		was = r.old.cur
	}
	if e.kind == kindDir {
		r.dirs = append(r.dirs, dirTime{st.Path, st.ModTime, was == nil || was.ModTime != st.ModTime})
	}
	unchanged := was != nil && !r.everything && same(was, st, e.kind) && (target == nil || !target.written)
	if e.kind == kindFile {
		r.files = append(r.files, seenFile{st.Path, !unchanged})
	}
	if unchanged {
		return r.old.next()
	}
	if was != nil {
		r.old.cur = &types.Stat{Path: was.Path} // was is ours now
	}
	if err := r.change(st.Path); err != nil {
		return err
	}
	if was != nil {
		keep, err := r.replace(was, e)
		if err != nil || keep {
			return err
		}
	}
	return r.create(e)
}

// replace makes room for e where was is. keep means that it is there already.
func (r *receiver) replace(was *types.Stat, e entry) (keep bool, err error) {
	wasDir := fs.FileMode(was.Mode).IsDir()
	if err := r.old.next(); err != nil {
		return false, err
	}
	if wasDir && e.kind == kindDir {
		return true, errors.Join(r.tree.setDir(e.st, was.Xattrs), r.record(e.st))
	}
	if err := r.tree.remove(e.st.Path); err != nil {
		return false, err
	}
	if wasDir {
		r.rec.Remove(e.st.Path)
		return false, r.skipBelow(e.st.Path)
	}
	return false, nil
}

// create makes e where nothing is.
func (r *receiver) create(e entry) error {
	st := e.st
	switch e.kind {
	case kindDir:
		if err := r.tree.mkdir(st); err != nil {
			return err
		}
		return errors.Join(r.tree.setDir(st, nil), r.record(st))
	case kindSymlink:
		return errors.Join(r.tree.symlink(st), r.record(st))
	case kindNode:
		return errors.Join(r.tree.mknod(st), r.record(st))
	case kindHardlink:
		r.links = append(r.links, st) // when its target is complete
		return nil
	}
	f := &file{st: st, inherits: e.inherits, rec: r.rec, fd: -1}
	if st.Size == 0 {
		defer f.abandon()
		return f.take(r.tree, chunk{f: f, last: true})
	}
	r.waiting[e.id] = f
	r.requests.add(e.id)
	return nil
}

// dropUntil removes what the client doesn't have any more: all old entries
// before path, or all if path is "".
func (r *receiver) dropUntil(path string) error {
	for r.old.more && (path == "" || comparePaths(r.old.cur.Path, path) < 0) {
		gone := r.old.cur.Path
		if err := r.change(gone); err != nil {
			return err
		}
		if err := r.tree.remove(gone); err != nil {
			return err
		}
		r.rec.Remove(gone)
		if err := r.old.next(); err != nil {
			return err
		}
		if err := r.skipBelow(gone); err != nil {
			return err
		}
	}
	return nil
}

// skipBelow passes over old entries in a directory that was removed.
func (r *receiver) skipBelow(dir string) error {
	for r.old.more && below(r.old.cur.Path, dir) {
		if err := r.old.next(); err != nil {
			return err
		}
	}
	return nil
}

// change must be called before anything at path changes.
func (r *receiver) change(path string) error {
	if !r.changed {
		p, err := r.open()
		if err != nil {
			return err
		}
		r.changed = true
		r.tree, r.rec = newTree(p.root, r.umask), p.rec
		if p.other != nil {
			r.old = p.other
			r.result = result{touched: map[string]bool{}}
			return errStartOver
		}
		r.seen = nil
	}
	parent, _ := split(path)
	r.touched[parent] = true
	return nil
}

// find returns the file at path among those described so far.
func (r *receiver) find(path string) *seenFile {
	i := sort.Search(len(r.files), func(i int) bool { return comparePaths(r.files[i].path, path) >= 0 })
	if i < len(r.files) && r.files[i].path == path {
		return &r.files[i]
	}
	return nil
}

// record notes an entry without data.
func (r *receiver) record(st *types.Stat) error {
	e := entryOf(st)
	h := newHash()
	defer h.release()
	if err := h.start(e); err != nil {
		return err
	}
	e.Digest = h.digest()
	r.rec.Set(e)
	return nil
}

// finish does what has to wait for all data: hard links, and the mtimes of
// directories.
func (r *receiver) finish() error {
	if !r.changed {
		return nil
	}
	for _, st := range r.links {
		if err := r.tree.link(st.Linkname, st.Path); err != nil {
			return err
		}
		r.rec.Set(entryOf(st)) // it gets the digest of its target
	}
	for _, d := range r.dirs {
		if d.stale || r.touched[d.path] {
			if err := r.tree.touch(d.path, d.mtime); err != nil {
				return err
			}
		}
	}
	return nil
}
