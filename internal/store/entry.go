package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
)

// An entry of the journal, all numbers little endian:
//
//	magic 4 | size of the payload 4 | CRC-32C of what follows it 4 | format 4 | seq 8 | sum 8 | payload | size 4
//
// The size at the end leads from the end of the file to its last entry. The
// payload is a list of changes: a byte that is 1 for a deletion, and bucket, key
// and value, each after its length as a uvarint.
const (
	entryHead  = 32
	entryTail  = 4
	entryMagic = "kln\x01"
)

var (
	crcTable    = crc32.MakeTable(crc32.Castagnoli)
	errNoEntry  = errors.New("there is no whole entry")
	errBadEntry = errors.New("the entry makes no sense")
)

// entryInfo is the head of an entry.
type entryInfo struct {
	position
	format int
}

// beginEntry returns an empty entry, in the memory of an earlier one. Changes are
// appended to it, and endEntry makes it whole.
func beginEntry(memory []byte) []byte { return append(memory[:0], make([]byte, entryHead)...) }

// endEntry makes entry that of the commit at.
func endEntry(entry []byte, at position) []byte {
	le := binary.LittleEndian
	size := uint32(len(entry) - entryHead)
	copy(entry, entryMagic)
	le.PutUint32(entry[4:], size)
	le.PutUint32(entry[12:], format)
	le.PutUint64(entry[16:], at.seq)
	le.PutUint64(entry[24:], at.sum)
	entry = le.AppendUint32(entry, size)
	le.PutUint32(entry[8:], crc32.Checksum(entry[12:], crcTable))
	return entry
}

// decodeEntry reads the entry at the start of data; rest is what follows it.
func decodeEntry(data []byte) (info entryInfo, payload, rest []byte, err error) {
	le := binary.LittleEndian
	if len(data) < entryHead+entryTail || string(data[:4]) != entryMagic {
		return info, nil, nil, errNoEntry
	}
	size := int64(le.Uint32(data[4:]))
	if size > int64(len(data))-entryHead-entryTail {
		return info, nil, nil, errNoEntry
	}
	whole := data[:entryHead+size+entryTail]
	if crc32.Checksum(whole[12:], crcTable) != le.Uint32(data[8:]) {
		return info, nil, nil, errNoEntry
	}
	info = entryInfo{position: position{le.Uint64(data[16:]), le.Uint64(data[24:])}, format: int(le.Uint32(data[12:]))}
	return info, whole[entryHead : entryHead+size], data[len(whole):], nil
}

// lastEntry reads the entry at the end of the file.
func lastEntry(f *os.File) (size int64, info entryInfo, err error) {
	st, err := f.Stat()
	if err != nil {
		return 0, info, err
	}
	size = st.Size()
	var tail [entryTail]byte
	if size < entryHead+entryTail {
		return size, info, errNoEntry
	}
	if _, err := f.ReadAt(tail[:], size-entryTail); err != nil {
		return size, info, err
	}
	n := int64(binary.LittleEndian.Uint32(tail[:])) + entryHead + entryTail
	if n > size {
		return size, info, errNoEntry
	}
	data := make([]byte, n)
	if _, err := f.ReadAt(data, size-n); err != nil && err != io.EOF {
		return size, info, err
	}
	info, _, _, err = decodeEntry(data)
	return size, info, err
}

// nextEntry returns data from the next place on that looks like an entry.
func nextEntry(data []byte) []byte {
	for len(data) > 0 {
		i := bytes.Index(data[1:], []byte(entryMagic))
		if i < 0 {
			return nil
		}
		data = data[1+i:]
		if _, _, _, err := decodeEntry(data); err == nil {
			return data
		}
	}
	return nil
}

// encode is the group's entry, of the commit at.
func (g *group) encode(at position) []byte {
	out := beginEntry(make([]byte, 0, entryHead+g.size+g.size/4+entryTail))
	for _, bucket := range sortedKeys(g.buckets) {
		p := g.buckets[bucket]
		for _, key := range p.sorted {
			out = appendChange(out, bucket, key, p.entries[key])
		}
	}
	return endEntry(out, at)
}

func appendChange[T string | []byte](out []byte, bucket, key T, e entry) []byte {
	var deleted byte
	if e.deleted {
		deleted = 1
	}
	out = append(out, deleted)
	out = append(binary.AppendUvarint(out, uint64(len(bucket))), bucket...)
	out = append(binary.AppendUvarint(out, uint64(len(key))), key...)
	return append(binary.AppendUvarint(out, uint64(len(e.value))), e.value...)
}

// changes calls fn for every change of a payload. What it is given are parts of
// the payload.
func changes(payload []byte, fn func(bucket, key, value []byte, deleted bool)) error {
	for len(payload) > 0 {
		deleted := payload[0] == 1
		rest := payload[1:]
		var parts [3][]byte
		for i := range parts {
			n, used := binary.Uvarint(rest)
			if used <= 0 || n > uint64(len(rest)-used) {
				return fmt.Errorf("%w: %d bytes of it are left", errBadEntry, len(payload))
			}
			parts[i], rest = rest[used:used+int(n)], rest[used+int(n):]
		}
		fn(parts[0], parts[1], parts[2], deleted)
		payload = rest
	}
	return nil
}
