// Package cachetest opens caches for tests of what stands on them.
package cachetest

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// Cache is a cache with what it keeps things in.
type Cache struct {
	*cache.Manager
	Store *store.DB
	Blobs *snapshot.Blobs
	// Shut closes all of it, and fails the test if that fails or if a record is still
	// in use. The end of the test does so as well.
	Shut func()
}

// Open opens the cache in root, over overlay snapshots, which takes root.
func Open(t testing.TB, root string) *Cache {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts snapshots: run it as root")
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	db, err := store.Open(store.Options{Root: root})
	must(err)
	snapshots, err := snapshot.NewOverlay(root, db)
	must(err)
	blobs, err := snapshot.NewBlobs(root, db)
	must(err)
	m, err := cache.Open(t.Context(), cache.Config{Store: db, Snapshots: snapshots, Blobs: blobs, Root: root, Log: slog.New(slog.DiscardHandler)})
	must(err)
	c := &Cache{Manager: m, Store: db, Blobs: blobs}
	c.Shut = sync.OnceFunc(func() {
		t.Helper()
		// The store's last commit has files deleted.
		if err := errors.Join(m.Close(), db.Close(), snapshots.(io.Closer).Close(), blobs.Close()); err != nil {
			t.Errorf("close the cache: %v", err)
		}
	})
	t.Cleanup(c.Shut)
	return c
}
