package snapshot

import (
	"context"
	_ "crypto/sha512" // for digests of blobs that come by that name
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// bufferSize is that of the buffers that file data moves through.
const bufferSize = 256 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

func getBuffer() *[bufferSize]byte { return buffers.Get().(*[bufferSize]byte) }

// BlobWriter is an ingest. It is for one goroutine. Close without Commit
// discards it; Close after Commit does nothing.
type BlobWriter struct {
	blobs *Blobs
	file  *os.File // nil once committed or closed
	hash  hash.Hash
	size  int64 // bytes given to the hash and the file
	// What was written in small pieces is gathered here; nil while nothing is.
	buf    *[bufferSize]byte
	n      int
	err    error // the first failed write; it fails Commit
	doubts int   // of the store's, when it began
}

var _ io.WriteCloser = (*BlobWriter)(nil)

// Create starts an ingest.
func (b *Blobs) Create() (*BlobWriter, error) {
	name := filepath.Join(b.ingests, strconv.FormatInt(b.next.Add(1), 36))
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start an ingest: %w", err)
	}
	return &BlobWriter{blobs: b, file: f, hash: digest.Canonical.Hash(), doubts: b.doubtsSoFar()}, nil
}

var errIngestClosed = errors.New("the ingest is closed")

func (w *BlobWriter) Write(p []byte) (int, error) {
	if w.file == nil {
		return 0, errIngestClosed
	}
	if len(p) > bufferSize-w.n {
		w.flush()
	}
	switch {
	case w.err != nil:
		return 0, w.err
	case len(p) >= bufferSize/4 && w.n == 0:
		w.store(p)
	default:
		w.gather(p)
	}
	if w.err != nil {
		return 0, w.err
	}
	return len(p), nil
}

// gather keeps p, of which the buffer has room for some at least.
func (w *BlobWriter) gather(p []byte) {
	for len(p) > 0 && w.err == nil {
		if w.buf == nil {
			w.buf = getBuffer()
		}
		n := copy(w.buf[w.n:], p)
		w.n += n
		if p = p[n:]; len(p) > 0 {
			w.flush()
		}
	}
}

// flush stores what was gathered.
func (w *BlobWriter) flush() {
	if w.n > 0 {
		w.store(w.buf[:w.n])
		w.n = 0
	}
}

func (w *BlobWriter) store(p []byte) {
	if w.err != nil {
		return
	}
	if _, err := w.file.Write(p); err != nil {
		w.err = fmt.Errorf("write an ingest: %w", err)
		return
	}
	w.hash.Write(p)
	w.size += int64(len(p))
}

// ReadFrom writes all of r, through a buffer that io.Copy need not make.
func (w *BlobWriter) ReadFrom(r io.Reader) (total int64, err error) {
	buf := getBuffer()
	defer buffers.Put(buf)
	for {
		n, rerr := r.Read(buf[:])
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if rerr == io.EOF {
			return total, nil
		}
		if rerr != nil {
			return total, rerr
		}
	}
}

// Size is how many bytes were written so far.
func (w *BlobWriter) Size() int64 { return w.size + int64(w.n) }

// Commit makes the ingest the blob named by the digest of its bytes. Non-zero
// size and non-empty expected are checked; a mismatch is an error that names
// both values, and nothing is stored. Data is made durable by the store's next
// group commit, not here. After an error only Close is left to do.
//
// A blob that exists already is replaced, which does no harm to its readers and
// heals it if the disk damaged it.
func (w *BlobWriter) Commit(size int64, expected digest.Digest) (BlobInfo, error) {
	if w.file == nil {
		return BlobInfo{}, fmt.Errorf("commit an ingest: %w", errIngestClosed)
	}
	w.flush()
	if w.err != nil {
		return BlobInfo{}, fmt.Errorf("commit an ingest: %w", w.err)
	}
	if size > 0 && size != w.size {
		return BlobInfo{}, fmt.Errorf("commit an ingest: it has %d bytes, expected are %d: %w", w.size, size, errdefs.ErrFailedPrecondition)
	}
	dgst, err := w.digest(expected)
	if err != nil {
		return BlobInfo{}, fmt.Errorf("commit an ingest: %w", err)
	}
	if expected != "" && expected != dgst {
		return BlobInfo{}, fmt.Errorf("commit an ingest: its digest is %s, expected is %s: %w", dgst, expected, errdefs.ErrFailedPrecondition)
	}
	if err := w.blobs.adopt(w.file.Name(), dgst, w.doubts); err != nil {
		return BlobInfo{}, fmt.Errorf("commit an ingest: %w", err)
	}
	st, err := w.file.Stat()
	err = errors.Join(err, w.file.Close()) // nothing can be lost: a full disk was seen by write
	w.release()
	if err != nil {
		return BlobInfo{}, fmt.Errorf("commit an ingest: %w", err)
	}
	return blobInfo(dgst, st), nil
}

// digest is that of the bytes, by the algorithm that is expected.
func (w *BlobWriter) digest(expected digest.Digest) (digest.Digest, error) {
	if expected == "" || expected.Algorithm() == digest.Canonical {
		return digest.NewDigest(digest.Canonical, w.hash), nil
	}
	if err := expected.Validate(); err != nil {
		return "", fmt.Errorf("digest %q: %w: %w", expected, errdefs.ErrInvalidArgument, err)
	}
	return expected.Algorithm().FromReader(io.NewSectionReader(w.file, 0, w.size))
}

// adopt makes the file, begun after so many doubts, the blob.
func (b *Blobs) adopt(file string, dgst digest.Digest, doubts int) error {
	path := b.path(dgst)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.doubts.since(doubts); err != nil {
		return err
	}
	err := os.Rename(file, path)
	if errors.Is(err, os.ErrNotExist) { // the first of its algorithm
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			err = os.Rename(file, path)
		}
	}
	if err == nil {
		delete(b.removing, dgst)
		b.writtenLocked(dgst)
	}
	return err
}

// Close releases the ingest.
func (w *BlobWriter) Close() error {
	if w.file == nil {
		return nil
	}
	err := errors.Join(w.file.Close(), os.Remove(w.file.Name()))
	w.release()
	if err != nil {
		return fmt.Errorf("discard an ingest: %w", err)
	}
	return nil
}

func (w *BlobWriter) release() {
	w.file = nil
	if w.buf != nil {
		buffers.Put(w.buf)
		w.buf, w.n = nil, 0
	}
}

// truncate goes back to the first size bytes.
func (w *BlobWriter) truncate(size int64) error {
	if w.file == nil {
		return errIngestClosed
	}
	w.flush()
	if size < 0 || size > w.size {
		return fmt.Errorf("truncate an ingest of %d bytes to %d: %w", w.size, size, errdefs.ErrInvalidArgument)
	}
	w.hash.Reset()
	w.err = nil
	if err := w.file.Truncate(size); err != nil {
		return fmt.Errorf("truncate an ingest: %w", err)
	}
	if _, err := w.file.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("truncate an ingest: %w", err)
	}
	if _, err := io.CopyN(w.hash, w.file, size); err != nil {
		return fmt.Errorf("truncate an ingest: %w", err)
	}
	w.size = size
	return nil
}

// Writer starts an ingest for containerd's callers. Every call starts a new one,
// whatever its ref: writers of the same blob don't wait for each other, and
// what a broken one has written is not gone on with.
func (b *Blobs) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.Desc.Digest != "" {
		if _, err := b.Stat(o.Desc.Digest); err == nil {
			return nil, fmt.Errorf("blob %s: %w", o.Desc.Digest, errdefs.ErrAlreadyExists)
		} else if !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	w, err := b.Create()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &contentWriter{BlobWriter: w, status: content.Status{
		Ref: o.Ref, Total: o.Desc.Size, Expected: o.Desc.Digest, StartedAt: now, UpdatedAt: now,
	}}, nil
}

// contentWriter is a BlobWriter as containerd wants it.
type contentWriter struct {
	*BlobWriter
	status content.Status
	dgst   digest.Digest
}

var _ content.Writer = (*contentWriter)(nil)

func (w *contentWriter) Write(p []byte) (int, error) {
	w.status.UpdatedAt = time.Now()
	return w.BlobWriter.Write(p)
}

// Digest is that of what was written so far.
func (w *contentWriter) Digest() digest.Digest {
	if w.dgst != "" || w.file == nil {
		return w.dgst
	}
	w.flush()
	return digest.NewDigest(digest.Canonical, w.hash)
}

// Commit closes the writer also when it fails.
func (w *contentWriter) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	if expected == "" {
		expected = w.status.Expected
	}
	if size == 0 {
		size = w.status.Total
	}
	info, err := w.BlobWriter.Commit(size, expected)
	if err != nil {
		return errors.Join(err, w.Close())
	}
	w.dgst = info.Digest
	return nil
}

func (w *contentWriter) Status() (content.Status, error) {
	s := w.status
	s.Offset = w.Size()
	return s, nil
}

func (w *contentWriter) Truncate(size int64) error { return w.truncate(size) }
