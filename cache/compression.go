package cache

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

// Compression types, by the names that clients use (EXP-025).
const (
	uncompressed = "uncompressed"
	gzipped      = "gzip"
	zstandard    = "zstd"
)

// Check refuses types and levels that Layers would refuse.
func (c Compression) Check() error {
	_, err := c.normalise()
	return err
}

// normalise fills in the default and refuses what isn't known.
func (c Compression) normalise() (Compression, error) {
	lowest, highest := 0, 9
	switch c.Type {
	case "", gzipped:
		c.Type = gzipped
	case zstandard:
		highest = 22
	case uncompressed:
		c.Level = nil
	default:
		return c, fmt.Errorf("compression %q isn't one of uncompressed, gzip, zstd", c.Type)
	}
	if c.Level != nil && (*c.Level < lowest || *c.Level > highest) {
		return c, fmt.Errorf("compression level %d of %s isn't within %d and %d", *c.Level, c.Type, lowest, highest)
	}
	return c, nil
}

// compressor is a WriteCloser that can be used again.
type compressor interface {
	io.WriteCloser
	Reset(w io.Writer)
}

// compressors keeps idle compressors by type and level: their tables are
// bigger than most layers.
var compressors struct {
	mu   sync.Mutex // guards idle
	idle map[compressorKey][]compressor
}

type compressorKey struct {
	kind  string
	level int
}

const (
	defaultLevel = -1
	// gzipBlock is how much one goroutine compresses. It is part of the
	// format: another value gives other bytes for the same layer.
	gzipBlock = 256 << 10
	// idleCompressors bounds what is kept per type and level.
	idleCompressors = 4
)

// compress calls fill with a writer whose bytes arrive in w as c says. The
// same bytes give the same result, however they are cut into writes and
// however many cores there are.
func compress(c Compression, w io.Writer, fill func(io.Writer) error) error {
	if c.Type == uncompressed {
		return fill(w)
	}
	key := compressorKey{c.Type, defaultLevel}
	if c.Level != nil {
		key.level = *c.Level
	}
	z, err := takeCompressor(key, w)
	if err != nil {
		return err
	}
	if err := fill(z); err != nil {
		return errors.Join(err, z.Close())
	}
	if err := z.Close(); err != nil {
		return err
	}
	compressors.mu.Lock()
	defer compressors.mu.Unlock()
	if idle := compressors.idle[key]; len(idle) < idleCompressors {
		z.Reset(io.Discard)
		if compressors.idle == nil {
			compressors.idle = map[compressorKey][]compressor{}
		}
		compressors.idle[key] = append(idle, z)
	}
	return nil
}

func takeCompressor(key compressorKey, w io.Writer) (compressor, error) {
	compressors.mu.Lock()
	if idle := compressors.idle[key]; len(idle) > 0 {
		z := idle[len(idle)-1]
		compressors.idle[key] = idle[:len(idle)-1]
		compressors.mu.Unlock()
		z.Reset(w)
		return z, nil
	}
	compressors.mu.Unlock()
	if key.kind == zstandard {
		level := zstd.SpeedDefault
		if key.level != defaultLevel {
			level = zstd.EncoderLevelFromZstd(key.level)
		}
		return zstd.NewWriter(w, zstd.WithEncoderLevel(level))
	}
	z, err := pgzip.NewWriterLevel(w, key.level)
	if err != nil {
		return nil, err
	}
	return gzipWriter{z}, z.SetConcurrency(gzipBlock, runtime.GOMAXPROCS(0))
}

// gzipWriter keeps its block size when it is reset.
type gzipWriter struct{ *pgzip.Writer }

func (z gzipWriter) Reset(w io.Writer) {
	z.Writer.Reset(w)
	z.SetConcurrency(gzipBlock, runtime.GOMAXPROCS(0)) // fails for other arguments only
}

var (
	gzipMagic = []byte{0x1f, 0x8b, 0x08}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// decompress returns the bytes that r compresses, judged by its first bytes:
// media types of images in the wild aren't always right.
func decompress(r io.Reader) (io.ReadCloser, error) {
	buf := bufio.NewReaderSize(r, 64<<10)
	head, err := buf.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return pgzip.NewReaderN(buf, 256<<10, 4)
	case bytes.HasPrefix(head, zstdMagic), skippableFrame(head):
		z, err := zstd.NewReader(buf)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(buf), nil
}

// skippableFrame reports whether a zstd stream starts with metadata, as
// zstd:chunked layers may.
func skippableFrame(head []byte) bool {
	return len(head) == 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:], []byte{0x2a, 0x4d, 0x18})
}

// Media types of layers, OCI's and Docker's.
const (
	ociLayer     = "application/vnd.oci.image.layer.v1.tar"
	ociForeign   = "application/vnd.oci.image.layer.nondistributable.v1.tar"
	dockerLayer  = "application/vnd.docker.image.rootfs.diff.tar"
	dockerRemote = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

// layerType is a media type of a layer taken apart.
type layerType struct {
	compression string
	foreign     bool
}

// parseLayerType takes a layer's media type apart; false for what isn't one.
func parseLayerType(mediaType string) (layerType, bool) {
	for _, base := range []string{ociLayer, ociForeign, dockerLayer, dockerRemote} {
		suffix, ok := strings.CutPrefix(mediaType, base)
		if !ok {
			continue
		}
		t := layerType{foreign: base == ociForeign || base == dockerRemote}
		switch suffix {
		case "":
			t.compression = uncompressed
		case "+gzip", ".gzip":
			t.compression = gzipped
		case "+zstd", ".zstd":
			t.compression = zstandard
		default:
			return layerType{}, false
		}
		return t, true
	}
	return layerType{}, false
}

// mediaType puts the media type together.
func (t layerType) mediaType(oci bool) string {
	base, separator := dockerLayer, "."
	switch {
	case oci && t.foreign:
		base, separator = ociForeign, "+"
	case oci:
		base, separator = ociLayer, "+"
	case t.foreign:
		base = dockerRemote
	}
	if t.compression == uncompressed {
		return base
	}
	return base + separator + t.compression
}

// compressionOf is the compression that a layer's media type names, "" if it
// isn't a layer's.
func compressionOf(mediaType string) string {
	t, _ := parseLayerType(mediaType)
	return t.compression
}

// retype turns a layer's media type into OCI's or Docker's; others stay.
func retype(mediaType string, oci bool) string {
	t, ok := parseLayerType(mediaType)
	if !ok {
		return mediaType
	}
	return t.mediaType(oci)
}
