package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"golang.org/x/sys/unix"
)

// When the disk has lost what was written lately, that alone goes out of use:
// records, what is built on them, and blobs; and who holds them learns that they
// are lost.
func TestDoubt(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	good := e.layer(nil, Options{}, "good=1")
	e.persist(good)
	goodBlob := get(good.Layers(ctx, Compression{}))(t)[0].Blob.Digest
	idle := get(e.m.New(ctx, nil, Options{Retain: true}))(t)
	e.write(idle, "idle=1")
	must(t, idle.Release(ctx))
	must(t, e.db.Verify(ctx))
	since := e.db.Synced()

	fresh := e.layer(good, Options{}, "fresh=1")
	above := e.layer(fresh, Options{}, "above=1")
	freshBlob := get(fresh.Layers(ctx, Compression{}))(t)[1].Blob.Digest
	unsaved := e.layer(good, Options{}, "unsaved=1")
	e.persist(above)
	mount := get(e.m.New(ctx, nil, Options{Retain: true}))(t)
	e.write(mount, "mount=1")
	writing := get(e.m.New(ctx, good, Options{}))(t)
	e.write(writing, "writing=1")
	ingest := get(e.blobs.Create())(t)

	e.m.doubt(since, fmt.Errorf("sync: %w", syscall.EIO))

	e.wantFiles(good, "good=1")
	for _, r := range []*Ref{fresh, above, unsaved} {
		wantErr(t, second(r.Mounts(ctx)), ErrLost, "input/output error")
		wantErr(t, second(e.m.Get(ctx, r.ID())), ErrNotFound)
		wantErr(t, r.Persist(&store.Batch{}), ErrLost)
	}
	wantErr(t, second(writing.Commit(ctx)), syscall.EIO, "may be damaged")
	wantErr(t, second(ingest.Commit(0, "")), syscall.EIO, "may be damaged")
	must(t, ingest.Close())
	if _, err := e.blobs.Stat(goodBlob); err != nil {
		t.Error(err)
	}
	if _, err := e.blobs.Stat(freshBlob); err == nil {
		t.Error("the blob that may be damaged is still there")
	}
	kept := get(e.m.GetMutable(ctx, idle.ID()))(t)
	must(t, kept.Release(ctx))
	must(t, errors.Join(mount.Release(ctx), writing.Release(ctx)))
	wantErr(t, second(e.m.GetMutable(ctx, mount.ID())), ErrNotFound)
	for _, r := range []*Ref{good, fresh, above, unsaved} {
		r.Release()
	}
	e.restart()
	if got := len(get(e.m.DiskUsage(ctx, nil, 0))(t)); got != 2 {
		t.Errorf("%d records are left, not the layer and the cache mount", got)
	}
}

// A step that the disk fails runs once more, when it is known what was lost.
func TestWithRoomAfterFailure(t *testing.T) {
	e := newEnv(t)
	for _, c := range []struct {
		fails int
		want  error
	}{{1, nil}, {2, syscall.EIO}} {
		calls := 0
		err := e.m.WithRoom(t.Context(), func() error {
			if calls++; calls > c.fails {
				return nil
			}
			return fmt.Errorf("write: %w", syscall.EIO)
		})
		if calls != 2 {
			t.Errorf("called %d times", calls)
		}
		if c.want == nil {
			must(t, err)
		} else {
			wantErr(t, err, c.want, "the disk that holds "+e.root+" fails")
		}
	}
}

// What didn't fit on a full disk is tried once more if room has come since it began,
// such as by what is removed in the background.
func TestWithRoomThatCame(t *testing.T) {
	needRoot(t)
	disk := t.TempDir()
	must(t, unix.Mount("small", disk, "tmpfs", 0, "size=16m"))
	t.Cleanup(func() { must(t, unix.Unmount(disk, unix.MNT_DETACH)) })
	root := filepath.Join(disk, "state")
	must(t, os.Mkdir(root, 0o700))
	e := newEnvAt(t, root)
	filler := filepath.Join(disk, "filler")
	for size, want := range map[int]int{worthTrying / 2: 1, 2 * worthTrying: 2} {
		must(t, os.WriteFile(filler, make([]byte, size), 0o600))
		calls := 0
		err := e.m.WithRoom(t.Context(), func() error {
			if calls++; calls > 1 {
				return nil
			}
			must(t, os.Remove(filler))
			return fmt.Errorf("write: %w", syscall.ENOSPC)
		})
		if calls != want || (err == nil) != (want > 1) {
			t.Errorf("with %d bytes more than before: called %d times, not %d: %v", size, calls, want, err)
		}
	}
}
