package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
)

// deepChain makes n snapshots, each on the one before, with a file of their own and
// a change to one that all of them have.
func deepChain(t *testing.T, o *snapshot.Overlay, n int) (top string, want string) {
	t.Helper()
	var names []string
	for i := range n {
		id := fmt.Sprintf("s%04d", i)
		prepareOn(t, o, id, top)
		writeFile(t, filepath.Join(layerDir(o, id), id), "")
		writeFile(t, filepath.Join(layerDir(o, id), "all"), id)
		must(t, o.Commit(t.Context(), id))
		top, names = id, append(names, id+"=")
	}
	return top, "all=" + top + " " + strings.Join(names, " ")
}

func wantListing(t *testing.T, o *snapshot.Overlay, id, want string) {
	t.Helper()
	inSnapshot(t, o, id, func(dir string) {
		if got := snapshottest.Listing(t, dir); got != want {
			t.Errorf("%s shows %.200q, want %.200q", id, got, want)
		}
	})
}

// grounds are the names of the grounds that there are.
func grounds(t *testing.T, o *snapshot.Overlay) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(layerDir(o, "x"), "../.."))
	must(t, err)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "=") {
			names = append(names, e.Name())
		}
	}
	return names
}

// More layers than the kernel can stack, below one another and merged: they show
// what they should, can be written on, survive a restart, and leave nothing.
func TestMoreLayersThanTheKernelStacks(t *testing.T) {
	root := t.TempDir()
	db := reopenableDB(t, root)
	o := openOverlay(t, root, db)
	top, want := deepChain(t, o, 1001)
	wantListing(t, o, top, want)
	if got := grounds(t, o); len(got) != 2 {
		t.Errorf("grounds %q", got)
	}
	layers := make([]string, 2000)
	var sum []string
	for i := range layers {
		layers[i] = fmt.Sprintf("l%04d", i)
		must(t, o.Prepare(t.Context(), layers[i], ""))
		writeFile(t, filepath.Join(layerDir(o, layers[i]), layers[i]), "")
		must(t, o.Commit(t.Context(), layers[i]))
		sum = append(sum, layers[i]+"=")
	}
	if grown := stack(t, o, "merge", layers...); len(grown) != 2001 {
		t.Errorf("%d snapshots share files now", len(grown))
	}
	makeLayer(t, o, "more", "merge", func(dir string) {
		must(t, os.Remove(dir+"/l0001"))
		writeFile(t, dir+"/z", "")
	})
	wantListing(t, o, "merge", strings.Join(sum, " "))
	sum = append(append(sum[:1:1], sum[2:]...), "z=")
	wantListing(t, o, "more", strings.Join(sum, " "))
	stack(t, o, "both", append([]string{top}, layers...)...)

	b := &store.Batch{}
	for _, id := range []string{top, "more", "both"} {
		must(t, o.Persist(b, id))
	}
	db.Write(b)
	must(t, db.Close())
	must(t, o.Close())
	db = reopenableDB(t, root)
	o = openOverlay(t, root, db)
	if n, err := o.Sweep(t.Context()); err != nil || n != 0 {
		t.Errorf("swept %d, %v", n, err)
	}
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Fatal(errs)
	}
	wantListing(t, o, top, want)
	wantListing(t, o, "more", strings.Join(sum, " "))

	ordered := []string{"both", "more", "merge"}
	for i := 1000; i >= 0; i-- {
		ordered = append(ordered, fmt.Sprintf("s%04d", i))
	}
	b = &store.Batch{}
	for _, id := range append(ordered, layers...) {
		must(t, o.Remove(b, id))
	}
	db.Write(b)
	must(t, db.Sync(t.Context()))
	must(t, o.Settle(t.Context()))
	left, err := os.ReadDir(filepath.Join(root, "snapshots"))
	must(t, err)
	if len(left) > 1 || len(left) == 1 && left[0].Name() != ".empty" {
		t.Errorf("%d files are left", len(left))
	}
	must(t, db.Close())
	must(t, o.Close())
}

// However long the names of layers are, a step can read and write on top of as many
// as there may be; on kernels before 6.7 their paths must fit into a page.
func TestDeepestCanBeMounted(t *testing.T) {
	deepest := func(t *testing.T, length int, near ...int) {
		root := t.TempDir()
		o := openOverlay(t, root, reopenableDB(t, root))
		top := ""
		for i := range near[len(near)-1] {
			id := fmt.Sprintf("%0*d", length, i)
			prepareOn(t, o, id, top)
			look := slices.ContainsFunc(near, func(n int) bool { return i >= n-10 && i < n })
			if look {
				inSnapshot(t, o, id, func(dir string) { writeFile(t, dir+"/all", id) })
			}
			must(t, o.Commit(t.Context(), id))
			if look {
				wantListing(t, o, id, "all="+id)
			}
			top = id
		}
	}
	t.Run("ByNumber", func(t *testing.T) { deepest(t, 6, 505) })
	t.Run("ByBytes", func(t *testing.T) {
		snapshottest.Root(t)
		snapshot.WithKernel(t, false, false)
		deepest(t, 6, 383, 403)
		deepest(t, 64, 56, 60)
	})
}

// A ground that somebody removed takes along what stands on it, one that no record
// tells of is swept, one of a snapshot that is written again goes, and those who
// want the same one make it once.
func TestGroundLivesWithItsSnapshot(t *testing.T) {
	root := t.TempDir()
	db := reopenableDB(t, root)
	o := openOverlay(t, root, db)
	snapshot.StackAtMost(o, 3)
	top, _ := deepChain(t, o, 3)
	var wg sync.WaitGroup
	made := make(chan int, 8)
	for range cap(made) {
		wg.Go(func() {
			grown, err := o.Ground(t.Context(), top)
			if err != nil {
				t.Error(err)
			}
			made <- len(grown)
		})
	}
	wg.Wait()
	close(made)
	total := 0
	for n := range made {
		total += n
	}
	if got := grounds(t, o); total != 3 || len(got) != 1 || got[0] != "="+top {
		t.Errorf("grounds %q, %d snapshots share files", got, total)
	}
	before, err := o.Usage(t.Context(), top)
	must(t, err)
	must(t, o.Reopen(t.Context(), top))
	if got := grounds(t, o); len(got) != 0 {
		t.Errorf("after it was opened for writing there are grounds %q", got)
	}
	must(t, o.Commit(t.Context(), top))
	must(t, o.Settle(t.Context()))
	after, err := o.Usage(t.Context(), top)
	must(t, err)
	if before.Size <= after.Size || !before.Linked || after.Linked {
		t.Errorf("usage %+v with, %+v without a ground", before, after)
	}

	makeLayer(t, o, "child", top, func(dir string) { writeFile(t, dir+"/child", "") })
	makeLayer(t, o, "other", "s0001", func(dir string) { writeFile(t, dir+"/other", "") })
	b := &store.Batch{}
	must(t, o.Persist(b, "child"))
	must(t, o.Persist(b, "other"))
	db.Write(b)
	must(t, db.Close())
	must(t, o.Close())
	must(t, os.RemoveAll(filepath.Join(root, "snapshots", "="+top)))
	must(t, os.Mkdir(filepath.Join(root, "snapshots", "=s0000"), 0o700))
	db = reopenableDB(t, root)
	o = openOverlay(t, root, db)
	if errs := o.Check(t.Context(), false); len(errs) != 2 {
		t.Errorf("found %v", errs)
	}
	if n, err := o.Sweep(t.Context()); err != nil || n != 3 {
		t.Errorf("swept %d, %v", n, err)
	}
	for id, want := range map[string]bool{"s0001": true, "other": true, top: false, "child": false} {
		if _, err := o.Stat(t.Context(), id); (err == nil) != want {
			t.Errorf("%s: %v", id, err)
		}
	}
	must(t, db.Close())
	must(t, o.Close())
}
