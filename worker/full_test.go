package worker

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// smallDisk is a directory on a disk of its own with room for size bytes.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	must(t, unix.Mount("small", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "state")
}

// mkfile builds a file of size bytes, all of them fill.
func mkfile(t testing.TB, w *Worker, size int, fill byte) error {
	t.Helper()
	return mkfileOf(t, w, bytes.Repeat([]byte{fill}, size))
}

// mkfileOf builds a file.
func mkfileOf(t testing.TB, w *Worker, data []byte) error {
	t.Helper()
	file, err := proto.Marshal(&pb.Op{
		Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{
			Input: -1, SecondaryInput: -1, Output: 0,
			Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/f", Mode: 0o644, Data: data}},
		}}}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Constraints: &pb.WorkerConstraints{},
	})
	must(t, err)
	last, err := proto.Marshal(&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(file).String()}}})
	must(t, err)
	edge, err := w.Loader().Load(&pb.Definition{Def: [][]byte{file, last}}, ops.LoadOptions{})
	must(t, err)
	b := w.Solver().NewBuild(solver.BuildOptions{Value: &ops.Build{}})
	defer b.Close()
	res, err := b.Solve(t.Context(), edge)
	if err == nil {
		res.Release()
	}
	return err
}

// A build that finds the disk full says so in numbers. Once there is room the
// same daemon builds on, and has lost nothing.
func TestDiskFull(t *testing.T) {
	root := smallDisk(t, 32<<20)
	w, err := New(t.Context(), Config{Root: root, GC: GC{Off: true}})
	must(t, err)
	must(t, mkfile(t, w, 10<<20, 'a'))
	held := record(t, w, "held", 8<<20)
	err = mkfile(t, w, 15<<20, 'b')
	var full *cache.FullError
	if !errors.As(err, &full) || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("error %v", err)
	}
	if full.Root != root || full.Size != 32<<20 || full.Free < 8<<20 || full.Free > 13<<20 || full.Cache < 18<<20 || full.Unused < 10<<20 || full.Unused > 11<<20 {
		t.Errorf("numbers %+v", full)
	}
	for _, want := range []string{"no space left", "the disk that holds " + root + " is full", "of 32MiB that are free", "prune --all", "would free 10"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the message lacks %q: %v", want, err)
		}
	}
	// To nearly the last byte: not even the database has room but its reserve.
	var filler []*cache.Ref
	for size := 1 << 20; size >= 4096; size /= 2 {
		for {
			ref, err := tryRecord(t, w, size)
			if err != nil {
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
				break
			}
			filler = append(filler, ref)
		}
	}
	if err := mkfile(t, w, 1<<20, 'c'); !errors.As(err, &full) || full.Free > 64<<10 {
		t.Errorf("error %v", err)
	}
	for _, ref := range filler {
		ref.Release()
	}
	held.Release()
	must(t, w.Cache().Prune(t.Context(), cache.PruneOptions{All: true}, nil))
	must(t, mkfile(t, w, 15<<20, 'b'))
	must(t, w.Store().Sync(t.Context()))
	must(t, w.Close())
	if r := check(t, root, true); len(r.Problems) > 0 || r.Cache.Records != 1 {
		t.Errorf("afterwards: %s, %q", r, r.Problems)
	}
}

// tryRecord is record on a disk that may be full.
func tryRecord(t *testing.T, w *Worker, size int) (*cache.Ref, error) {
	t.Helper()
	u, err := w.Cache().New(t.Context(), nil, cache.Options{Description: "filler"})
	if err != nil {
		return nil, err
	}
	ref, err := fillRecord(t, u, size)
	if err != nil {
		// What it wrote is gone when this returns.
		must(t, u.Discard(t.Context()))
		must(t, w.Store().Sync(t.Context()))
		must(t, w.snapshots.Settle(t.Context()))
		return nil, err
	}
	b := &store.Batch{}
	must(t, ref.Persist(b))
	w.Store().Write(b)
	return ref, nil
}

// A full disk is no error while the rules can make room: the step waits for
// that, and runs again.
func TestDiskFullMakesRoom(t *testing.T) {
	root := smallDisk(t, 32<<20)
	w, err := New(t.Context(), Config{Root: root, GC: GC{Rules: []GCRule{{MinFree: DiskSpace{Bytes: 20 << 20}}}}})
	must(t, err)
	for _, fill := range []byte("abcdef") {
		must(t, mkfile(t, w, 12<<20, fill))
	}
	evicted := 0
	w.Cache().Evictions(func(cache.Eviction) bool { evicted++; return true })
	if evicted < 4 {
		t.Errorf("%d records were evicted", evicted)
	}
	must(t, w.Close())
	if r := check(t, root, true); len(r.Problems) > 0 {
		t.Errorf("afterwards: %q", r.Problems)
	}
}
