package contenthash

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"iter"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/opencontainers/go-digest"
)

// Recorder takes the tree of a mutable record while files arrive, so that
// nothing is read again, and tells what the record held before. Paths are
// slash-separated and relative to the root. Safe for concurrent use.
//
// The header of the root directory isn't sent; its digest is that of nothing.
type Recorder struct {
	mu    sync.Mutex // guards the fields below
	root  *node
	links map[string][]string // hard links set, by the path they point to

	removed []string // the last maxRemoved paths, the oldest first
}

// mutableRecord is what a Recorder needs of a *cache.Mutable.
type mutableRecord interface {
	ID() string
	Metadata(key string) ([]byte, bool)
	SetMetadata(key string, value []byte)
}

// NewRecorder starts from what is stored beside u, empty otherwise. What is
// stored is withdrawn until Save, so that a transfer that ends early leaves a
// record without a tree, not one with the wrong tree. After a crash it is the
// cache that drops it, as it does with all metadata of a record left open.
func NewRecorder(u *cache.Mutable) (*Recorder, error) { return newRecorder(u) }

func newRecorder(u mutableRecord) (*Recorder, error) {
	r := &Recorder{links: map[string][]string{}}
	shared.forget(u.ID())
	if data, ok := u.Metadata(metadataKey); ok && len(data) > 0 {
		root, _, err := decode(data)
		if err == nil {
			r.root = root
		}
		u.SetMetadata(metadataKey, nil)
	}
	if r.root == nil {
		r.root = newDir("")
		r.root.listed = true
		r.root.head, r.root.hashed = sha256.Sum256(nil), true
	}
	return r, nil
}

// Set records e, replacing what was at its path (and below it, when a
// directory became something else).
func (r *Recorder) Set(e Entry) {
	at := keyPath(e.Path)
	if at == "" {
		return
	}
	n := &node{name: path.Base(at), stat: &stat{
		mode: e.Mode, uid: e.UID, gid: e.GID, size: e.Size, modTime: e.ModTime,
		devMajor: e.DevMajor, devMinor: e.DevMinor, xattrs: e.Xattrs,
	}}
	n.head, n.hashed = parseSum(e.Digest)
	switch {
	case e.Mode&fs.ModeSymlink != 0:
		n.kind, n.link, n.linked = symlink, e.Linkname, true
	case e.Mode.IsDir():
		n.kind, n.dirNode = dir, &dirNode{listed: true}
	default:
		n.stat.hardlink = e.Linkname
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	parent := r.parent(at)
	i, ok := parent.find(n.name)
	if !ok {
		parent.children = slices.Insert(parent.children, i, n)
	} else {
		if old := parent.children[i]; old.kind == dir && n.kind == dir {
			n.children = old.children
		}
		parent.children[i] = n
	}
	if n.stat.hardlink != "" {
		target := keyPath(n.stat.hardlink)
		r.links[target] = append(r.links[target], at)
	}
}

// parseSum returns a digest's value, and whether it is one that can be kept; a
// file with any other is read when its digest is needed.
func parseSum(d digest.Digest) (s sum, ok bool) {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return s, false
	}
	for i := range s {
		s[i] = unhex(d.Encoded()[2*i])<<4 | unhex(d.Encoded()[2*i+1])
	}
	return s, true
}

// unhex is for digits that Validate has checked.
func unhex(c byte) byte {
	if c <= '9' {
		return c - '0'
	}
	return c - 'a' + 10
}

// parent returns the directory that at is in, forgets the recursive digests
// from the root down to it, and makes what isn't there. Such a directory, whose
// own entry hasn't come, is read from disk if that stays so.
func (r *Recorder) parent(at string) *node {
	n := r.root
	n.folded = false
	for elem := range strings.SplitSeq(strings.TrimPrefix(path.Dir(at), "/"), "/") {
		if elem == "" {
			continue
		}
		i, ok := n.find(elem)
		if !ok || n.children[i].kind != dir {
			d := newDir(elem)
			if ok {
				n.children[i] = d
			} else {
				n.children = slices.Insert(n.children, i, d)
			}
		}
		n = n.children[i]
		n.folded = false
	}
	return n
}

// lookup returns the node at a path, nil if there is none.
func (r *Recorder) lookup(at string) *node {
	n := r.root
	for elem := range strings.SplitSeq(strings.TrimPrefix(at, "/"), "/") {
		if elem == "" {
			continue
		}
		if n.kind != dir {
			return nil
		}
		if n = n.child(elem); n == nil {
			return nil
		}
	}
	return n
}

// Remove forgets path and everything below it.
func (r *Recorder) Remove(p string) {
	at := keyPath(p)
	if at == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lookup(at) == nil {
		return
	}
	parent := r.parent(at)
	i, _ := parent.find(path.Base(at))
	parent.children = slices.Delete(parent.children, i, i+1)
	if r.removed = append(r.removed, at); len(r.removed) > maxRemoved {
		r.removed = r.removed[1:]
	}
}

// Lookup returns the entry recorded for path, and whether there is one.
func (r *Recorder) Lookup(p string) (Entry, bool) {
	at := keyPath(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.lookup(at)
	if n == nil || n.stat == nil {
		return Entry{}, false
	}
	return n.entry(at), true
}

// All yields the recorded entries in the order of a walk: a directory before
// what is in it, names in byte order. The recorder must not be changed
// meanwhile.
func (r *Recorder) All() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		r.root.each("", func(n *node, at string) bool {
			return n.stat == nil || yield(n.entry(at))
		})
	}
}

// entry gives back what was Set. The path is without a leading slash.
func (n *node) entry(at string) Entry {
	e := Entry{
		Path: strings.TrimPrefix(at, "/"), Mode: n.stat.mode, UID: n.stat.uid, GID: n.stat.gid,
		Size: n.stat.size, ModTime: n.stat.modTime, Linkname: n.stat.hardlink,
		DevMajor: n.stat.devMajor, DevMinor: n.stat.devMinor, Xattrs: n.stat.xattrs,
	}
	if n.kind == symlink {
		e.Linkname = n.link
	}
	if n.hashed {
		e.Digest = n.head.digest()
	}
	return e
}

// Save stores the tree beside u; call it before u is committed or released.
// The recorder is spent.
func (r *Recorder) Save(u *cache.Mutable) error { return r.save(u) }

func (r *Recorder) save(u mutableRecord) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.root == nil {
		return fmt.Errorf("internal error: content digests of %s are saved twice", u.ID())
	}
	r.settleLinks()
	r.root.foldKnown()
	data, nodes := encode(r.root)
	u.SetMetadata(metadataKey, data)
	r.saveRemoved(u)
	shared.plant(u.ID(), r.root, stampOf(data), nodes)
	r.root, r.links = nil, nil
	return nil
}

// settleLinks gives hard links the digest of the file they point to, whichever
// of them arrived first.
func (r *Recorder) settleLinks() {
	for target, links := range r.links {
		to := r.lookup(target)
		if to == nil || to.kind == dir {
			continue
		}
		for _, at := range links {
			if n := r.lookup(at); n != nil && n.kind == file && n.stat != nil && n.stat.hardlink != "" {
				r.parent(at)
				n.head, n.hashed = to.head, to.hashed
			}
		}
	}
}

// foldKnown folds the directories below which everything is known, and reports
// whether n is one, so that it is stored and not computed once more.
func (n *node) foldKnown() bool {
	if n.kind != dir || n.folded {
		return n.hashed
	}
	known := n.hashed && n.listed
	for _, c := range n.children {
		known = c.foldKnown() && known
	}
	if known {
		n.fold()
	}
	return known
}
