package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Extra is what a store takes on disk besides what it lists, in bytes of
// allocated blocks.
type Extra struct {
	Dirs    []string // below which all is accounted for
	Fixed   int64    // the store's own directories
	Writing int64    // not committed yet
	Removed int64    // about to be deleted
}

// Extra measures what isn't part of any snapshot.
func (o *Overlay) Extra(ctx context.Context) (Extra, error) {
	removed, err := o.trash.size(ctx)
	if err != nil {
		return Extra{}, err
	}
	fixed := newUsageWalk(ctx)
	err = errors.Join(fixed.own(o.dir), fixed.children(o.dir, func(name string) bool {
		return strings.HasPrefix(name, ".") && !strings.HasPrefix(name, trashPrefix)
	}))
	return Extra{Dirs: []string{o.dir}, Fixed: fixed.Size, Removed: removed}, err
}

// Extra measures what isn't part of any blob.
func (b *Blobs) Extra(ctx context.Context) (Extra, error) {
	removed, err := b.trash.size(ctx)
	if err != nil {
		return Extra{}, err
	}
	algorithms, err := os.ReadDir(b.blobs)
	if err != nil {
		return Extra{}, fmt.Errorf("measure blobs: %w", err)
	}
	fixed, writing := newUsageWalk(ctx), newUsageWalk(ctx)
	err = errors.Join(fixed.own(b.blobs), fixed.own(b.ingests))
	for _, a := range algorithms {
		err = errors.Join(err, fixed.own(filepath.Join(b.blobs, a.Name())))
	}
	err = errors.Join(err, writing.children(b.ingests, func(name string) bool { return !strings.HasPrefix(name, trashPrefix) }))
	return Extra{Dirs: []string{b.blobs, b.ingests}, Fixed: fixed.Size, Writing: writing.Size, Removed: removed}, err
}

// own adds dir itself.
func (u *usageWalk) own(dir string) error {
	var st unix.Stat_t
	if err := files.Lstat(unix.AT_FDCWD, dir, &st); err != nil {
		return fmt.Errorf("measure %s: %w", dir, err)
	}
	u.add(&st)
	return nil
}

// children adds what is in dir, as far as it is wanted.
func (u *usageWalk) children(dir string, want func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("measure %s: %w", dir, err)
	}
	for _, e := range entries {
		if !want(e.Name()) {
			continue
		}
		if err := u.path(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("measure %s: %w", filepath.Join(dir, e.Name()), err)
		}
	}
	u.shareLinks()
	return nil
}

// Elsewhere measures what is below root and in none of the directories.
func Elsewhere(ctx context.Context, root string, except []string) (int64, error) {
	u := newUsageWalk(ctx)
	err := errors.Join(u.own(root), u.children(root, func(name string) bool {
		return !slices.Contains(except, filepath.Join(root, name))
	}))
	return u.Size, err
}
