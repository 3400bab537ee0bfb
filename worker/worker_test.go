package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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
	b := w.Solver().NewBuild(solver.BuildOptions{Value: &ops.Build{}})
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

// With a record go its snapshot, the layer made of it, its result and the links
// that lead there, and nothing else has to be run for it.
//
// compat: CTL-113
func TestPruneLeavesNothing(t *testing.T) {
	root := used(t)
	w := open(t, root)
	must(t, w.Cache().Prune(t.Context(), cache.PruneOptions{All: true}, nil))
	must(t, w.Close())
	r := check(t, root, true)
	if len(r.Problems) > 0 || r.Cache.Records+r.Cache.Snapshots+r.Cache.Blobs+r.Keys.Links+r.Keys.Results+r.Leftovers != 0 {
		t.Errorf("after a prune of all: %s, problems %q", r, r.Problems)
	}
}

// Every kind of damage is found by the check, named, and no reason not to
// start; afterwards the state is whole again.
func TestCheckFindsDamage(t *testing.T) {
	edit := func(t *testing.T, path string, change func([]byte) []byte) string {
		data, err := os.ReadFile(path)
		must(t, err)
		must(t, os.Chmod(path, 0o600))
		must(t, os.WriteFile(path, change(data), 0o600))
		return filepath.Base(path)
	}
	flip := func(data []byte) []byte { data[len(data)/2] ^= 1; return data }
	write := func(t *testing.T, root string, change func(db *store.DB, b *store.Batch)) {
		db, err := store.Open(store.Options{Root: root})
		must(t, err)
		var b store.Batch
		change(db, &b)
		db.Write(&b)
		must(t, db.Close())
	}
	// stays is what a start alone doesn't look for.
	stays := []string{"KeyWithoutRecord", "KeyThatIsNone", "MetadataWithoutRecord", "RecordGone", "JournalChanged"}
	// lose deletes the one record of a bucket.
	lose := func(bucket string) func(t *testing.T, root string) string {
		return func(t *testing.T, root string) (name string) {
			write(t, root, func(db *store.DB, b *store.Batch) {
				db.Scan(bucket, "", func(k string, _ []byte) bool { name = k; return true })
				b.Delete(bucket, name)
			})
			return name
		}
	}
	for _, c := range []struct {
		name   string
		deep   bool
		kept   bool // what was built is a hit afterwards
		damage func(t *testing.T, root string) (names string)
	}{
		{"SnapshotGone", false, false, func(t *testing.T, root string) string {
			dir := only(t, filepath.Join(root, "snapshots", "*"))
			must(t, os.RemoveAll(dir))
			return filepath.Base(dir)
		}},
		{"BlobTruncated", false, true, func(t *testing.T, root string) string {
			return edit(t, only(t, filepath.Join(root, "blobs", "sha256", "*")), func(b []byte) []byte { return b[:10] })
		}},
		{"BlobGone", false, true, func(t *testing.T, root string) string {
			blob := only(t, filepath.Join(root, "blobs", "sha256", "*"))
			must(t, os.Remove(blob))
			return filepath.Base(blob)
		}},
		{"BlobChanged", true, true, func(t *testing.T, root string) string {
			return edit(t, only(t, filepath.Join(root, "blobs", "sha256", "*")), flip)
		}},
		{"KeyWithoutRecord", false, true, func(t *testing.T, root string) string {
			write(t, root, func(_ *store.DB, b *store.Batch) {
				key := strings.Repeat("k", 32)
				b.Put("key", key+"r"+"gone", nil)
				b.Put("key.of", "gone\x00"+key, nil)
			})
			return "gone"
		}},
		{"KeyThatIsNone", false, true, func(t *testing.T, root string) string {
			write(t, root, func(_ *store.DB, b *store.Batch) { b.Put("key", "x", nil) })
			return "key 78 is no entry"
		}},
		{"MetadataWithoutRecord", false, true, func(t *testing.T, root string) string {
			write(t, root, func(_ *store.DB, b *store.Batch) { b.Put("refmeta", "nobody/x", []byte("x")) })
			return "nobody/x"
		}},
		{"SnapshotGrown", true, true, func(t *testing.T, root string) string {
			w := open(t, root)
			_, err := w.Cache().DiskUsage(t.Context(), nil, 0) // which remembers sizes
			must(t, err)
			must(t, w.Close())
			dir := only(t, filepath.Join(root, "snapshots", "*"))
			must(t, os.WriteFile(filepath.Join(dir, "fs", "added"), make([]byte, 1<<20), 0o600))
			return filepath.Base(dir)
		}},
		{"SnapshotRecordGone", false, false, lose("snapshot")},
		{"BlobRecordGone", false, true, lose("blob")},
		{"RecordGone", false, false, lose("ref")},
		{"RecordUnreadable", false, false, func(t *testing.T, root string) (name string) {
			write(t, root, func(db *store.DB, b *store.Batch) {
				db.Scan("ref", "", func(k string, _ []byte) bool { name = k; return true })
				b.Put("ref", name, []byte("{"))
			})
			return name
		}},
		{"DatabaseGone", false, true, func(t *testing.T, root string) string {
			must(t, os.Remove(filepath.Join(root, "kiln.db")))
			return "kiln.db"
		}},
		{"DatabaseCut", false, true, func(t *testing.T, root string) string {
			return edit(t, filepath.Join(root, "kiln.db"), func(b []byte) []byte { return b[:3*os.Getpagesize()] })
		}},
		{"DatabaseChanged", false, true, func(t *testing.T, root string) string {
			return edit(t, filepath.Join(root, "kiln.db"), func(b []byte) []byte {
				return bytes.Replace(b, []byte("sha256:"), []byte("sha255:"), -1)
			})
		}},
		{"JournalChanged", false, true, func(t *testing.T, root string) string {
			return edit(t, filepath.Join(root, "kiln.journal"), func(b []byte) []byte { b[20] ^= 1; return b })
		}},
		{"AllGone", false, false, func(t *testing.T, root string) string {
			must(t, os.Remove(filepath.Join(root, "kiln.journal")))
			return edit(t, filepath.Join(root, "kiln.db"), func(b []byte) []byte { return nil })
		}},
	} {
		for _, repair := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/repair=%t", c.name, repair), func(t *testing.T) {
				root := used(t)
				name := c.damage(t, root)
				before := everything(t, root)
				r := check(t, root, c.deep)
				if !strings.Contains(strings.Join(r.Problems, "\n"), name) {
					t.Errorf("no problem names %s: %q", name, r.Problems)
				}
				if after := everything(t, root); after != before {
					t.Error("a check changes what it checks")
				}
				if repair {
					done, err := Repair(t.Context(), root, c.deep)
					must(t, err)
					if r := check(t, root, true); len(r.Problems) > 0 || r.Leftovers > 0 {
						t.Fatalf("after the repair (%q): %s, %q", done, r, r.Problems)
					}
				}
				w := open(t, root)
				if got := len(found(t, w)) > 0; got != c.kept {
					t.Errorf("the result is there: %t, want %t", got, c.kept)
				}
				use(t, w)
				must(t, w.Close())
				if r := check(t, root, true); len(r.Problems) > 0 && (repair || !c.deep && !slices.Contains(stays, c.name)) {
					t.Errorf("afterwards: %q", r.Problems)
				}
			})
		}
	}
}

// found returns the results in the key graph that are there.
func found(t *testing.T, w *Worker) (ids []string) {
	t.Helper()
	w.Store().Scan("key.of", "", func(k string, _ []byte) bool {
		if id, _, _ := strings.Cut(k, "\x00"); w.Cache().Exists(id) {
			ids = append(ids, id)
		}
		return true
	})
	return ids
}

// everything is the name, size and time of each file of the state, but not of
// the directory in which overlays are tried.
func everything(t *testing.T, root string) string {
	t.Helper()
	var out strings.Builder
	must(t, filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		st, err := e.Info()
		if err == nil {
			fmt.Fprintln(&out, path, st.Size(), st.ModTime())
		}
		return err
	}))
	return out.String()
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

// A worker says what it is before anybody has looked at its database: however much
// is cached, and however long a damaged database takes, clients are answered. It
// has the state directory for itself from then on.
func TestOpenReadsNoDatabase(t *testing.T) {
	root := t.TempDir()
	db := filepath.Join(root, "kiln.db")
	must(t, os.WriteFile(db, []byte("damaged"), 0o600))
	w, err := Open(Config{Root: root})
	must(t, err)
	if data, err := os.ReadFile(db); err != nil || string(data) != "damaged" {
		t.Errorf("Open changed the database: it is %q (error %v)", data, err)
	}
	if w.ID() == "" || len(w.Platforms()) == 0 || len(w.GCRules()) == 0 {
		t.Errorf("the worker doesn't know what it is: id %q, platforms %v, rules %v", w.ID(), w.Platforms(), w.GCRules())
	}
	if _, err := Open(Config{Root: root}); err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
		t.Errorf("a second one was opened: %v", err)
	}
	must(t, w.Close())

	w, err = New(t.Context(), Config{Root: root})
	must(t, err)
	defer func() { must(t, w.Close()) }()
	if aside, err := filepath.Glob(db + ".damaged-*"); err != nil || len(aside) != 1 {
		t.Errorf("set aside: %q (error %v)", aside, err)
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

// A state directory that is named by a relative path is measured like any other.
func TestRelativeRoot(t *testing.T) {
	t.Chdir(t.TempDir())
	w := open(t, "state")
	use(t, w)
	must(t, w.Store().Sync(t.Context())) // or it writes meanwhile
	space, err := w.Cache().Space(t.Context(), "")
	must(t, err)
	var on int64
	must(t, filepath.WalkDir("state", func(path string, _ fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Lstat(path, &st)
		}
		on += st.Blocks * 512
		return err
	}))
	if off := space.Total() - on; off > space.Records/2 || -off > space.Records/2 {
		t.Errorf("%d bytes are said to be in the state directory, there are %d: %+v", space.Total(), on, space)
	}
	must(t, w.Close())
}
