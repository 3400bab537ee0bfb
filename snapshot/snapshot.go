// Package snapshot holds filesystem states and blobs.
//
// A snapshot is a layer directory on top of a parent snapshot. It is active
// while its one owner writes it and committed afterwards; a committed snapshot
// never changes and may be the parent of others. Mounts are containerd
// mount.Mount values: data that says how to make a snapshot visible. Open
// makes them visible without attaching them anywhere, so that nothing stays
// mounted when the process dies.
package snapshot

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/store"
)

var (
	// ErrExists: the id is taken.
	ErrExists = errors.New("snapshot exists")
	// ErrNotFound: there is no such snapshot or blob, or its files are gone.
	ErrNotFound error = notFound{}
	// ErrNotActive: the call needs an active snapshot.
	ErrNotActive = errors.New("snapshot is not active")
	// ErrInUse: the snapshot is the parent of another.
	ErrInUse = errors.New("snapshot has children")
)

// notFound satisfies errdefs.IsNotFound, as containerd's callers expect.
type notFound struct{}

func (notFound) Error() string { return "not found" }
func (notFound) NotFound()     {}

// Info describes a snapshot.
type Info struct {
	ID        string
	Parent    string // "" for none
	Committed bool
}

// Usage is what a snapshot itself (without its parents) takes on disk, with the
// directories that hold it.
type Usage struct {
	// Size is bytes, in allocated blocks. A file with several names counts once,
	// and with its share if some of the names are in other snapshots.
	Size   int64
	Inodes int64
	Linked bool // other snapshots share files, so that Size changes as they go
}

// Snapshotter stores layered filesystem states. All methods are safe for
// concurrent use; two calls that change the same id are the caller's race.
type Snapshotter interface {
	// Name is the snapshotter's name in worker labels, such as "overlayfs".
	Name() string

	// Prepare starts the active snapshot id on top of parent ("" for an empty
	// one), which must be committed.
	Prepare(ctx context.Context, id, parent string) error

	// Commit makes the active snapshot id immutable. Nothing is copied.
	Commit(ctx context.Context, id string) error

	// Reopen makes the committed snapshot id active again. It must have no
	// children.
	Reopen(ctx context.Context, id string) error

	// Stack makes the committed snapshot id out of existing committed
	// snapshots, lowest first, without copying where layers can express the
	// result. Of each snapshot its own layer counts, without its parents; of a
	// stack, its layers. So a merge lists the layers of all its inputs, and the
	// difference between a snapshot and an ancestor those in between.
	//
	// grown are the layers that take more space now, whether it fails or not.
	Stack(ctx context.Context, id string, layers []string) (grown []string, err error)

	// Ground sees to it that another snapshot can stand on the committed snapshot
	// id, however many layers that has. Without it, Prepare may refuse to.
	//
	// grown are the snapshots that share more files now.
	Ground(ctx context.Context, id string) (grown []string, err error)

	// Mounts says how to make id visible. An active snapshot is writable
	// unless readonly is set; a committed one is always read-only.
	Mounts(ctx context.Context, id string, readonly bool) ([]mount.Mount, error)

	// Place returns where the active snapshot id, which nobody has mounted, can get
	// something new at path, with directories above it that are missing; what is
	// elsewhere isn't to be looked at. A snapshot on nothing has one Place for
	// everything. It is nil if it takes a mount.
	Place(ctx context.Context, id, path string) (*Place, error)

	// Stat describes id.
	Stat(ctx context.Context, id string) (Info, error)

	// Usage measures id by walking its files.
	Usage(ctx context.Context, id string) (Usage, error)

	// Persist adds the records of id, and of parents that have none yet, to b.
	// A snapshot that was never persisted is swept after a restart.
	Persist(b *store.Batch, id string) error

	// Remove adds the deletion of id's record to b; the files go in the background
	// once b is durable, and the id isn't used again. A parent of others is
	// ErrInUse, a missing id is fine.
	Remove(b *store.Batch, id string) error

	// Walk calls fn for every snapshot, parents before children.
	Walk(fn func(Info) error) error

	// Sweep removes files that belong to no snapshot. It runs at start, before
	// anything else uses the snapshotter, and returns how many it removed.
	Sweep(ctx context.Context) (int, error)
}
