package explain

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"io"
	"sync"

	deflate "github.com/klauspost/compress/flate"
)

// packer writes values one after the other. A string that comes again is written
// as a number: steps of a build have most of theirs in common.
type packer struct {
	out     []byte
	strings map[string]uint64
	written uint64 // strings
}

// newPacker returns a packer for some bytes, and strings that are there again.
func newPacker(bytes, strings int) *packer {
	return &packer{out: make([]byte, 0, bytes), strings: make(map[string]uint64, strings)}
}

func (p *packer) number(n uint64) { p.out = binary.AppendUvarint(p.out, n) }

func (p *packer) flag(b bool) { p.number(uint64(boolInt(b))) }

func (p *packer) bytes(b []byte) {
	p.number(uint64(len(b)))
	p.out = append(p.out, b...)
}

// string writes 0 and s, or which of those before s is, from 1.
func (p *packer) string(s string) {
	n, known := p.strings[s]
	if known {
		p.number(n)
		return
	}
	p.own(s)
	p.strings[s] = p.written
}

// own writes a string that hardly comes again.
func (p *packer) own(s string) {
	p.written++
	p.number(0)
	p.number(uint64(len(s)))
	p.out = append(p.out, s...)
}

func (p *packer) texts(all []string, write func(*packer, string)) {
	p.number(uint64(len(all)))
	for _, s := range all {
		write(p, s)
	}
}

const (
	asIs      = 0
	deflated  = 1
	packedCap = 16 << 20 // bounds what damaged data can make of itself
)

// packed is what was written in the form in which it is stored, compressed if it
// takes more than limit bytes. It is compressed without a state: that of other
// compressors is larger than all that a build has to pack, and making it was
// most of what keeping an explanation took.
func (p *packer) packed(limit int) ([]byte, error) {
	if len(p.out) <= limit {
		return append([]byte{asIs}, p.out...), nil
	}
	out := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(out)
	out.Reset()
	out.WriteByte(deflated)
	if err := deflate.StatelessDeflate(out, p.out, true, nil); err != nil {
		return nil, err
	}
	return bytes.Clone(out.Bytes()), nil // and no byte more: it waits to be stored
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// unpacker reads what a packer has written. After an error, which is kept, it
// reads zeros.
type unpacker struct {
	data    []byte
	strings []string
	facets  facets // of the last record
	err     error
}

var errDamaged = errors.New("it is damaged")

func newUnpacker(data []byte) *unpacker {
	switch {
	case len(data) > 0 && data[0] == asIs:
		return &unpacker{data: data[1:]}
	case len(data) > 0 && data[0] == deflated:
		r := flate.NewReader(bytes.NewReader(data[1:]))
		plain, err := io.ReadAll(io.LimitReader(r, packedCap))
		return &unpacker{data: plain, err: err}
	}
	return &unpacker{err: errDamaged}
}

func (u *unpacker) fail() { u.err = errors.Join(u.err, errDamaged); u.data = nil }

func (u *unpacker) number() uint64 {
	n, size := binary.Uvarint(u.data)
	if size <= 0 {
		if u.err == nil {
			u.fail()
		}
		return 0
	}
	u.data = u.data[size:]
	return n
}

// count reads how many things follow, each of which takes a byte at least.
func (u *unpacker) count() int {
	n := u.number()
	if n > uint64(len(u.data)) {
		u.fail()
		return 0
	}
	return int(n)
}

func (u *unpacker) flag() bool { return u.number() == 1 }

// bytes are read as a copy; nil if there are none.
func (u *unpacker) bytes() []byte {
	n := u.count()
	b := bytes.Clone(u.data[:n:n])
	u.data = u.data[n:]
	if n == 0 {
		return nil
	}
	return b
}

func (u *unpacker) string() string {
	if n := u.number(); n > 0 {
		if n > uint64(len(u.strings)) {
			u.fail()
			return ""
		}
		return u.strings[n-1]
	}
	if u.err != nil {
		return ""
	}
	s := string(u.bytes())
	u.strings = append(u.strings, s)
	return s
}

// texts are nil if there are none.
func (u *unpacker) texts() (all []string) {
	for range u.count() {
		all = append(all, u.string())
	}
	return all
}
