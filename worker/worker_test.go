package worker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// needRoot fails the test unless it may mount.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
}

func open(t *testing.T, root string) *Worker {
	t.Helper()
	needRoot(t)
	w, err := New(t.Context(), Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// use runs a build that makes one file, and exports its layer.
func use(t *testing.T, w *Worker) {
	t.Helper()
	file, err := proto.Marshal(&pb.Op{
		Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{
			Input: -1, SecondaryInput: -1, Output: 0,
			Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/f", Mode: 0o644, Data: []byte("content")}},
		}}}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Constraints: &pb.WorkerConstraints{},
	})
	must(t, err)
	last, err := proto.Marshal(&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(file).String()}}})
	must(t, err)
	edge, err := w.Loader().Load(&pb.Definition{Def: [][]byte{file, last}}, ops.LoadOptions{})
	must(t, err)
	b := w.Solver().NewBuild(solver.BuildOptions{ID: "one", Value: &ops.Build{}})
	res, err := b.Solve(t.Context(), edge)
	must(t, err)
	_, err = res.(ops.Result).Ref.Layers(t.Context(), cache.Compression{OCI: true})
	must(t, err)
	res.Release()
	b.Close()
}

// record makes a stored record with a file of size bytes. The caller holds it.
func record(t *testing.T, w *Worker, description string, size int) *cache.Ref {
	t.Helper()
	u, err := w.Cache().New(t.Context(), nil, cache.Options{Description: description})
	must(t, err)
	ref, err := fillRecord(t, u, size)
	must(t, err)
	b := &store.Batch{}
	must(t, ref.Persist(b))
	w.Store().Write(b)
	return ref
}

// fillRecord writes a file of size bytes and commits.
func fillRecord(t *testing.T, u *cache.Mutable, size int) (*cache.Ref, error) {
	t.Helper()
	v, err := u.Open(t.Context())
	if err != nil {
		return nil, err
	}
	err = os.WriteFile(filepath.Join(v.Path(), "f"), make([]byte, size), 0o644)
	if err = errors.Join(err, v.Close()); err != nil {
		return nil, err
	}
	return u.Commit(t.Context())
}

func used(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	w := open(t, root)
	use(t, w)
	must(t, w.Close())
	return root
}

func check(t *testing.T, root string, deep bool) Report {
	t.Helper()
	r, err := Check(t.Context(), root, deep)
	must(t, err)
	return r
}

func TestCheckIsCleanAfterUse(t *testing.T) {
	root := used(t)
	for range 2 { // checking changes nothing
		r := check(t, root, true)
		if len(r.Problems) > 0 || r.Cache.Records != 1 || r.Cache.Snapshots != 1 || r.Cache.Blobs != 1 || r.Keys.Results != 1 {
			t.Fatalf("report: %s, problems %q", r, r.Problems)
		}
	}
}

// Every kind of damage is found by the check, named, and no reason not to
// start; afterwards the state is whole again.
func TestCheckFindsDamage(t *testing.T) {
	for _, c := range []struct {
		name   string
		deep   bool
		damage func(t *testing.T, root string) (names string)
	}{
		{"SnapshotGone", false, func(t *testing.T, root string) string {
			dir := only(t, filepath.Join(root, "snapshots", "*"))
			must(t, os.RemoveAll(dir))
			return filepath.Base(dir)
		}},
		{"BlobTruncated", false, func(t *testing.T, root string) string {
			blob := only(t, filepath.Join(root, "blobs", "sha256", "*"))
			must(t, os.Truncate(blob, 10))
			return filepath.Base(blob)
		}},
		{"BlobChanged", true, func(t *testing.T, root string) string {
			blob := only(t, filepath.Join(root, "blobs", "sha256", "*"))
			data, err := os.ReadFile(blob)
			must(t, err)
			data[len(data)/2] ^= 1
			must(t, os.Chmod(blob, 0o600))
			must(t, os.WriteFile(blob, data, 0o600))
			return filepath.Base(blob)
		}},
		{"KeyWithoutRecord", false, func(t *testing.T, root string) string {
			db, err := store.Open(store.Options{Root: root})
			must(t, err)
			var b store.Batch
			key := strings.Repeat("k", 32)
			b.Put("key.result", key+"gone", nil)
			b.Put("key.of", "gone\x00"+key, nil)
			db.Write(&b)
			must(t, db.Close())
			return "gone"
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := used(t)
			name := c.damage(t, root)
			r := check(t, root, c.deep)
			if !strings.Contains(strings.Join(r.Problems, "\n"), name) {
				t.Fatalf("no problem names %s: %q", name, r.Problems)
			}
			w := open(t, root)
			use(t, w)
			must(t, w.Close())
		})
	}
}

func only(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	must(t, err)
	if len(found) != 1 {
		t.Fatalf("%s: %q", pattern, found)
	}
	return found[0]
}

func TestCheckWantsState(t *testing.T) {
	if _, err := Check(t.Context(), t.TempDir(), false); err == nil || !strings.Contains(err.Error(), "no state") {
		t.Fatalf("Check of an empty directory: %v", err)
	}
}

func TestIDStaysTheSame(t *testing.T) {
	root := t.TempDir()
	w := open(t, root)
	id := w.ID()
	must(t, w.Close())
	w = open(t, root)
	defer w.Close()
	if id == "" || w.ID() != id {
		t.Fatalf("id was %q, now %q", id, w.ID())
	}
}

func TestIDOfACrashedFirstStart(t *testing.T) {
	root := t.TempDir()
	must(t, os.WriteFile(filepath.Join(root, "workerid"), nil, 0o600))
	id, err := workerID(root)
	must(t, err)
	again, err := workerID(root)
	must(t, err)
	if id == "" || id != again {
		t.Fatalf("ids %q and %q", id, again)
	}
	must(t, os.Remove(filepath.Join(root, "workerid")))
	must(t, os.Mkdir(filepath.Join(root, "workerid"), 0o700))
	if _, err := workerID(root); err == nil {
		t.Fatal("an id that can't be read was replaced")
	}
}

// compat: DMN-123
func TestPrepareRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "a", "b[*]?\\")
	must(t, prepareRoot(root))
	st, err := os.Stat(root)
	must(t, err)
	if st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", st.Mode())
	}
	must(t, prepareRoot(root))
	for _, foreign := range []string{"buildkitd.lock", "runc-overlayfs", "runc-native", "cache.db"} {
		path := filepath.Join(root, foreign)
		must(t, os.WriteFile(path, nil, 0o600))
		if err := prepareRoot(root); err == nil || !strings.Contains(err.Error(), foreign) {
			t.Errorf("with %s: %v", foreign, err)
		}
		must(t, os.Remove(path))
	}
	if err := prepareRoot(""); err == nil {
		t.Error("no directory was accepted")
	}
}

func TestOneWorkerPerRoot(t *testing.T) {
	root := t.TempDir()
	w := open(t, root)
	defer w.Close()
	if second, err := New(context.Background(), Config{Root: root}); err == nil {
		second.Close()
		t.Fatal("a second worker opened the same state")
	}
}

func TestAnnouncedPlatforms(t *testing.T) {
	ps, err := announced([]string{"linux/arm64", "linux/amd64"})
	must(t, err)
	if len(ps) != 2 || ps[0].Architecture != "arm64" || ps[1].Architecture != "amd64" {
		t.Errorf("platforms %v", ps)
	}
	if _, err := announced([]string{"linux/amd64", "!"}); err == nil || !strings.Contains(err.Error(), `"!"`) {
		t.Errorf("bad platform: %v", err)
	}
	if ps, err := announced(nil); err != nil || len(ps) == 0 {
		t.Errorf("native platforms %v, %v", ps, err)
	}
}

func TestSourceMetaOfBadSources(t *testing.T) {
	w := open(t, t.TempDir())
	defer w.Close()
	for _, id := range []string{"", "busybox", "nope://x", "docker-image://", "docker-image://UPPER CASE", "oci-layout://x"} {
		if _, err := w.SourceMeta(t.Context(), MetaRequest{Op: &pb.SourceOp{Identifier: id}}); err == nil {
			t.Errorf("%q was accepted", id)
		}
	}
	if m, err := w.SourceMeta(t.Context(), MetaRequest{Op: &pb.SourceOp{Identifier: "local://ctx"}}); err != nil || m.Op.Identifier != "local://ctx" {
		t.Errorf("local source: %v, %v", m, err)
	}
}
