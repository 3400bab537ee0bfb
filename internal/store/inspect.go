package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// errDamaged marks a file that is to be set aside.
var errDamaged = errors.New("the file is damaged")

// finding is what a look at the whole file gives.
type finding struct {
	format   int
	position position // of the last commit in it
	found    uint64   // sum of the records that were found
	records  int
	bytes    int64 // of their names and values
	unproven bool
	partial  bool // see unprovenPart
}

// inspect reads every page of a bbolt file that nobody writes at the time, before
// bbolt sees it: bbolt trusts its file, and a damaged one makes it panic, hang
// or, worse, find the wrong thing. A file that passes has an intact tree in each
// bucket, an exact list of free pages, and every record that was committed, as
// the sum of all records shows.
//
// An empty file, which bbolt makes a database of, is damaged too: the caller
// knows whether there ought to be one.
func inspect(path string) (f finding, err error) {
	file, err := os.Open(path)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	st, err := file.Stat()
	if err != nil {
		return f, err
	}
	if st.Size() == 0 {
		return f, damagedf("it is empty")
	}
	data, err := unix.Mmap(int(file.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return f, fmt.Errorf("map %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(data)) }()
	return inspectData(data)
}

func inspectData(data []byte) (finding, error) {
	i := &inspector{data: data}
	// A disk that can't read a page makes the memory map fault.
	err := guard(i.run)
	if p := (*panicError)(nil); errors.As(err, &p) {
		err = fmt.Errorf("%w: reading it: %v", errDamaged, p.value)
	}
	if err != nil {
		return finding{}, err
	}
	return i.finding, nil
}

// The layout of bbolt's file, all in the machine's byte order.
const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	elementSize = 16 // branch: pos 4, ksize 4, page 8; leaf: flags 4, pos 4, ksize 4, vsize 4
	bucketSize  = 16 // root page 8, sequence 8; root 0: the page follows

	flagBranch, flagLeaf, flagFreelist = 0x01, 0x02, 0x10
	elementBucket                      = 0x01

	metaSize                 = 64
	metaMagic, metaVersion   = 0xED0CDAED, 2
	maxPageSize, maxTreeDeep = 64 << 10, 64
)

var order = binary.NativeEndian

// meta is one of bbolt's two meta pages, which name the roots.
type meta struct {
	pageSize             int
	root, freelist, high uint64 // high: pages from here on aren't used
	tx                   uint64
}

// inspector walks the file. Page ids come from the file and are checked before
// they are followed; a page is visited once.
type inspector struct {
	finding
	data     []byte
	pageSize int
	high     uint64
	used     []bool // by page

	bucket  string // the one being walked, "" for the list of buckets
	hash    bucketHash
	meta    map[string]string // what metaBucket holds
	buckets int
}

func damagedf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errDamaged, fmt.Errorf(format, args...))
}

func (i *inspector) run() error {
	m, err := i.metas()
	if err != nil {
		return err
	}
	i.pageSize, i.high, i.meta = m.pageSize, m.high, map[string]string{}
	if int64(m.high) > int64(len(i.data)/m.pageSize) {
		return damagedf("it has %d bytes and should have at least %d", len(i.data), int64(m.high)*int64(m.pageSize))
	}
	i.used = make([]bool, m.high)
	i.used[0], i.used[1] = true, true
	if err := i.walk(m.root, nil, nil, 0); err != nil {
		return err
	}
	if err := i.free(m.freelist); err != nil {
		return err
	}
	for id, used := range i.used {
		if !used {
			return damagedf("page %d is neither used nor free", id)
		}
	}
	return i.layout()
}

// metas returns the meta page of the last commit. Both must be whole: with one
// of them lost, bbolt would silently go back by a commit.
func (i *inspector) metas() (meta, error) {
	if len(i.data) < 2*512 {
		return meta{}, damagedf("it has %d bytes", len(i.data))
	}
	first, err := readMeta(i.data, 0)
	if err != nil {
		return meta{}, err
	}
	if s := first.pageSize; s < 512 || s > maxPageSize || s&(s-1) != 0 || 2*s > len(i.data) {
		return meta{}, damagedf("its pages have %d bytes", s)
	}
	second, err := readMeta(i.data, first.pageSize)
	if err != nil {
		return meta{}, err
	}
	if second.pageSize != first.pageSize {
		return meta{}, damagedf("its pages have %d or %d bytes", first.pageSize, second.pageSize)
	}
	if second.tx > first.tx {
		first = second
	}
	if first.high < 4 || first.root >= first.high || first.freelist >= first.high {
		return meta{}, damagedf("its roots %d and %d are not below %d", first.root, first.freelist, first.high)
	}
	return first, nil
}

func readMeta(data []byte, page int) (meta, error) {
	b := data[page+pageHeader:][:metaSize]
	sum := fnv.New64a()
	sum.Write(b[:metaSize-8])
	switch {
	case order.Uint32(b) != metaMagic:
		return meta{}, damagedf("it is no database")
	case order.Uint32(b[4:]) != metaVersion:
		return meta{}, damagedf("its meta page has version %d", order.Uint32(b[4:]))
	case order.Uint64(b[56:]) != sum.Sum64():
		return meta{}, damagedf("a meta page has the wrong checksum")
	}
	return meta{
		pageSize: int(order.Uint32(b[8:])), root: order.Uint64(b[16:]),
		freelist: order.Uint64(b[32:]), high: order.Uint64(b[40:]), tx: order.Uint64(b[48:]),
	}, nil
}

// page is a checked page: its elements are inside of it.
type page struct {
	id    uint64
	flags uint16
	count int
	data  []byte // header and overflow pages included
}

// claim returns a page that nothing else refers to.
func (i *inspector) claim(id uint64) (page, error) {
	if id < 2 || id >= i.high {
		return page{}, damagedf("page %d is not between 2 and %d", id, i.high)
	}
	at := int(id) * i.pageSize
	head := i.data[at : at+pageHeader]
	if got := order.Uint64(head); got != id {
		return page{}, damagedf("page %d calls itself %d", id, got)
	}
	pages := uint64(order.Uint32(head[12:])) + 1
	if id+pages > i.high {
		return page{}, damagedf("page %d runs over %d pages, beyond page %d", id, pages, i.high)
	}
	for n := id; n < id+pages; n++ {
		if i.used[n] {
			return page{}, damagedf("page %d is used twice", n)
		}
		i.used[n] = true
	}
	return readPage(id, i.data[at:at+int(pages)*i.pageSize])
}

func readPage(id uint64, data []byte) (page, error) {
	p := page{id: id, flags: order.Uint16(data[8:]), count: int(order.Uint16(data[10:])), data: data}
	if p.flags != flagFreelist && pageHeader+p.count*elementSize > len(data) {
		return page{}, damagedf("page %d has no room for %d elements", id, p.count)
	}
	return p, nil
}

// part returns the n bytes at off behind an element.
func (p page) part(element, off, n int) ([]byte, error) {
	from := pageHeader + element*elementSize + off
	if off < elementSize || from > len(p.data) || n > len(p.data)-from {
		return nil, damagedf("element %d of page %d reaches out of it", element, p.id)
	}
	return p.data[from : from+n : from+n], nil
}

func (p page) element(n int) []byte { return p.data[pageHeader+n*elementSize:][:elementSize] }

// walk visits the tree under page id, whose keys must be ordered, from low on,
// and below limit.
func (i *inspector) walk(id uint64, low, limit []byte, depth int) error {
	p, err := i.claim(id)
	if err != nil {
		return err
	}
	switch {
	case p.flags == flagLeaf:
		return i.leaf(p, low, limit)
	case p.flags != flagBranch:
		return damagedf("page %d has the flags %#x", id, p.flags)
	case p.count == 0 || depth > maxTreeDeep:
		return damagedf("branch page %d has %d elements at depth %d", id, p.count, depth)
	}
	keys := make([][]byte, p.count, p.count+1)
	for n := range keys {
		e := p.element(n)
		if keys[n], err = p.part(n, int(order.Uint32(e)), int(order.Uint32(e[4:]))); err != nil {
			return err
		}
		if err := inOrder(p, n, keys[n], low, limit); err != nil {
			return err
		}
		low = keys[n]
	}
	keys = append(keys, limit)
	for n := range p.count {
		if err := i.walk(order.Uint64(p.element(n)[8:]), keys[n], keys[n+1], depth+1); err != nil {
			return err
		}
	}
	return nil
}

// inOrder says whether key n of a page may follow low. The first one may equal
// it.
func inOrder(p page, n int, key, low, limit []byte) error {
	c := bytes.Compare(key, low)
	if len(key) == 0 || c < 0 || c == 0 && n > 0 || limit != nil && bytes.Compare(key, limit) >= 0 {
		return damagedf("key %d of page %d is out of order", n, p.id)
	}
	return nil
}

func (i *inspector) leaf(p page, low, limit []byte) error {
	for n := range p.count {
		e := p.element(n)
		flags, off, ksize, vsize := order.Uint32(e), int(order.Uint32(e[4:])), int(order.Uint32(e[8:])), int(order.Uint32(e[12:]))
		both, err := p.part(n, off, ksize+vsize)
		if err != nil {
			return err
		}
		key, value := both[:ksize:ksize], both[ksize:]
		if err := inOrder(p, n, key, low, limit); err != nil {
			return err
		}
		low = key
		switch {
		case i.bucket == "" && flags == elementBucket:
			err = i.enter(string(key), value)
		case i.bucket != "" && flags == 0:
			i.record(key, value)
		default:
			err = damagedf("element %d of page %d, in %q, has the flags %#x", n, p.id, i.bucket, flags)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// enter walks a bucket.
func (i *inspector) enter(name string, header []byte) error {
	if len(header) < bucketSize {
		return damagedf("bucket %q has a header of %d bytes", name, len(header))
	}
	i.bucket, i.hash = name, hashBucket(name)
	defer func() { i.bucket = "" }()
	i.buckets++
	if root := order.Uint64(header); root != 0 {
		return i.walk(root, nil, nil, 0)
	}
	inline := header[bucketSize:]
	if len(inline) < pageHeader {
		return damagedf("bucket %q has an inline page of %d bytes", name, len(inline))
	}
	p, err := readPage(0, inline)
	if err == nil && p.flags != flagLeaf {
		err = damagedf("bucket %q has an inline page with the flags %#x", name, p.flags)
	}
	if err != nil {
		return err
	}
	return i.leaf(p, nil, nil)
}

func (i *inspector) record(key, value []byte) {
	if i.bucket == metaBucket {
		i.meta[string(key)] = string(value)
		return
	}
	i.records++
	i.bytes += int64(len(i.bucket) + len(key) + len(value))
	i.found += i.hash.record(key, value)
}

// free compares the list of free pages with what is used. A page that is in use
// and counts as free would be written over.
func (i *inspector) free(id uint64) error {
	p, err := i.claim(id)
	if err != nil {
		return err
	}
	if p.flags != flagFreelist {
		return damagedf("page %d is to be the list of free pages and has the flags %#x", id, p.flags)
	}
	ids := p.data[pageHeader:]
	count := uint64(p.count)
	if count == 0xFFFF { // too many for the field: the first element counts them
		count, ids = order.Uint64(ids), ids[8:]
	}
	if count > uint64(len(ids)/8) {
		return damagedf("the list of free pages has no room for %d", count)
	}
	for n := range count {
		free := order.Uint64(ids[n*8:])
		if free < 2 || free >= i.high || i.used[free] {
			return damagedf("page %d is on the list of free pages and in use", free)
		}
		i.used[free] = true
	}
	return nil
}

// layout looks at what the store keeps of its own: see the keys of metaBucket.
func (i *inspector) layout() (err error) {
	if i.buckets == 0 {
		return nil // just made
	}
	if i.format, err = readFormat(i.meta); err != nil {
		return err
	}
	state, unproven := i.meta[unprovenKey]
	i.unproven, i.partial = unproven, unproven && state != unprovenWhole
	if i.format < formatWithSum {
		return nil
	}
	if i.position, err = decodePosition([]byte(i.meta[positionKey])); err != nil {
		return err
	}
	if i.found != i.position.sum {
		return damagedf("its %d records are not those of its last commit", i.records)
	}
	return nil
}

// readFormat returns the layout's version. The one of a newer program is
// believed only if its check says so: one wrong bit must not lock a user out.
func readFormat(meta map[string]string) (int, error) {
	text, ok := meta[formatKey]
	if !ok {
		return 0, damagedf("the layout's version is missing")
	}
	n, err := strconv.Atoi(text)
	switch {
	case err != nil || n < 1, n > 1 && meta[formatCheckKey] != formatCheck(text):
		return 0, damagedf("the layout's version is %q", text)
	case n > format:
		return 0, newerError(n)
	}
	return n, nil
}

func newerError(n int) error {
	return fmt.Errorf("it has layout %d, and this program knows layouts up to %d only: a newer kiln wrote it; use that, or another root", n, format)
}
