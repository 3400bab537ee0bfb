package contenthash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// ask is the digest of p without options.
func ask(t testing.TB, rec record, p string) string {
	t.Helper()
	d, err := checksum(context.Background(), rec, p, Options{})
	if err != nil {
		t.Fatalf("%s: %v", p, err)
	}
	return string(d)
}

func recordAll(t testing.TB, rec *fakeRecord, entries []specEntry) {
	t.Helper()
	(&specTree{Entries: entries}).record(t, rec)
}

const (
	modeDir  = 0o040755
	modeFile = 0o100644
	modeLink = 0o120777
)

// What is recorded in several sessions, in any order, by several goroutines,
// has the digests of the same tree recorded at once.
func TestRecorderModel(t *testing.T) {
	for seed := range int64(50) {
		r := rand.New(rand.NewSource(seed))
		rec := newRecord(t, "")
		model := map[string]specEntry{}
		for range 4 {
			rr, err := newRecorder(rec)
			if err != nil {
				t.Fatal(err)
			}
			for range 30 {
				mutateModel(r, model, rr, t)
			}
			if err := rr.save(rec); err != nil {
				t.Fatal(err)
			}
			fresh := newRecord(t, "")
			recordAll(t, fresh, sorted(model))
			for _, p := range []string{"/", "/a", "/a/b", "/c"} {
				got, gotErr := checksum(context.Background(), rec, p, Options{})
				want, wantErr := checksum(context.Background(), fresh, p, Options{})
				if got != want || (gotErr == nil) != (wantErr == nil) {
					t.Fatalf("seed %d, %s: %s, %v, want %s, %v", seed, p, got, gotErr, want, wantErr)
				}
			}
		}
		if rec.opens != 0 {
			t.Errorf("seed %d: files were read", seed)
		}
	}
}

func mutateModel(r *rand.Rand, model map[string]specEntry, rr *Recorder, t *testing.T) {
	var dirs []string
	for p, e := range model {
		if e.Mode == modeDir && strings.Count(p, "/") < 3 {
			dirs = append(dirs, p)
		}
	}
	dirs = append(dirs, "")
	slices.Sort(dirs)
	p := filepath.Join(dirs[r.Intn(len(dirs))], []string{"a", "b", "c", "d"}[r.Intn(4)])
	drop := func(self bool) {
		for q := range model {
			if strings.HasPrefix(q, p+"/") || self && q == p {
				delete(model, q)
			}
		}
	}
	if r.Intn(4) == 0 {
		drop(true)
		rr.Remove(p)
		return
	}
	e := specEntry{Path: p, Mode: []uint32{modeDir, modeFile, modeLink}[r.Intn(3)], UID: uint32(r.Intn(3))}
	switch e.Mode {
	case modeFile:
		e.Data = fmt.Sprint(r.Intn(100))
	case modeLink:
		e.Link = "x"
	}
	if e.Mode != modeDir {
		drop(true)
	}
	model[p] = e
	rr.Set(e.entry(t))
}

func sorted(model map[string]specEntry) []specEntry {
	var out []specEntry
	for _, e := range model {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b specEntry) int { return strings.Compare(a.Path, b.Path) })
	return out
}

func TestRecorderTellsWhatItHas(t *testing.T) {
	rec := newRecord(t, "")
	r, err := newRecorder(rec)
	if err != nil {
		t.Fatal(err)
	}
	entries := []specEntry{
		{Path: "d", Mode: modeDir},
		{Path: "d/f", Mode: modeFile, Data: "x", UID: 3, GID: 4, Xattrs: map[string]string{"user.a": "1"}},
		{Path: "d.x", Mode: modeFile},
		{Path: "dev", Mode: 0o020600, Major: 5, Minor: 7},
		{Path: "h", Mode: modeFile, Link: "d/f"},
		{Path: "l", Mode: modeLink, Link: "d"},
	}
	var want []Entry
	for i, e := range entries {
		en := e.entry(t)
		en.ModTime = time.Unix(int64(i), int64(i)).UnixNano()
		r.Set(en)
		want = append(want, en)
	}
	want[4].Digest = want[1].Digest // of the file it is a name of
	if err := r.save(rec); err != nil {
		t.Fatal(err)
	}
	if err := r.save(rec); err == nil {
		t.Error("a spent recorder can be saved")
	}
	if r, err = newRecorder(rec); err != nil {
		t.Fatal(err)
	}
	var got []Entry
	for e := range r.All() {
		got = append(got, e)
	}
	// A directory comes before what is in it, and that before names that go on
	// with a byte below the slash.
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
	for _, e := range want {
		if got, ok := r.Lookup("/" + e.Path); !ok || !reflect.DeepEqual(got, e) {
			t.Errorf("%s: %+v, %v", e.Path, got, ok)
		}
	}
	for _, p := range []string{"", "/", "x", "d/f/x", "d/g", "l/f"} {
		if e, ok := r.Lookup(p); ok {
			t.Errorf("%q: %+v", p, e)
		}
	}
	for range r.All() {
		break // an iteration may end early
	}
	if data, ok := rec.Metadata(metadataKey); ok && len(data) > 0 {
		t.Error("what is stored isn't withdrawn while a recorder is at work")
	}
}

// mtime is kept and never enters a digest.
func TestRecorderModTime(t *testing.T) {
	digests := map[string]bool{}
	for i := range int64(2) {
		rec := newRecord(t, "")
		r, err := newRecorder(rec)
		if err != nil {
			t.Fatal(err)
		}
		e := (&specEntry{Path: "f", Mode: modeFile, Data: "x"}).entry(t)
		e.ModTime = i
		r.Set(e)
		if err := r.save(rec); err != nil {
			t.Fatal(err)
		}
		digests[ask(t, rec, "/")] = true
	}
	if len(digests) != 1 {
		t.Errorf("%v", digests)
	}
}

func TestRecorderConcurrent(t *testing.T) {
	rec := newRecord(t, "")
	r, err := newRecorder(rec)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var entries []specEntry
	for i := range 8 {
		var mine []specEntry
		mine = append(mine, specEntry{Path: fmt.Sprint("d", i), Mode: modeDir})
		for j := range 100 {
			mine = append(mine, specEntry{Path: fmt.Sprintf("d%d/%d", i, j), Mode: modeFile, Data: fmt.Sprint(j)})
		}
		entries = append(entries, mine...)
		wg.Go(func() {
			for _, e := range mine {
				r.Set(e.entry(t))
				r.Lookup(e.Path)
			}
		})
	}
	wg.Wait()
	if err := r.save(rec); err != nil {
		t.Fatal(err)
	}
	one := newRecord(t, "")
	recordAll(t, one, entries)
	if got, want := ask(t, rec, "/"), ask(t, one, "/"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A file that came without a digest, or below a directory that didn't come, is
// read; with the root's own header as recorded.
func TestRecorderReadsWhatDidNotCome(t *testing.T) {
	tree := specTree{RootMode: 0o755, Entries: []specEntry{{Path: "d", Mode: modeDir}, {Path: "d/f", Mode: modeFile, Data: "x"}, {Path: "d/g", Mode: modeFile, Data: "y"}}}
	dir := tree.build(t)
	all := newRecord(t, "")
	recordAll(t, all, tree.Entries)

	rec := newRecord(t, dir)
	r, err := newRecorder(rec)
	if err != nil {
		t.Fatal(err)
	}
	e := tree.Entries[1].entry(t)
	e.Digest = ""
	r.Set(e)
	if err := r.save(rec); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/d", "/d/f", "/d/g", "/"} {
		if got, want := ask(t, rec, p), ask(t, all, p); got != want {
			t.Errorf("%s: got %s, want %s", p, got, want)
		}
	}
}

func TestChecksumShared(t *testing.T) {
	tree := specTree{RootMode: 0o755}
	for i := range 20 {
		d := fmt.Sprint("d", i)
		tree.Entries = append(tree.Entries, specEntry{Path: d, Mode: modeDir})
		for j := range 100 {
			tree.Entries = append(tree.Entries, specEntry{Path: fmt.Sprintf("%s/%d", d, j), Mode: modeFile, Data: strings.Repeat("x", i*j)})
		}
	}
	dir := tree.build(t)
	want := ask(t, newRecord(t, dir), "/")
	rec := newRecord(t, dir)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			if i%2 == 0 {
				if got := ask(t, rec, "/"); got != want {
					t.Errorf("got %s, want %s", got, want)
				}
				return
			}
			if _, err := checksum(context.Background(), rec, fmt.Sprintf("/d%d/*", i), Options{Wildcard: true}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// A call that waits for another's scan leaves when its context ends.
func TestChecksumCancelled(t *testing.T) {
	rec := newRecord(t, (&specTree{RootMode: 0o755}).build(t))
	tr := shared.tree(rec.ID())
	if err := tr.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer tr.release()
	stop := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if _, err := checksum(ctx, rec, "/", Options{}); !errors.Is(err, stop) {
		t.Errorf("error %v", err)
	}
}

// An error is never a digest, and isn't remembered as one.
func TestChecksumErrors(t *testing.T) {
	dir := (&specTree{RootMode: 0o755, Entries: []specEntry{{Path: "d", Mode: modeDir}, {Path: "d/f", Mode: modeFile, Data: "x"}, {Path: "d/g", Mode: modeFile, Data: "y"}}}).build(t)
	rec := newRecord(t, "")
	for _, opts := range []Options{{}, {Wildcard: true}, {ExcludePatterns: []string{"x"}}} {
		if d, err := checksum(t.Context(), rec, "/d", opts); err == nil || d != "" {
			t.Errorf("%+v: %q, %v", opts, d, err)
		}
	}
	want := ask(t, newRecord(t, dir), "/")
	rec.dir = dir
	if err := os.Rename(filepath.Join(dir, "d/g"), filepath.Join(dir, "d/h")); err != nil {
		t.Fatal(err)
	}
	tr := shared.tree(rec.ID())
	s := &scanner{ctx: t.Context(), rec: rec, tree: tr}
	if err := s.list(tr.root, ""); err != nil {
		t.Fatal(err)
	}
	d := tr.root.child("d")
	d.listed, d.children = true, []*node{{name: "f"}, {name: "g"}} // g is gone
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if got, err := checksum(t.Context(), rec, "/", Options{}); !errors.Is(err, fs.ErrNotExist) || got != "" {
		t.Errorf("%q, %v", got, err)
	}
	if err := os.Rename(filepath.Join(dir, "d/h"), filepath.Join(dir, "d/g")); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, rec, "/"); got != want {
		t.Errorf("after the error: %s, want %s", got, want)
	}
}

func TestChecksumScratch(t *testing.T) {
	if d, err := Checksum(t.Context(), nil, "/", Options{}); err != nil || d != "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" {
		t.Errorf("%s, %v", d, err)
	}
	if _, err := Checksum(t.Context(), nil, "/x", Options{}); !errors.Is(err, fs.ErrNotExist) || err.Error() != "/x: no such file or directory" {
		t.Errorf("%v", err)
	}
}

// Damaged or foreign data beside the record is as none.
func TestStoredFormDamaged(t *testing.T) {
	dir := (&specTree{RootMode: 0o755, Entries: []specEntry{{Path: "d", Mode: modeDir}, {Path: "d/f", Mode: modeFile, Data: "x"}}}).build(t)
	rec := newRecord(t, dir)
	want := ask(t, rec, "/")
	good, _ := rec.Metadata(metadataKey)
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 0x40
		rec.SetMetadata(metadataKey, bad)
		if got := ask(t, rec, "/"); got != want {
			t.Fatalf("byte %d: got %s, want %s", i, got, want)
		}
		rec.SetMetadata(metadataKey, good[:i])
		if got := ask(t, rec, "/"); got != want {
			t.Fatalf("cut at %d: got %s, want %s", i, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, tree := range golden(f)[:12] {
		rec := newRecord(f, "")
		if !tree.Recorded {
			tree.record(f, rec)
			data, _ := rec.Metadata(metadataKey)
			f.Add(data[len(stamp{}):])
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		root, nodes, err := decodeBody(body)
		if err != nil {
			return
		}
		again, n := encode(root)
		if n != nodes {
			t.Fatalf("%d nodes, then %d", nodes, n)
		}
		back, _, err := decode(again)
		if err != nil || !reflect.DeepEqual(back, root) {
			t.Fatalf("it doesn't come back the same: %v", err)
		}
	})
}

// The forest keeps to its bound, and a tree that was dropped is read again.
func TestForestTrims(t *testing.T) {
	f := newForest()
	for i := range 10 {
		id := fmt.Sprint(i)
		f.weigh(f.tree(id), maxNodes/4)
	}
	if len(f.trees) != 4 || f.order.Len() != 4 || f.total != maxNodes {
		t.Errorf("%d trees of %d nodes", len(f.trees), f.total)
	}
	f.weigh(f.tree("big"), 3*maxNodes)
	if len(f.trees) != 1 || f.total != 3*maxNodes {
		t.Errorf("%d trees of %d nodes beside a big one", len(f.trees), f.total)
	}
	f.forget("big")
	if len(f.trees) != 0 || f.total != 0 {
		t.Errorf("%d trees of %d nodes after all is forgotten", len(f.trees), f.total)
	}

	f = newForest()
	for i := range 2 * maxTrees {
		f.tree(fmt.Sprint(i))
	}
	if _, oldest := f.trees[fmt.Sprint(maxTrees)]; len(f.trees) != maxTrees || f.order.Len() != maxTrees || !oldest {
		t.Errorf("the forest holds %d trees in a list of %d, with the bound at %d; the oldest that fits is there: %v", len(f.trees), f.order.Len(), maxTrees, oldest)
	}
}

func benchTree(b *testing.B, files int) string {
	dir := b.TempDir()
	for i := range files {
		d := filepath.Join(dir, fmt.Sprint(i/100))
		if i%100 == 0 {
			if err := os.Mkdir(d, 0o755); err != nil {
				b.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprint(i)), []byte(strings.Repeat("x", 1000)), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

func BenchmarkChecksum(b *testing.B) {
	for _, files := range []int{20_000, 100_000} {
		dir := benchTree(b, files)
		warm := newRecord(b, dir)
		ask(b, warm, "/")
		run := func(name string, fn func()) {
			b.Run(fmt.Sprintf("%d/%s", files, name), func(b *testing.B) {
				for range b.N {
					fn()
				}
			})
		}
		run("cold", func() { ask(b, newRecord(b, dir), "/") })
		run("stored", func() { shared.forget(warm.id); ask(b, warm, "/") })
		run("known", func() { ask(b, warm, "/") })
		run("patterns", func() {
			shared.tree(warm.id).answers = nil
			if _, err := checksum(context.Background(), warm, "/", Options{ExcludePatterns: []string{"**/7*", "x/y"}}); err != nil {
				b.Fatal(err)
			}
		})
	}
}
