package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"
)

// Check compares records and files and returns what is wrong: snapshots without
// files, files without a snapshot, parents and layers that are missing or not
// committed, counts of children that are off. If deep, every layer is read. It
// sees the state in memory; at rest that is the store's. Before the Sweep of a
// read-only store, files without a snapshot are what an interrupted run left, and
// nothing wrong.
func (o *Overlay) Check(ctx context.Context, deep bool) []error {
	o.mu.Lock()
	snaps := make(map[string]snap, len(o.snaps))
	for id, s := range o.snaps {
		if !s.busy {
			snaps[id] = *s
		}
	}
	errs := slices.Collect(maps.Values(o.unreadable))
	o.mu.Unlock()

	errs = append(errs, checkTree(snaps)...)
	for id, s := range snaps {
		if st, err := os.Lstat(o.groundPath(id)); s.Ground && (err != nil || !st.IsDir()) {
			errs = append(errs, fmt.Errorf("snapshot %s has no directory for all of its layers at %s: %w", id, o.groundPath(id), err))
		}
		if len(s.Layers) > 0 {
			continue
		}
		if st, err := os.Lstat(o.fsPath(id)); err != nil {
			errs = append(errs, fmt.Errorf("snapshot %s has no files: %w", id, err))
		} else if !st.IsDir() {
			errs = append(errs, fmt.Errorf("snapshot %s: %s is no directory", id, o.fsPath(id)))
		} else if st, err := os.Lstat(o.portablePath(id)); s.Form == formCopy && (err != nil || !st.IsDir()) {
			errs = append(errs, fmt.Errorf("snapshot %s has no copy for other parents at %s: %w", id, o.portablePath(id), err))
		} else if deep {
			if _, err := o.Usage(ctx, id); err != nil {
				errs = append(errs, err)
			}
		}
	}
	if o.db.ReadOnly() {
		return errs
	}
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return append(errs, fmt.Errorf("check snapshots: %w", err))
	}
	for _, e := range entries {
		if s, ok := snaps[e.Name()]; (!ok || len(s.Layers) > 0) && o.path(e.Name()) != o.emptyPath() && !o.exists(e.Name()) {
			errs = append(errs, fmt.Errorf("%s belongs to no snapshot", o.path(e.Name())))
		}
	}
	return errs
}

// exists asks again: a snapshot may have been made since, or is being deleted.
func (o *Overlay) exists(id string) bool {
	if o.trash.has(o.path(id)) {
		return true
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if on, ok := groundOf(id); ok {
		s := o.snaps[on]
		return s != nil && s.Ground || o.copying[id] != nil
	}
	layer, copied := copyOf(id)
	s := o.snaps[layer]
	if copied {
		return s != nil && (s.Form == formCopy || o.copying[layer] != nil)
	}
	return s != nil && len(s.Layers) == 0
}

// checkTree looks at how snapshots stand on each other.
func checkTree(snaps map[string]snap) []error {
	var errs []error
	children := map[string]int{}
	for id, s := range snaps {
		for _, b := range s.below() {
			children[b]++
			if p, ok := snaps[b]; !ok {
				errs = append(errs, fmt.Errorf("snapshot %s stands on %s, which is missing", id, b))
			} else if !p.Committed {
				errs = append(errs, fmt.Errorf("snapshot %s stands on %s, which is not committed", id, b))
			}
		}
	}
	for id, s := range snaps {
		if s.children != children[id] {
			errs = append(errs, fmt.Errorf("snapshot %s counts %d children and has %d", id, s.children, children[id]))
		}
	}
	return errs
}

// Check compares records and files and returns what is wrong: records without a
// file or with another size, and files that are no blobs or have no record. If
// deep, the digest of every blob is computed. It is for a store at rest. Files
// without a record are nothing wrong in a read-only store, which isn't swept.
func (b *Blobs) Check(ctx context.Context, deep bool) []error {
	var errs []error
	recorded := map[digest.Digest]bool{}
	b.db.Scan(blobBucket, "", func(key string, value []byte) bool {
		dgst := digest.Digest(key)
		recorded[dgst] = true
		size, err := strconv.ParseInt(string(value), 10, 64)
		if err != nil {
			errs = append(errs, fmt.Errorf("the record of blob %s is %q, not a size", dgst, value))
			return true
		}
		info, err := b.Stat(dgst)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("record without a file: %w", err))
		case info.Size != size:
			errs = append(errs, fmt.Errorf("blob %s has %d bytes, and %d in its record", dgst, info.Size, size))
		}
		return true
	})
	err := b.files(func(dgst digest.Digest, path string) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		switch {
		case b.db.ReadOnly():
		case dgst == "":
			errs = append(errs, fmt.Errorf("%s is not named as a blob", path))
		case !recorded[dgst]:
			errs = append(errs, fmt.Errorf("blob %s has no record", dgst))
		}
		if recorded[dgst] && deep {
			if err := verify(ctx, dgst, path); err != nil {
				errs = append(errs, err)
			}
		}
		return nil
	})
	if err != nil {
		errs = append(errs, err)
	}
	return errs
}

// verify computes the digest of a file.
func verify(ctx context.Context, dgst digest.Digest, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("blob %s: %w", dgst, err)
	}
	got, err := dgst.Algorithm().FromReader(&contextReader{ctx, f})
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("blob %s: %w", dgst, err)
	}
	if got != dgst {
		return fmt.Errorf("blob %s has content with the digest %s", dgst, got)
	}
	return nil
}
