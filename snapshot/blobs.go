package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobBucket holds a record, the size, for every blob that was persisted.
const blobBucket = "blob"

// Blobs stores bytes by their digest, as blobs/<algorithm>/<hex> under its
// root. What is being written is an ingest, invisible until committed. All
// methods are safe for concurrent use.
//
// The files are the truth about what is there; records only say what survives a
// restart.
//
// It serves containerd's content interfaces (Provider, Ingester, InfoProvider),
// so that resolvers, pushers and archive readers work on it as they are.
type Blobs struct {
	blobs, ingests string
	db             *store.DB
	next           atomic.Int64 // makes ingests' names
	trash          *trash       // in ingests, where a sweep takes all

	// mu guards removing. It is held across the renames that make a blob appear
	// and go, so that one that is removed and stored again at that time stays.
	mu       sync.Mutex
	removing map[digest.Digest]bool // record deleted, file not yet
	// written is when blobs were stored that may not be on the disk yet, and prune
	// at how many of them those that are there are looked for.
	written map[digest.Digest]time.Time
	prune   int
	doubts  doubts
}

var (
	_ content.Provider     = (*Blobs)(nil)
	_ content.Ingester     = (*Blobs)(nil)
	_ content.InfoProvider = (*Blobs)(nil)
)

// BlobInfo describes a stored blob.
type BlobInfo struct {
	Digest digest.Digest
	Size   int64
	Disk   int64 // bytes of allocated blocks
	// Version changes when anybody writes to the file or replaces it; see there.
	Version FileVersion
}

// FileVersion is which file it is, and how it was last changed. That of no file
// is zero.
//
// Kernels before 6.13 stamp files with the time of the last tick of a clock, so
// that a write in place within the same few milliseconds doesn't show. Not to
// trust a version that young would be right, as git does with its index, but has
// every blob read once more that is made and sent at once, which is what most
// builds do, against a writer that nobody has met.
type FileVersion struct {
	ino            uint64
	size           int64
	changed, nanos int64
}

func blobInfo(dgst digest.Digest, st os.FileInfo) BlobInfo {
	info := BlobInfo{Digest: dgst, Size: st.Size(), Disk: st.Size()}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		info.Disk = sys.Blocks * 512
		info.Version = FileVersion{sys.Ino, sys.Size, int64(sys.Ctim.Sec), int64(sys.Ctim.Nsec)}
	}
	return info
}

// NewBlobs opens the blob store under root.
func NewBlobs(root string, db *store.DB) (*Blobs, error) {
	b := &Blobs{blobs: filepath.Join(root, "blobs"), ingests: filepath.Join(root, "ingest"), db: db, removing: map[digest.Digest]bool{}, written: map[digest.Digest]time.Time{}}
	b.next.Store(time.Now().UnixNano()) // no name of an earlier life
	for _, dir := range []string{b.path(digest.Canonical.FromString("")), filepath.Join(b.ingests, "x")} {
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return nil, fmt.Errorf("open the blob store: %w", err)
		}
	}
	b.trash = newTrash(b.ingests)
	return b, nil
}

// Close waits for files to be deleted.
func (b *Blobs) Close() error { return b.trash.Close() }

// Settle waits until the files of removed blobs are gone. Those whose removal
// isn't durable yet aren't waited for.
func (b *Blobs) Settle(ctx context.Context) error { return b.trash.settle(ctx) }

// path is where the blob is. The digest must be valid.
func (b *Blobs) path(dgst digest.Digest) string {
	return filepath.Join(b.blobs, dgst.Algorithm().String(), dgst.Encoded())
}

// file checks the digest, which may come from anywhere, and returns its path.
func (b *Blobs) file(dgst digest.Digest) (string, error) {
	if err := dgst.Validate(); err != nil {
		return "", fmt.Errorf("blob %q: %w: %w", dgst, errdefs.ErrInvalidArgument, err)
	}
	return b.path(dgst), nil
}

// Stat returns ErrNotFound when the blob isn't there.
func (b *Blobs) Stat(dgst digest.Digest) (BlobInfo, error) {
	st, err := b.stat(dgst)
	if err != nil {
		return BlobInfo{}, err
	}
	return blobInfo(dgst, st), nil
}

func (b *Blobs) stat(dgst digest.Digest) (os.FileInfo, error) {
	path, err := b.file(dgst)
	if err != nil {
		return nil, err
	}
	if b.isRemoved(dgst) {
		return nil, fmt.Errorf("blob %s: %w", dgst, ErrNotFound)
	}
	st, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", dgst, gone(err))
	}
	return st, nil
}

func (b *Blobs) isRemoved(dgst digest.Digest) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.removing[dgst]
}

// Persist adds the blob's record to batch. A blob that was never persisted is
// swept after a restart.
func (b *Blobs) Persist(batch *store.Batch, dgst digest.Digest) error {
	info, err := b.Stat(dgst)
	if err != nil {
		return err
	}
	batch.Put(blobBucket, dgst.String(), strconv.AppendInt(nil, info.Size, 10))
	return nil
}

// Remove adds the deletion of the blob's record to batch; the file goes after
// the batch is durable. A missing blob is fine.
//
// From now on the blob isn't there any more. Stored again before the file is
// gone, it is.
func (b *Blobs) Remove(batch *store.Batch, dgst digest.Digest) error {
	path, err := b.file(dgst)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.removing[dgst] = true
	batch.Delete(blobBucket, dgst.String())
	batch.OnDurable(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.removing[dgst] {
			delete(b.removing, dgst)
			// What can't be moved has no record, and goes at the next sweep.
			b.trash.discard(path)
		}
	})
	return nil
}

// Walk calls fn for every blob.
func (b *Blobs) Walk(fn func(BlobInfo) error) error {
	return b.files(func(dgst digest.Digest, path string) error {
		if dgst == "" {
			return nil
		}
		info, err := b.Stat(dgst)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(info)
	})
}

// files calls fn for every file in blobs/, in order. The digest is empty if the
// name isn't one.
func (b *Blobs) files(fn func(dgst digest.Digest, path string) error) error {
	algorithms, err := os.ReadDir(b.blobs)
	if err != nil {
		return fmt.Errorf("walk blobs: %w", err)
	}
	for _, a := range algorithms {
		names, err := os.ReadDir(filepath.Join(b.blobs, a.Name()))
		if err != nil {
			return fmt.Errorf("walk blobs: %w", err)
		}
		for _, n := range names {
			dgst := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), n.Name())
			if dgst.Validate() != nil {
				dgst = ""
			}
			if err := fn(dgst, filepath.Join(b.blobs, a.Name(), n.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Info, ReaderAt and Writer make Blobs a content.InfoProvider, Provider and
// Ingester.
func (b *Blobs) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	st, err := b.stat(dgst)
	if err != nil {
		return content.Info{}, err
	}
	return content.Info{Digest: dgst, Size: st.Size(), CreatedAt: st.ModTime(), UpdatedAt: st.ModTime()}, nil
}

// ReaderAt opens a blob for reading. It stays readable if the blob is removed
// meanwhile.
func (b *Blobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	path, err := b.file(desc.Digest)
	if err != nil {
		return nil, err
	}
	if b.isRemoved(desc.Digest) {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, ErrNotFound)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, gone(err))
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("blob %s: %w", desc.Digest, err), f.Close())
	}
	return &blobReader{File: f, size: st.Size()}, nil
}

// blobReader is an open blob. It can also be read in sequence, which costs
// readers that know no buffers.
type blobReader struct {
	*os.File
	size int64
}

func (r *blobReader) Size() int64 { return r.size }
