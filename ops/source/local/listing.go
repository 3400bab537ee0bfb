package local

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil/types"
)

// metadataName is the file in which a metadata-only transfer leaves what the
// client has: per entry, its length in four bytes, low one first, and its
// description as sent.
const metadataName = ".fsutil-metadata"

// listing collects descriptions.
type listing struct{ buf bytes.Buffer }

func (m *listing) add(st *types.Stat) error {
	raw, err := st.MarshalVT()
	if err != nil {
		return fmt.Errorf("encode description of %s: %w", st.Path, err)
	}
	var size [4]byte
	binary.LittleEndian.PutUint32(size[:], uint32(len(raw)))
	m.buf.Write(size[:])
	m.buf.Write(raw)
	return nil
}

// acceptMetadata writes the file, unless it is there with the same content.
func (r *receiver) acceptMetadata() error {
	if r.metadata == nil {
		return nil
	}
	data := r.metadata.buf.Bytes()
	r.state.metadata = digest.FromBytes(data).String()
	if r.old.metadata == r.state.metadata {
		return nil
	}
	if err := r.change(metadataName); err != nil {
		return err
	}
	if err := r.tree.remove(metadataName); err != nil {
		return err
	}
	f := &file{st: &types.Stat{Path: metadataName, Mode: 0o644, Size: int64(len(data))}, rec: r.rec, fd: -1}
	f.st.Uid, f.st.Gid = ownUID, ownGID
	defer f.abandon()
	r.rec.Remove(metadataName)
	return f.take(r.tree, chunk{f: f, data: &types.Packet{Data: data}, last: true})
}
