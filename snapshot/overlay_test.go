package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
)

type kernel struct {
	name           string
	layers, clones bool
}

// kernels are the ways to mount, by the kernels that need them. A kernel can
// stand in for older ones only.
func kernels() (list []kernel) {
	layers, clones := snapshot.Kernel()
	for _, k := range []kernel{{"6.15", true, true}, {"6.7", true, false}, {"5.15", false, false}} {
		if (layers || !k.layers) && (clones || !k.clones) {
			list = append(list, k)
		}
	}
	return list
}

func onKernels(t *testing.T, fn func(t *testing.T)) {
	snapshottest.Root(t)
	for _, k := range kernels() {
		t.Run("as Linux "+k.name, func(t *testing.T) {
			snapshot.WithKernel(t, k.layers, k.clones)
			fn(t)
			if n := snapshot.OpenShares(); n != 0 {
				t.Errorf("%d overlays are still mounted", n)
			}
		})
	}
}

func openOverlay(t testing.TB, root string, db *store.DB) *snapshot.Overlay {
	t.Helper()
	s, err := snapshot.NewOverlay(root, db)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*snapshot.Overlay)
}

func newOverlay(t testing.TB) *snapshot.Overlay {
	t.Helper()
	snapshottest.Root(t)
	root := t.TempDir()
	o := openOverlay(t, root, snapshottest.OpenDB(t, root))
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inSnapshot calls fn with a directory where id is visible.
func inSnapshot(t testing.TB, s snapshot.Snapshotter, id string, fn func(dir string)) {
	t.Helper()
	mounts, err := s.Mounts(t.Context(), id, false)
	must(t, err)
	v, err := snapshot.Open(mounts)
	must(t, err)
	defer func() { must(t, v.Close()) }()
	fn(v.Path())
}

// makeLayer makes the committed snapshot id on parent with what fn does in it.
func makeLayer(t testing.TB, s snapshot.Snapshotter, id, parent string, fn func(dir string)) {
	t.Helper()
	prepareOn(t, s, id, parent)
	inSnapshot(t, s, id, fn)
	must(t, s.Commit(t.Context(), id))
}

func stack(t testing.TB, s snapshot.Snapshotter, id string, layers ...string) (grown []string) {
	t.Helper()
	grown, err := s.Stack(t.Context(), id, layers)
	must(t, err)
	return grown
}

func writeFile(t testing.TB, path, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(content), 0o644))
}

func TestOverlay(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		snapshottest.Run(t, func(t *testing.T, root string, db *store.DB) snapshot.Snapshotter {
			return openOverlay(t, root, db)
		})
	})
}

func TestOverlayRefusesPathsThatItCannotMount(t *testing.T) {
	snapshottest.Root(t)
	for _, name := range []string{"a:b", "a,b", `a\b`} {
		root := filepath.Join(t.TempDir(), name)
		must(t, os.Mkdir(root, 0o755))
		if _, err := snapshot.NewOverlay(root, nil); err == nil || !strings.Contains(err.Error(), "colon, comma") {
			t.Errorf("root %s: %v", root, err)
		}
	}
}

// Paths longer than the 255 bytes that fsconfig takes.
func TestOverlayDeepRoot(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		root := filepath.Join(t.TempDir(), strings.Repeat("x", 200), strings.Repeat("y", 200))
		must(t, os.MkdirAll(root, 0o755))
		o := openOverlay(t, root, snapshottest.OpenDB(t, root))
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		makeLayer(t, o, "b", "a", func(dir string) { writeFile(t, dir+"/y", "b") })
		inSnapshot(t, o, "b", func(dir string) {
			if got := snapshottest.Listing(t, dir); got != "x=a y=b" {
				t.Errorf("shows %q", got)
			}
		})
		must(t, o.Close())
	})
}

func TestOverlayHundredsOfLayers(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		parent, want := "", []string{}
		for i := range 500 {
			id := fmt.Sprintf("s%03d", i)
			must(t, o.Prepare(t.Context(), id, parent))
			writeFile(t, filepath.Join(layerDir(o, id), id), "")
			must(t, o.Commit(t.Context(), id))
			want = append(want, id+"=")
			parent = id
			if i != 300 && i != 499 {
				continue
			}
			inSnapshot(t, o, id, func(dir string) {
				if got := snapshottest.Listing(t, dir); got != strings.Join(want, " ") {
					t.Errorf("%d layers show %.200q", i+1, got)
				}
			})
		}
		// One more is too many, unless somebody makes room.
		must(t, o.Prepare(t.Context(), "top", parent))
		if _, err := o.Mounts(t.Context(), "top", true); err == nil || !strings.Contains(err.Error(), "501 layers") {
			t.Errorf("501 layers: %v", err)
		}
	})
}

// layerDir is where the files of a snapshot are.
func layerDir(o *snapshot.Overlay, id string) string { return snapshot.LayerDir(o, id) }

func TestOverlayRemovesFilesOnceTheRecordIsGone(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	db := snapshottest.OpenDB(t, root)
	o := openOverlay(t, root, db)
	makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/d/x", "a") })
	b := &store.Batch{}
	must(t, o.Remove(b, "a"))
	if _, err := os.Stat(root + "/snapshots/a/fs/d/x"); err != nil {
		t.Errorf("files went before the record: %v", err)
	}
	db.Write(b)
	must(t, db.Sync(t.Context()))
	must(t, o.Close())
	if got := names(t, filepath.Join(root, "snapshots")); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestOverlaySweepEmptiesTheTrash(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	writeFile(t, root+"/snapshots/.gone-old/x", "")
	writeFile(t, root+"/snapshots/.probe-1/lower/x", "")
	writeFile(t, root+"/snapshots/stray/fs/x", "")
	o := openOverlay(t, root, snapshottest.OpenDB(t, root))
	n, err := o.Sweep(t.Context())
	must(t, err)
	must(t, o.Close())
	if n != 2 {
		t.Errorf("swept %d", n)
	}
	if got := names(t, filepath.Join(root, "snapshots")); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	writeFile(t, root+"/snapshots/stray/fs/x", "")
	if _, err := o.Sweep(ctx); !errors.Is(err, cause) {
		t.Errorf("a cancelled sweep gives %v", err)
	}
}

// After a crash the work directory holds what a mount has left there.
func TestOverlayMountsAfterACrash(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		must(t, o.Prepare(t.Context(), "b", "a"))
		work := filepath.Join(filepath.Dir(layerDir(o, "b")), "work")
		writeFile(t, work+"/work/incompat/volatile/dirty", "")
		writeFile(t, work+"/work/#1", "half a copy")
		inSnapshot(t, o, "b", func(dir string) { writeFile(t, dir+"/y", "b") })
		must(t, o.Commit(t.Context(), "b"))
		if _, err := os.Stat(work); !os.IsNotExist(err) {
			t.Errorf("the work directory outlives the commit: %v", err)
		}
		must(t, o.Reopen(t.Context(), "b"))
		inSnapshot(t, o, "b", func(dir string) {
			writeFile(t, dir+"/z", "b")
			if got := snapshottest.Listing(t, dir); got != "x=a y=b z=b" {
				t.Errorf("shows %q", got)
			}
		})
	})
}

func TestOverlayFilesGone(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "a", "", func(dir string) {})
	makeLayer(t, o, "b", "a", func(dir string) {})
	must(t, os.RemoveAll(layerDir(o, "a")))
	mounts, err := o.Mounts(t.Context(), "b", true)
	must(t, err)
	if _, err := snapshot.Open(mounts); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("open: %v", err)
	}
	if _, err := o.Usage(t.Context(), "a"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("usage: %v", err)
	}
	must(t, os.RemoveAll(layerDir(o, "b")))
	if err := o.Prepare(t.Context(), "c", "b"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("prepare: %v", err)
	}
	must(t, o.Remove(&store.Batch{}, "b")) // the failed Prepare let go of it
}

func TestOverlayCheck(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	db := snapshottest.OpenDB(t, root)
	o := openOverlay(t, root, db)
	makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
	makeLayer(t, o, "b", "a", func(dir string) {})
	stack(t, o, "st", "b")
	inSnapshot(t, o, "st", func(string) {})
	b := &store.Batch{}
	must(t, o.Persist(b, "st"))
	db.Write(b)
	if errs := o.Check(t.Context(), true); len(errs) != 0 {
		t.Fatalf("a good store: %v", errs)
	}

	b = &store.Batch{}
	b.Delete("snapshot", "a")
	b.Put("snapshot", "orphan", []byte(`{"p":"none","c":true}`))
	b.Put("snapshot", "open", []byte(`{}`))
	b.Put("snapshot", "onopen", []byte(`{"p":"open","c":true}`))
	db.Write(b)
	writeFile(t, root+"/snapshots/file/fs", "")
	b = &store.Batch{}
	b.Put("snapshot", "file", []byte(`{"c":true}`))
	db.Write(b)
	o = openOverlay(t, root, db)
	var got []string
	for _, err := range o.Check(t.Context(), true) {
		got = append(got, strings.ReplaceAll(err.Error(), root, ""))
	}
	slices.Sort(got)
	want := []string{
		"/snapshots/a belongs to no snapshot",
		"snapshot b stands on a, which is missing",
		"snapshot file: /snapshots/file/fs is no directory",
		"snapshot onopen has no files: lstat /snapshots/onopen/fs: no such file or directory",
		"snapshot onopen stands on open, which is not committed",
		"snapshot open has no files: lstat /snapshots/open/fs: no such file or directory",
		"snapshot orphan has no files: lstat /snapshots/orphan/fs: no such file or directory",
		"snapshot orphan stands on none, which is missing",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	// All of that is lost, and nothing else.
	makeLayer(t, o, "good", "", func(string) {})
	b = &store.Batch{}
	must(t, o.Persist(b, "good"))
	db.Write(b)
	o.ForgetLost()
	n, err := o.Sweep(t.Context())
	must(t, err)
	if n != 3 { // a, b, file
		t.Errorf("swept %d", n)
	}
	for range 2 {
		var left []string
		must(t, o.Walk(func(i snapshot.Info) error { left = append(left, i.ID); return nil }))
		if errs := o.Check(t.Context(), true); len(errs) > 0 || !slices.Equal(left, []string{"good"}) {
			t.Errorf("left %v, wrong %v", left, errs)
		}
		must(t, o.Close())
		o = openOverlay(t, root, db)
	}
}

// A sweep finds out that files are gone, and whatever stands on them.
func TestOverlaySweepForgetsTheLost(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	db := snapshottest.OpenDB(t, root)
	o := openOverlay(t, root, db)
	for _, id := range []string{"a", "b", "c", "d"} {
		parent := map[string]string{"b": "a", "c": "b"}[id]
		makeLayer(t, o, id, parent, func(string) {})
	}
	stack(t, o, "st", "d", "c")
	b := &store.Batch{}
	must(t, o.Persist(b, "st"))
	b.Put("snapshot", "loop", []byte(`{"l":["loop"],"c":true}`))
	db.Write(b)
	must(t, os.RemoveAll(root+"/snapshots/b"))
	o = openOverlay(t, root, db)
	n, err := o.Sweep(t.Context())
	must(t, err)
	var left []string
	must(t, o.Walk(func(i snapshot.Info) error { left = append(left, i.ID); return nil }))
	if n != 1 || !slices.Equal(left, []string{"a", "d"}) {
		t.Errorf("swept %d, left %v", n, left)
	}
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Errorf("Check: %v", errs)
	}
	must(t, o.Close())
}

// A record that makes no sense costs its snapshot, not the daemon's start.
func TestOverlayUnreadableRecord(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	db := snapshottest.OpenDB(t, root)
	o := openOverlay(t, root, db)
	makeLayer(t, o, "a", "", func(dir string) {})
	makeLayer(t, o, "b", "a", func(dir string) {})
	b := &store.Batch{}
	must(t, o.Persist(b, "b"))
	b.Put("snapshot", "a", []byte("{"))
	db.Write(b)
	o = openOverlay(t, root, db)
	if _, err := o.Mounts(t.Context(), "b", true); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("mounts on top of it: %v", err)
	}
	errs := o.Check(t.Context(), false)
	if len(errs) != 3 || !strings.Contains(errs[0].Error(), `record of snapshot "a"`) {
		t.Errorf("Check: %v", errs)
	}
}
