package contenthash

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io/fs"
	"slices"
)

// metadataKey is where a tree is stored beside its record.
const metadataKey = "contenthash"

// The stored form is a stamp, the first 16 bytes of the sha256 of all that
// follows, then the version, the number of nodes and the nodes, parents before
// children, children in byte order. It is one value because it is small (some
// 50 bytes a file, most of them the digest) and read and written as a whole in
// a few milliseconds for 20,000 files. A node is
//
//	flags    byte
//	name     bytes (a length as uvarint, and so many bytes)
//	head     32 bytes, if hashed
//	link     bytes, if linked
//	tree     32 bytes, if folded
//	stat     if recorded: mode, uid, gid as uvarint; size, mtime, device numbers
//	         as varint; target of a hard link as bytes; number of xattrs as
//	         uvarint and for each its name and value as bytes
//	children for directories: their number as uvarint, and each of them
type stamp [16]byte

const (
	formatVersion = 1

	flagKind   = 0x03
	flagHashed = 0x04
	flagLinked = 0x08
	flagListed = 0x10
	flagFolded = 0x20
	flagStat   = 0x40
)

// maxDepth bounds what is decoded; no path is that deep, because one is at most
// 4096 bytes long where it is made by name, and digests need names.
const maxDepth = 1 << 16

// stat is what is recorded of a file apart from what its node says.
type stat struct {
	mode               fs.FileMode
	uid, gid           uint32
	size, modTime      int64
	devMajor, devMinor int64
	hardlink           string
	xattrs             map[string][]byte
}

func stampOf(data []byte) stamp {
	var s stamp
	copy(s[:], data) // shorter data is damaged and no sum agrees with it
	return s
}

// encode returns the stored form of the tree below root and its size in nodes.
func encode(root *node) (data []byte, nodes int) {
	root.each("", func(*node, string) bool { nodes++; return true })
	b := make([]byte, len(stamp{}), 64+64*nodes)
	b = append(b, formatVersion)
	b = binary.AppendUvarint(b, uint64(nodes))
	b = root.encode(b)
	body := sha256.Sum256(b[len(stamp{}):])
	copy(b, body[:len(stamp{})])
	return b, nodes
}

func (n *node) encode(b []byte) []byte {
	flags := byte(n.kind)
	set := func(on bool, flag byte) {
		if on {
			flags |= flag
		}
	}
	set(n.hashed, flagHashed)
	set(n.linked, flagLinked)
	set(n.stat != nil, flagStat)
	if n.kind == dir {
		set(n.listed, flagListed)
		set(n.folded, flagFolded)
	}
	b = appendBytes(append(b, flags), n.name)
	if n.hashed {
		b = append(b, n.head[:]...)
	}
	if n.linked {
		b = appendBytes(b, n.link)
	}
	if n.kind == dir && n.folded {
		b = append(b, n.tree[:]...)
	}
	if n.stat != nil {
		b = n.stat.encode(b)
	}
	if n.kind == dir {
		b = binary.AppendUvarint(b, uint64(len(n.children)))
		for _, c := range n.children {
			b = c.encode(b)
		}
	}
	return b
}

func (s *stat) encode(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(s.mode))
	b = binary.AppendUvarint(b, uint64(s.uid))
	b = binary.AppendUvarint(b, uint64(s.gid))
	b = binary.AppendVarint(b, s.size)
	b = binary.AppendVarint(b, s.modTime)
	b = binary.AppendVarint(b, s.devMajor)
	b = binary.AppendVarint(b, s.devMinor)
	b = appendBytes(b, s.hardlink)
	b = binary.AppendUvarint(b, uint64(len(s.xattrs)))
	keys := make([]string, 0, len(s.xattrs))
	for k := range s.xattrs {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		b = appendBytes(appendBytes(b, k), string(s.xattrs[k]))
	}
	return b
}

func appendBytes(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

var errDamaged = errors.New("stored content digests are damaged")

// decode reads the stored form. Data that isn't what encode wrote is
// errDamaged.
func decode(data []byte) (root *node, nodes int, err error) {
	if len(data) < len(stamp{}) {
		return nil, 0, errDamaged
	}
	body := sha256.Sum256(data[len(stamp{}):])
	if stamp(body[:len(stamp{})]) != stampOf(data) {
		return nil, 0, errDamaged
	}
	return decodeBody(data[len(stamp{}):])
}

func decodeBody(body []byte) (root *node, nodes int, err error) {
	d := &decoder{rest: string(body)} // names are cut out of it, not copied
	if d.byte() != formatVersion {
		return nil, 0, errDamaged
	}
	count := d.uvarint()
	if d.bad || count == 0 || count > uint64(len(d.rest))/2 {
		return nil, 0, errDamaged
	}
	d.slab = make([]node, count)
	root = d.node(0)
	if d.bad || len(d.rest) > 0 || len(d.slab) > 0 || root.kind != dir || root.name != "" {
		return nil, 0, errDamaged
	}
	return root, int(count), nil
}

// decoder cuts values off rest; after the first that doesn't fit, bad is set
// and everything reads as zero.
type decoder struct {
	rest string
	slab []node // for the nodes still to come
	bad  bool
}

func (d *decoder) cut(n uint64) string {
	if d.bad || n > uint64(len(d.rest)) {
		d.bad = true
		return ""
	}
	s := d.rest[:n]
	d.rest = d.rest[n:]
	return s
}

func (d *decoder) byte() byte {
	if s := d.cut(1); s != "" {
		return s[0]
	}
	return 0
}

func (d *decoder) uvarint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		c := d.byte()
		v |= uint64(c&0x7f) << shift
		if c < 0x80 {
			return v
		}
	}
	d.bad = true
	return 0
}

func (d *decoder) varint() int64 {
	v := d.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

func (d *decoder) bytes() string { return d.cut(d.uvarint()) }

func (d *decoder) sum() (s sum) {
	copy(s[:], d.cut(uint64(len(s))))
	return s
}

func (d *decoder) node(depth int) *node {
	if len(d.slab) == 0 || depth > maxDepth {
		d.bad = true
	}
	if d.bad {
		return &node{}
	}
	n := &d.slab[0]
	d.slab = d.slab[1:]
	flags := d.byte()
	n.kind = kind(flags & flagKind)
	n.name = d.bytes()
	if n.hashed = flags&flagHashed != 0; n.hashed {
		n.head = d.sum()
	}
	if n.linked = flags&flagLinked != 0; n.linked {
		n.link = d.bytes()
	}
	switch n.kind {
	case file, symlink:
	case dir:
		n.dirNode = &dirNode{listed: flags&flagListed != 0, folded: flags&flagFolded != 0}
		if n.folded {
			n.tree = d.sum()
		}
	default:
		d.bad = true
	}
	if flags&flagStat != 0 {
		n.stat = d.stat()
	}
	if n.kind == dir {
		d.children(n, depth)
	}
	return n
}

func (d *decoder) children(n *node, depth int) {
	count := d.uvarint()
	if count > uint64(len(d.slab)) {
		d.bad = true
	}
	if d.bad || count == 0 {
		return
	}
	n.children = make([]*node, count)
	for i := range n.children {
		n.children[i] = d.node(depth + 1)
		if i > 0 && n.children[i].name <= n.children[i-1].name {
			d.bad = true
		}
	}
}

func (d *decoder) stat() *stat {
	s := &stat{
		mode: fs.FileMode(d.uvarint()), uid: uint32(d.uvarint()), gid: uint32(d.uvarint()),
		size: d.varint(), modTime: d.varint(), devMajor: d.varint(), devMinor: d.varint(),
		hardlink: d.bytes(),
	}
	count := d.uvarint()
	if d.bad || count > uint64(len(d.rest)) {
		d.bad = true
		return s
	}
	if count > 0 {
		s.xattrs = make(map[string][]byte, count)
	}
	for range count {
		k := d.bytes()
		s.xattrs[k] = []byte(d.bytes())
	}
	return s
}
