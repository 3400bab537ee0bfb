package snapshot_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
)

// allocated is what the file system has given to all below dir.
func allocated(t testing.TB, dir string) (total int64) {
	t.Helper()
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return err
		}
		if path != dir && !seen[st.Ino] {
			seen[st.Ino] = true
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// Usages add up to what is on disk, also when snapshots have files in common.
func TestUsageAddsUp(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	o := openOverlay(t, root, snapshottest.OpenDB(t, root))
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sum := func() (total int64, linked []string) {
		t.Helper()
		must(o.Walk(func(i snapshot.Info) error {
			u, err := o.Usage(t.Context(), i.ID)
			if u.Linked {
				linked = append(linked, i.ID)
			}
			total += u.Size
			return err
		}))
		return total, linked
	}
	dir := filepath.Join(root, "snapshots")
	for i, id := range []string{"a", "b", "c", "d"} {
		parent := ""
		if i > 0 {
			parent = "a"
		}
		must(o.Prepare(t.Context(), id, parent))
		own := filepath.Join(dir, id, "fs")
		must(os.WriteFile(own+"/own", make([]byte, 10000*(i+1)), 0o644))
		must(os.Link(own+"/own", own+"/again"))
		if i > 0 { // all have the first one's file
			must(os.Link(filepath.Join(dir, "a", "fs", "own"), own+"/shared"))
		}
		if i < 3 {
			must(o.Commit(t.Context(), id))
		}
	}
	got, linked := sum()
	if want := allocated(t, dir); got > want || got < want-4 {
		t.Errorf("usages add up to %d, there are %d", got, want)
	}
	if fmt.Sprint(linked) != "[a b c d]" {
		t.Errorf("linked: %q", linked)
	}
	b := &store.Batch{}
	for _, id := range []string{"b", "c", "d"} {
		must(o.Remove(b, id))
		must(os.RemoveAll(filepath.Join(dir, id)))
	}
	got, linked = sum()
	if want := allocated(t, dir); got != want || linked != nil {
		t.Errorf("afterwards %d of %d, linked %q", got, want, linked)
	}
	must(o.Close())
}
