package cache

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
)

// After the database was lost, what was built is there again, and what may have
// been written to since its journal was, isn't trusted.
func TestRebuiltDatabase(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	step := e.layer(nil, Options{Description: "step"}, "f=1")
	step.SetMetadata("hash", []byte("1"))
	e.persist(step)
	local := e.layer(nil, Options{Description: "local", Retain: true, Index: map[string]string{"local": "x"}}, "f=2")
	above := e.layer(local, Options{Description: "above"}, "g=3")
	e.persist(above)
	mount := get(e.m.New(ctx, nil, Options{Description: "mount", Retain: true, Index: map[string]string{"mount": "x"}}))(t)
	e.write(mount, "cached=4")
	mount.SetMetadata("size", []byte("4"))
	stepID, mountID := step.ID(), mount.ID()
	for _, r := range []*Ref{step, local, above} {
		r.Release()
	}
	must(t, mount.Release(ctx))
	e.close()
	must(t, os.Remove(filepath.Join(e.root, "kiln.db")))

	var told []string
	e.warn = func(msg string, args ...any) { told = append(told, msg) }
	e.open()
	if len(told) != 1 || !strings.Contains(told[0], "rebuilt from its journal") {
		t.Errorf("the store told %q", told)
	}
	e.check()
	again := get(e.m.Get(ctx, stepID))(t)
	defer again.Release()
	e.wantFiles(again, "f=1")
	if v, ok := again.Metadata("hash"); !ok || string(v) != "1" {
		t.Errorf("metadata of a step: %q, %t", v, ok)
	}
	if found := e.m.Search("local", "x"); len(found) > 0 {
		t.Errorf("a record that may have been written to is still there: %q", found)
	}
	if !strings.Contains(e.logged(), "may have been written to") {
		t.Errorf("nothing tells why: %s", e.logged())
	}
	if found := e.m.Search("mount", "x"); !slices.Equal(found, []string{mountID}) {
		t.Fatalf("cache mounts: %q", found)
	}
	u := get(e.m.GetMutable(ctx, mountID))(t)
	if v, ok := u.Metadata("size"); ok {
		t.Errorf("metadata of a cache mount: %q", v)
	}
	view := get(u.Open(ctx))(t)
	if got := listFiles(t, view.Path()); !slices.Equal(got, []string{"cached=4"}) {
		t.Errorf("the cache mount holds %q", got)
	}
	must(t, view.Close())
	must(t, u.Release(ctx))

	// Once that is settled, records are trusted again.
	b := &store.Batch{}
	b.Proven()
	e.db.Write(b)
	e.layer(nil, Options{Retain: true, Index: map[string]string{"local": "y"}}).Release()
	again.Release()
	again = nil
	e.restart()
	if found := e.m.Search("local", "y"); len(found) != 1 {
		t.Errorf("found %q", found)
	}
}

// What Open drops is told to those who point at it.
func TestDroppedRecordsAreForgotten(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "f=1")
	e.persist(r)
	id, snap := r.ID(), r.r.snap
	r.Release()
	e.close()
	must(t, os.RemoveAll(filepath.Join(e.root, "snapshots", snap)))
	e.open()
	var told []string
	e.m.OnRemove(func(_ *store.Batch, ids []string) map[string][]string {
		told = append(told, ids...)
		return nil
	})
	if !slices.Equal(told, []string{id}) {
		t.Errorf("told of %q, want %q", told, id)
	}
}

// Names of snapshots are never used twice, not even by another run.
func TestSnapshotNamesAreNotUsedAgain(t *testing.T) {
	e := newEnv(t)
	seen := map[string]bool{}
	for range 5 {
		for range 3 {
			r := e.layer(nil, Options{})
			if snap := r.r.snap; seen[snap] {
				t.Errorf("%s is used again", snap)
			} else {
				seen[snap] = true
			}
			r.Release()
		}
		e.restart()
	}
}
