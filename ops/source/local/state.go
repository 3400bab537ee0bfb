package local

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"

	"github.com/tonistiigi/fsutil/types"
)

// stateKey is where the state of the last transfer is kept beside the record.
const stateKey = "local.state"

// stateVersion starts the encoded state; another one isn't read.
const stateVersion = 1

// state is what the last transfer brought: every entry as the client described
// it, in the order of the walk. It spares reading the tree again.
//
//	version, metadata, then per entry:
//	shared prefix with the path before, rest of path, mode, uid, gid, size,
//	mtime, link, device, xattrs
//
// Numbers are varints, strings are preceded by their length.
type state struct {
	// metadata is the digest of the metadata file, "" if there is none.
	metadata string

	buf  []byte // encoded entries
	path string // the last one added
}

func (s *state) add(st *types.Stat) {
	shared := commonPrefix(s.path, st.Path)
	s.path = st.Path
	b := binary.AppendUvarint(s.buf, uint64(shared))
	b = appendString(b, st.Path[shared:])
	b = binary.AppendUvarint(b, uint64(st.Mode))
	b = binary.AppendUvarint(b, uint64(st.Uid))
	b = binary.AppendUvarint(b, uint64(st.Gid))
	b = binary.AppendVarint(b, st.Size)
	b = binary.AppendVarint(b, st.ModTime)
	b = appendString(b, st.Linkname)
	b = binary.AppendVarint(b, st.Devmajor)
	b = binary.AppendVarint(b, st.Devminor)
	b = binary.AppendUvarint(b, uint64(len(st.Xattrs)))
	if len(st.Xattrs) > 0 {
		for _, k := range slices.Sorted(maps.Keys(st.Xattrs)) {
			b = appendString(b, k)
			b = appendString(b, string(st.Xattrs[k]))
		}
	}
	s.buf = b
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func (s *state) encode() []byte {
	b := make([]byte, 0, len(s.buf)+64)
	b = binary.AppendUvarint(b, stateVersion)
	b = appendString(b, s.metadata)
	return append(b, s.buf...)
}

var errState = errors.New("state of the last transfer is damaged")

// oldState reads a state entry by entry.
type oldState struct {
	metadata string
	rest     decoder
	cur      *types.Stat // valid while more, until the next call of next
	more     bool
}

// openState starts to read an encoded state; nil stands for an empty one.
func openState(raw []byte) (*oldState, error) {
	o := &oldState{cur: &types.Stat{}}
	if raw == nil {
		return o, nil
	}
	o.rest.b = raw
	if o.rest.uint() != stateVersion {
		return nil, errState
	}
	o.metadata = o.rest.string()
	return o, o.next()
}

// validState tells whether raw can be read from start to end.
func validState(raw []byte) bool {
	o, err := openState(raw)
	for err == nil && o.more {
		err = o.next()
	}
	return err == nil
}

// next moves to the next entry.
func (o *oldState) next() error {
	if o.rest.bad {
		return errState
	}
	if len(o.rest.b) == 0 {
		o.more = false
		return nil
	}
	d, st := &o.rest, o.cur
	shared := d.uint()
	if shared > uint64(len(st.Path)) {
		return errState
	}
	path := st.Path[:shared] + d.string()
	if o.more && comparePaths(path, st.Path) <= 0 || checkPath(path) != nil {
		return errState
	}
	st.Path = path
	st.Mode, st.Uid, st.Gid = uint32(d.uint()), uint32(d.uint()), uint32(d.uint())
	st.Size, st.ModTime, st.Linkname = d.int(), d.int(), d.string()
	st.Devmajor, st.Devminor, st.Xattrs = d.int(), d.int(), nil
	n := d.uint()
	for ; n > 0 && !d.bad; n-- {
		if st.Xattrs == nil {
			st.Xattrs = map[string][]byte{}
		}
		k := d.string()
		st.Xattrs[k] = []byte(d.string())
	}
	if d.bad {
		return errState
	}
	o.more = true
	return nil
}

// decoder reads numbers and strings; bad is set once something isn't there.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.bad, d.b = true, nil
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.bad, d.b = true, nil
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) string() string {
	n := d.uint()
	if n > uint64(len(d.b)) {
		d.bad, d.b = true, nil
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

// same tells whether the client's entry is what was transferred last time. The
// mtime of a directory changes with what is in it and says nothing of its own.
func same(a, b *types.Stat, k kind) bool {
	if k != kindDir && (a.Size != b.Size || a.ModTime != b.ModTime) {
		return false
	}
	return a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid && a.Linkname == b.Linkname &&
		a.Devmajor == b.Devmajor && a.Devminor == b.Devminor && maps.EqualFunc(a.Xattrs, b.Xattrs, slices.Equal)
}
