package history

import (
	"encoding/binary"
	"fmt"
	"iter"
	"sync"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/klauspost/compress/zstd"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
)

const (
	// logsBucket holds what builds told, by ref: messages in the framing of
	// CTL-133, compressed.
	logsBucket = "history.logs"
	// maxLog bounds what steps printed, in bytes of one build's messages. What
	// is beyond is left out; that steps ran, and how they ended, never is.
	maxLog = 8 << 20
	// window is how far back the compression looks.
	window = 256 << 10
	// piece is about how much is compressed at a time.
	piece = 1 << 20
)

// codec compresses and decompresses logs; both halves may be used concurrently.
var codec = sync.OnceValues(func() (*zstd.Encoder, *zstd.Decoder) {
	// Neither fails with options that are good. The encoder stays, with twice the
	// window, which would be 8 MB; what repeats in a log is near.
	enc, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	dec, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(8*maxLog))
	return enc, dec
})

// putLog adds what the build told to the batch that stores its record. It takes no
// more memory than a few messages do: a large build, which has just ended, has
// enough already.
func putLog(b *store.Batch, ref string, told iter.Seq[*control.StatusResponse]) error {
	enc, _ := codec()
	var framed, packed []byte
	size := 0
	pack := func() { size, packed, framed = size+len(framed), enc.EncodeAll(framed, packed), framed[:0] }
	for msg := range told {
		if size+len(framed) > maxLog {
			msg = &control.StatusResponse{Vertexes: msg.Vertexes, Warnings: msg.Warnings}
		}
		framed = binary.LittleEndian.AppendUint32(framed, uint32(proto.Size(msg)))
		var err error
		if framed, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(framed, msg); err != nil {
			return fmt.Errorf("encode log of build %s: %w", ref, err)
		}
		if len(framed) > piece {
			pack()
		}
	}
	pack()
	b.Put(logsBucket, ref, packed)
	return nil
}

// Told returns what the build told from its beginning to its end; ok is false
// if there is no record of it.
func (l *Log) Told(ref string) (told []*control.StatusResponse, ok bool, err error) {
	l.mu.Lock()
	rec := l.ended[ref]
	l.mu.Unlock()
	if rec == nil {
		return nil, false, nil
	}
	packed, ok := l.cfg.Store.Get(logsBucket, ref)
	if !ok {
		return nil, true, nil // its record is from before there were logs
	}
	_, dec := codec()
	framed, err := dec.DecodeAll(packed, nil)
	if err != nil {
		return nil, true, fmt.Errorf("read log of build %s: %w", ref, err)
	}
	for len(framed) > 0 {
		if len(framed) < 4 || uint64(len(framed)-4) < uint64(binary.LittleEndian.Uint32(framed)) {
			return nil, true, fmt.Errorf("read log of build %s: it ends in the middle of a message", ref)
		}
		size := binary.LittleEndian.Uint32(framed)
		msg := &control.StatusResponse{}
		if err := proto.Unmarshal(framed[4:4+size], msg); err != nil {
			return nil, true, fmt.Errorf("read log of build %s: %w", ref, err)
		}
		told, framed = append(told, msg), framed[4+size:]
	}
	return told, true, nil
}
