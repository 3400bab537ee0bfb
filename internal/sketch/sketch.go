// Package sketch summarises sets in a fixed number of bytes such that the
// difference of two similar sets can be read from their summaries alone: up to
// some 16 items, however large the sets are.
//
// It is an invertible Bloom lookup table. Every item is in one cell of each of
// the tables, and a cell holds the sum (exclusive or) of its items and of their
// checks. In the difference of two sketches common items cancel out. A cell
// that holds one item shows it, by its check; taking that item out of its
// other cells may leave one alone there, and so on.
package sketch

import "encoding/binary"

const (
	tables   = 4 // 4 of them rather than 3: a pair of items rarely shares all its cells
	perTable = 8
	cells    = tables * perTable
	cellSize = 10

	// Size is the length of a sketch in bytes.
	Size = cells * cellSize
)

type cell struct {
	sum   uint64
	check uint16
}

// Sketch is the summary of a set of numbers, which should be hashes. The zero
// Sketch is that of the empty set.
type Sketch [cells]cell

// Toggle puts item into the set, or takes it out if it is there.
func (s *Sketch) Toggle(item uint64) {
	h := mix(item)
	check := uint16(h >> 48)
	for t := range tables {
		c := &s[place(h, t)]
		c.sum ^= item
		c.check ^= check
	}
}

// Diff returns the items that are in one of the sets and not in the other.
// Complete tells that these are all of them; if too many differ, some are
// missing or all.
func Diff(a, b *Sketch) (items []uint64, complete bool) {
	var d Sketch
	for i := range d {
		d[i] = cell{a[i].sum ^ b[i].sum, a[i].check ^ b[i].check}
	}
	for again := true; again; {
		again = false
		for i := range d {
			// More items than cells can only be a cell that shows what isn't
			// there, over and over.
			if item := d[i].sum; d.alone(i) && len(items) < cells {
				d.Toggle(item)
				items = append(items, item)
				again = true
			}
		}
	}
	return items, d == Sketch{}
}

// alone reports whether cell i holds one item.
func (s *Sketch) alone(i int) bool {
	if s[i] == (cell{}) {
		return false
	}
	h := mix(s[i].sum)
	return uint16(h>>48) == s[i].check && place(h, i/perTable) == i
}

// place is the cell of table t for an item that mixes to h.
func place(h uint64, t int) int { return t*perTable + int(h>>(3*t)%perTable) }

// mix is the finalizer of SplitMix64: every bit of item reaches every bit.
func mix(item uint64) uint64 {
	item += 0x9e3779b97f4a7c15
	item = (item ^ item>>30) * 0xbf58476d1ce4e5b9
	item = (item ^ item>>27) * 0x94d049bb133111eb
	return item ^ item>>31
}

// Bytes is the stored form.
func (s *Sketch) Bytes() []byte {
	b := make([]byte, 0, Size)
	for _, c := range s {
		b = binary.BigEndian.AppendUint64(b, c.sum)
		b = binary.BigEndian.AppendUint16(b, c.check)
	}
	return b
}

// Parse reads the stored form, and reports whether b is one.
func Parse(b []byte) (s Sketch, ok bool) {
	if len(b) != Size {
		return s, false
	}
	for i := range s {
		s[i] = cell{binary.BigEndian.Uint64(b[i*cellSize:]), binary.BigEndian.Uint16(b[i*cellSize+8:])}
	}
	return s, true
}
