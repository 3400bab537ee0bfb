package worker

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/hack/faultdisk"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) {
	faultdisk.Main()
	os.Exit(m.Run())
}

// fileSize is that of the files that these tests build: several requests of the disk.
const fileSize = 100 << 10

// chain is a definition of steps: each makes a file, of its own letter, on top of
// the one before, and the last one copies the first of the files.
func chain(t *testing.T, letters string) *pb.Definition {
	t.Helper()
	def := &pb.Definition{}
	add := func(op *pb.Op) []*pb.Input {
		op.Platform, op.Constraints = &pb.Platform{OS: "linux", Architecture: "amd64"}, &pb.WorkerConstraints{}
		data, err := proto.Marshal(op)
		must(t, err)
		def.Def = append(def.Def, data)
		return []*pb.Input{{Digest: digest.FromBytes(data).String()}}
	}
	var last []*pb.Input
	for _, letter := range letters {
		base := int64(-1)
		if last != nil {
			base = 0
		}
		last = add(&pb.Op{Inputs: last, Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{
			Input: base, SecondaryInput: -1,
			Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/" + string(letter), Mode: 0o644, Data: content(letter)}},
		}}}}})
	}
	last = add(&pb.Op{Inputs: append(last, last...), Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{
		Input: 0, SecondaryInput: 1,
		Action: &pb.FileAction_Copy{Copy: &pb.FileActionCopy{Src: "/" + letters[:1], Dest: "/copy", Mode: -1, Timestamp: -1}},
	}}}}})
	data, err := proto.Marshal(&pb.Op{Inputs: last})
	must(t, err)
	def.Def = append(def.Def, data)
	return def
}

func content(letter rune) []byte { return bytes.Repeat([]byte{byte(letter)}, fileSize) }

// buildChain builds the chain, exports its layers, and reads all files of the
// result, whose record it returns. What is lost meanwhile is made again, a few
// times, as in all builds.
func buildChain(t *testing.T, w *Worker, letters string) (id string, err error) {
	t.Helper()
	for range 3 {
		if id, err = buildOnce(t, w, letters); !errors.Is(err, cache.ErrLost) {
			break
		}
	}
	return id, err
}

func buildOnce(t *testing.T, w *Worker, letters string) (id string, err error) {
	t.Helper()
	edge, err := w.Loader().Load(chain(t, letters), ops.LoadOptions{})
	must(t, err)
	b := w.Solver().NewBuild(solver.BuildOptions{Value: &ops.Build{}})
	defer b.Close()
	res, err := b.Solve(t.Context(), edge)
	if err != nil {
		return "", err
	}
	defer res.Release()
	ref := res.(ops.Result).Ref
	if _, err := ref.Layers(t.Context(), cache.Compression{OCI: true}); err != nil {
		return "", fmt.Errorf("export: %w", err)
	}
	mounts, err := ref.Mounts(t.Context())
	if err != nil {
		return "", fmt.Errorf("result: %w", err)
	}
	v, err := snapshot.Open(mounts)
	if err != nil {
		return "", fmt.Errorf("result: %w", err)
	}
	defer v.Close()
	files := map[string]rune{"copy": rune(letters[0])}
	for _, letter := range letters {
		files[string(letter)] = letter
	}
	for name, letter := range files {
		data, err := os.ReadFile(filepath.Join(v.Path(), name))
		if err != nil {
			return "", fmt.Errorf("result: %w", err)
		}
		if !bytes.Equal(data, content(letter)) {
			t.Errorf("build of %s: /%s isn't what was written: %d bytes, %.10q...", letters, name, len(data), data)
		}
	}
	return ref.ID(), nil
}

// Whatever request of the disk fails, and however: a build that meets it says so;
// when the disk is whole again builds succeed, without a restart unless the file
// system has given up; what was stored is whole, or found damaged and repaired;
// and of what is whole nothing is lost that was told to be stored.
func TestDiskFails(t *testing.T) {
	needRoot(t)
	disk, err := faultdisk.New(t.TempDir())
	must(t, err)
	defer func() { must(t, disk.Close()) }()
	for _, f := range []faultdisk.Fault{
		{Times: 1, Errno: syscall.EIO}, {Errno: syscall.EIO, After: 1}, {Times: 1, Errno: syscall.ENOSPC, After: 2}, {Times: 2, Errno: faultdisk.Torn, After: 5},
	} {
		for failed := true; failed; f.After += 1 + f.After {
			r := failingRound{t: t, disk: disk, fault: f}
			failed = r.run()
		}
	}
}

type failingRound struct {
	t     *testing.T
	disk  *faultdisk.Disk
	fault faultdisk.Fault
}

// run builds with a fault. It reports whether there was one.
func (r *failingRound) run() bool {
	t := r.t
	root := filepath.Join(r.disk.Dir, "state")
	must(t, os.RemoveAll(root))
	cfg := Config{Root: root, GC: GC{Off: true}}
	w, err := New(t.Context(), cfg)
	must(t, err)
	before, err := buildChain(t, w, "ab")
	must(t, err)
	must(t, w.Store().Sync(t.Context()))

	must(t, r.disk.Fail(r.fault))
	_, err = buildChain(t, w, "abcd")
	serr := w.Store().Sync(t.Context())
	asked, failed, herr := r.disk.Heal()
	must(t, herr)
	t.Logf("%+v: %d of %d requests failed; build: %v; sync: %v", r.fault, failed, asked, err, serr)
	for _, err := range []error{err, serr} {
		if err != nil && !failsOfDisk(err) {
			t.Errorf("the error doesn't say that the disk fails: %v", err)
		}
	}
	// The kernel may have more to tell of what was lost: asked for now, it isn't told
	// of what is written next.
	if err := w.Store().Verify(t.Context()); err != nil && !failsOfDisk(err) {
		t.Errorf("the error doesn't say that the disk fails: %v", err)
	}
	since := w.Store().Mark()
	after, err := buildChain(t, w, "abcdef")
	if err == nil {
		err = w.Store().SyncSince(t.Context(), since)
	}
	stored := err == nil
	if err != nil && !errors.Is(err, syscall.EROFS) {
		t.Errorf("with the disk whole again: %v", err)
	}
	if cerr := w.Close(); cerr != nil && stored {
		t.Errorf("close: %v", cerr)
	}
	must(t, r.disk.Unmount())
	must(t, r.disk.Mount())
	// What ext4 had written but not yet put in its place may be lost as well; then
	// that is found, and repaired.
	sound := true
	if r := check(t, root, true); len(r.Problems) > 0 {
		t.Logf("afterwards: %s, %q", r, r.Problems)
		sound = false
		_, err := Repair(t.Context(), root, true)
		must(t, err)
	}
	if r := check(t, root, true); len(r.Problems) > 0 {
		t.Errorf("repaired: %s, %q", r, r.Problems)
	}
	if w, err = New(t.Context(), cfg); err != nil {
		t.Fatalf("start afterwards: %v", err)
	}
	for letters, want := range map[string]string{"ab": before, "abcd": "", "abcdef": after} {
		got, err := buildChain(t, w, letters)
		must(t, err)
		if want != "" && got != want && sound && (stored || want == before) {
			t.Errorf("%s was stored and isn't in the cache any more", letters)
		}
	}
	must(t, w.Close())
	if t.Failed() {
		t.Fatalf("%+v", r.fault)
	}
	return failed > 0
}

// failsOfDisk says whether err names what a failing disk does to calls.
func failsOfDisk(err error) bool {
	for _, text := range []string{"input/output error", "no space left", "read-only file system"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}
