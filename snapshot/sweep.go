package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
)

// Sweep removes files that belong to no snapshot, and forgets snapshots that
// can't be used any more: whose files are gone, whose record can't be read, or
// that stand on such. It runs at start, before anything else uses the
// snapshotter, and returns how many files it removed; in a read-only store they
// are only counted. The files of earlier removals that a crash interrupted go
// too, uncounted.
func (o *Overlay) Sweep(ctx context.Context) (int, error) {
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return 0, fmt.Errorf("sweep snapshots: %w", err)
	}
	there := make(map[string]bool, len(entries))
	for _, e := range entries {
		there[e.Name()] = true
	}
	o.forgetUnsound(there)
	n := 0
	for _, e := range entries {
		if err := context.Cause(ctx); err != nil {
			return n, err
		}
		if o.exists(e.Name()) || o.path(e.Name()) == o.emptyPath() {
			continue
		}
		removed := strings.HasPrefix(e.Name(), trashPrefix)
		if !removed {
			n++
		}
		switch {
		case o.db.ReadOnly():
		case removed:
			o.trash.delete(o.path(e.Name()))
		default:
			o.trash.discard(o.path(e.Name()))
		}
	}
	return n, nil
}

// ForgetLost is what Sweep does about snapshots that can't be used, but looks into
// the directory of each, which Sweep doesn't take the time for.
func (o *Overlay) ForgetLost() {
	o.mu.Lock()
	ids := slices.Collect(maps.Keys(o.snaps))
	o.mu.Unlock()
	there := make(map[string]bool, len(ids))
	for _, id := range ids {
		st, err := os.Lstat(o.fsPath(id))
		there[id] = err == nil && st.IsDir()
		st, err = os.Lstat(o.portablePath(id))
		there[portablePrefix+id] = err == nil && st.IsDir()
		st, err = os.Lstat(o.groundPath(id))
		there[groundPrefix+id] = err == nil && st.IsDir()
	}
	o.forgetUnsound(there)
}

// forgetUnsound removes the records of snapshots that can't be used; there are
// those that have files.
func (o *Overlay) forgetUnsound(there map[string]bool) {
	b := &store.Batch{}
	o.mu.Lock()
	for id := range o.unreadable {
		b.Delete(recordBucket, id)
	}
	clear(o.unreadable)
	known := map[string]bool{}
	o.forgetCopiesLocked(b, there, known)
	var unsound []*snap
	for id, s := range o.snaps {
		if !o.soundLocked(id, there, known) {
			unsound = append(unsound, s)
		}
	}
	for _, s := range unsound {
		o.dropLocked(s)
		b.Delete(recordBucket, s.id)
	}
	o.mu.Unlock()
	o.db.Write(b)
}

// forgetCopiesLocked forgets portable copies that aren't there, and notes in
// sound that the stacks which may show them can't be used.
func (o *Overlay) forgetCopiesLocked(b *store.Batch, there, sound map[string]bool) {
	for id, s := range o.snaps {
		if !s.stored || s.Form != formCopy || there[portablePrefix+id] {
			continue
		}
		s.Form = formUnknown
		b.Put(recordBucket, id, s.encode())
		for _, stack := range o.snaps {
			if slices.Contains(stack.Layers, id) {
				sound[stack.id] = false
			}
		}
	}
}

// soundLocked says whether the files of id, and those of all that it stands on,
// are there. known holds answers.
func (o *Overlay) soundLocked(id string, there, known map[string]bool) bool {
	if sound, ok := known[id]; ok {
		return sound
	}
	known[id] = false // so that snapshots that stand on themselves end here
	s := o.snaps[id]
	if s == nil || len(s.Layers) == 0 && !there[id] || s.Ground && !there[groundPrefix+id] {
		return false
	}
	for _, below := range s.below() {
		if !o.soundLocked(below, there, known) || !o.snaps[below].Committed {
			return false
		}
	}
	known[id] = true
	return true
}

// below are the snapshots that s stands on.
func (s *snap) below() []string {
	if s.Parent == "" {
		return s.Layers
	}
	return append([]string{s.Parent}, s.Layers...)
}

// Sweep removes ingests, files without a record, and records whose files are
// gone or of another size. It runs at start, before anything else uses the
// store, and returns how many files it removed; in a read-only store they are
// only counted.
func (b *Blobs) Sweep(ctx context.Context) (int, error) {
	ingests, err := os.ReadDir(b.ingests)
	if err != nil {
		return 0, fmt.Errorf("sweep ingests: %w", err)
	}
	n := 0
	remove := func(path string) error {
		n++
		if b.db.ReadOnly() {
			return nil
		}
		return os.RemoveAll(path)
	}
	for _, e := range ingests {
		if err := remove(filepath.Join(b.ingests, e.Name())); err != nil {
			return n, fmt.Errorf("sweep ingests: %w", err)
		}
	}
	recorded := map[digest.Digest]string{}
	b.db.Scan(blobBucket, "", func(key string, value []byte) bool {
		recorded[digest.Digest(key)] = string(value)
		return true
	})
	err = b.files(func(dgst digest.Digest, path string) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if size, ok := recorded[dgst]; ok {
			st, err := os.Lstat(path)
			if err != nil {
				return fmt.Errorf("sweep blobs: %w", err)
			}
			if size == strconv.FormatInt(st.Size(), 10) {
				delete(recorded, dgst)
				return nil
			}
		}
		if b.db.ReadOnly() && dgst != "" {
			b.mu.Lock()
			b.removing[dgst] = true // for readers it is gone
			b.mu.Unlock()
		}
		if err := remove(path); err != nil {
			return fmt.Errorf("sweep blobs: %w", err)
		}
		return nil
	})
	if err != nil {
		return n, err
	}
	batch := &store.Batch{}
	for dgst := range recorded { // what no sound file was found for
		batch.Delete(blobBucket, dgst.String())
	}
	b.db.Write(batch)
	return n, nil
}

// Damaged returns the blobs whose content isn't what their digest says. It reads
// all of them.
func (b *Blobs) Damaged(ctx context.Context) ([]digest.Digest, error) {
	var out []digest.Digest
	err := b.files(func(dgst digest.Digest, path string) error {
		if dgst == "" {
			return nil
		}
		err := verify(ctx, dgst, path)
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			out = append(out, dgst)
		}
		return nil
	})
	return out, err
}
