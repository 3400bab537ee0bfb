// Package cache keeps records of filesystem states and hands out counted
// handles on them.
//
// A record may have a snapshot, a blob, or both: a pulled layer is a blob (or
// only a promise of one) until something mounts it, an executed layer is a
// snapshot until something exports it. Ref is a handle on an immutable record,
// Mutable the one handle on a writable one; Commit turns the latter into the
// former without copying.
//
// Liveness: a record lives while a handle, a child record, a key's result or a
// user's mark points at it; everything else is prunable by policy (live.go). A
// record that was persisted counts as one that a key's result points at; one
// that never was goes with its last handle or child. A blob lives while a
// record, an image or a hold points at it.
//
// A record is either a layer, one change on top of at most one parent, or a
// stack, which has no change of its own and is made of the layers of others.
// A layer whose blob was never needed as files is lazy: it has no snapshot.
//
//	          Commit                    last handle, never persisted; prune
//	mutable ----------> immutable  -----------------------------------------> gone
//	   ^  GetMutable, new id |
//	   +---------------------+
//
// Locks, in the order in which they are taken:
//
//	surveying is held while a survey finds out which entry is whose
//	writes    orders the batches that change persisted records
//	blobsMu   shared while a blob is stored and attached to a record, or looked
//	          for, exclusive while blobs that nothing points at are removed
//	mu        guards all records and indexes; never held across I/O
//
// A flight's own lock is never held together with any of these.
package cache

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	// ErrNotFound: there is no such record.
	ErrNotFound = errors.New("cache record not found")
	// ErrLocked: the mutable record is in use by someone else.
	ErrLocked = errors.New("cache record is in use")
	// ErrLost: the record is known but what it stands for is missing, corrupt
	// or unreachable. The caller produces it anew; it is never a build error.
	ErrLost = errors.New("cache record is lost")
)

// RecordType says what a record is for (CTL-101).
type RecordType string

// Record types, as clients show and filter them.
const (
	TypeRegular    RecordType = "regular"
	TypeInternal   RecordType = "internal"
	TypeFrontend   RecordType = "frontend"
	TypeLocal      RecordType = "source.local"
	TypeGit        RecordType = "source.git.checkout"
	TypeCacheMount RecordType = "exec.cachemount"
)

// Config is what a Manager works on.
type Config struct {
	Store     *store.DB
	Snapshots snapshot.Snapshotter
	Blobs     *snapshot.Blobs
	Log       *slog.Logger // nil discards
	// Root is a directory on the file system whose free space MinFreeSpace of
	// PruneOptions is about.
	Root string
	// Rules are those of the garbage collection, for when the disk is full.
	Rules []PruneOptions
	// Grown, if set, is called when the cache has come to hold more. It must not
	// wait for anything.
	Grown func()
	// Adopt are records that an earlier manager has left to processes that still
	// write to them. Whoever gives them takes each from Adopted.
	Adopt []Interrupted
}

// Options describe a new record.
type Options struct {
	Description string
	Type        RecordType // "" is TypeRegular
	CreatedAt   time.Time  // zero is now
	// Index makes the record findable by Search, for example a cache mount by
	// its id or a local source by its shared key.
	Index map[string]string
	// Retain keeps the record when its last handle is released, though no
	// cache key leads to it (cache mounts, local sources).
	Retain bool
}

// BlobSource fetches the bytes of a blob that isn't stored yet. Open may be
// called at any time while a build that gave the source runs. The reader is
// closed, from another goroutine, to interrupt a read when nobody wants the
// bytes any more. A source that also has a method
//
//	Failed(desc ocispec.Descriptor, err error) error
//
// hears of each blob that couldn't be had from it, also of those that stalled or
// weren't what they should be; it returns the error in its own words.
type BlobSource interface {
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// Layer is one layer of an image.
type Layer struct {
	Blob   ocispec.Descriptor // compressed form
	DiffID digest.Digest
}

// Compression says how layers that must be made are compressed.
type Compression struct {
	Type  string // uncompressed, gzip or zstd; "" is gzip
	Level *int   // nil is the type's default
	Force bool   // convert existing blobs of other types too
	OCI   bool   // OCI rather than Docker media types
}
