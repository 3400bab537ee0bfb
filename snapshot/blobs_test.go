package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func openBlobs(t testing.TB, root string, db *store.DB) *snapshot.Blobs {
	t.Helper()
	b, err := snapshot.NewBlobs(root, db)
	must(t, err)
	return b
}

func newBlobs(t testing.TB) (b *snapshot.Blobs, db *store.DB, root string) {
	t.Helper()
	root = t.TempDir()
	db = snapshottest.OpenDB(t, root)
	return openBlobs(t, root, db), db, root
}

func addBlob(t testing.TB, b *snapshot.Blobs, data string) digest.Digest {
	t.Helper()
	w, err := b.Create()
	must(t, err)
	_, err = io.WriteString(w, data)
	must(t, err)
	info, err := w.Commit(int64(len(data)), digest.FromString(data))
	must(t, err)
	must(t, w.Close())
	return info.Digest
}

func readBlob(t testing.TB, b *snapshot.Blobs, dgst digest.Digest) string {
	t.Helper()
	data, err := content.ReadBlob(t.Context(), b, ocispec.Descriptor{Digest: dgst})
	must(t, err)
	return string(data)
}

func TestBlobWriter(t *testing.T) {
	b, _, root := newBlobs(t)
	// Pieces of all sizes, around those of the buffer.
	var want bytes.Buffer
	w, err := b.Create()
	must(t, err)
	for i, n := range []int{0, 1, 511, 1 << 16, 256 << 10, 3, 256<<10 - 4, 256<<10 + 1, 100, 1 << 20, 7} {
		piece := bytes.Repeat([]byte{byte('a' + i)}, n)
		want.Write(piece)
		if m, err := w.Write(piece); m != n || err != nil {
			t.Fatalf("Write(%d) = %d, %v", n, m, err)
		}
	}
	piece := strings.Repeat("from a reader", 100000)
	want.WriteString(piece)
	if n, err := io.Copy(w, struct{ io.Reader }{strings.NewReader(piece)}); n != int64(len(piece)) || err != nil {
		t.Fatalf("copied %d, %v", n, err)
	}
	dgst := digest.FromBytes(want.Bytes())
	if w.Size() != int64(want.Len()) {
		t.Errorf("size %d, want %d", w.Size(), want.Len())
	}
	if _, err := b.Stat(dgst); !errors.Is(err, snapshot.ErrNotFound) || !errdefs.IsNotFound(err) {
		t.Errorf("before the commit: %v", err)
	}
	info, err := w.Commit(0, "")
	must(t, err)
	if info.Digest != dgst || info.Size != int64(want.Len()) || info.Disk < info.Size || info.Disk > info.Size+64<<10 {
		t.Errorf("committed %+v, want %s", info, dgst)
	}
	must(t, w.Close())
	if got := readBlob(t, b, dgst); got != want.String() {
		t.Error("the blob holds something else")
	}
	if stat, err := b.Stat(dgst); err != nil || stat != info {
		t.Errorf("Stat = %+v, %v", stat, err)
	}
	if left := names(t, root+"/ingest"); left != nil {
		t.Errorf("ingests left: %v", left)
	}
	if _, err := w.Write([]byte("x")); err == nil {
		t.Error("Write after Commit succeeds")
	}
	if _, err := w.Commit(0, ""); err == nil {
		t.Error("a second Commit succeeds")
	}
}

func TestBlobCommitChecks(t *testing.T) {
	b, _, root := newBlobs(t)
	good := digest.FromString("data")
	for name, c := range map[string]struct {
		size     int64
		expected digest.Digest
		want     []string
	}{
		"size":            {5, good, []string{"4 bytes", "expected are 5"}},
		"digest":          {4, digest.FromString("x"), []string{good.String(), digest.FromString("x").String()}},
		"other algorithm": {4, digest.SHA512.FromString("x"), []string{digest.SHA512.FromString("data").String()}},
		"no digest":       {4, "sha512:../../x", []string{"invalid"}},
		"no algorithm":    {4, "md5:d41d8cd98f00b204e9800998ecf8427e", []string{"unsupported"}},
	} {
		w, err := b.Create()
		must(t, err)
		_, err = w.Write([]byte("data"))
		must(t, err)
		_, err = w.Commit(c.size, c.expected)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, want one with %q", name, err, want)
			}
		}
		must(t, w.Close())
		must(t, w.Close())
	}
	must(t, b.Walk(func(i snapshot.BlobInfo) error { return fmt.Errorf("%s was stored", i.Digest) }))
	if left := names(t, root+"/ingest"); left != nil {
		t.Errorf("ingests left: %v", left)
	}
	w, err := b.Create()
	must(t, err)
	_, err = w.Write([]byte("data"))
	must(t, err)
	_, err = w.Commit(4, digest.SHA512.FromString("data"))
	must(t, err)
	if got := readBlob(t, b, digest.SHA512.FromString("data")); got != "data" {
		t.Errorf("by another digest it holds %q", got)
	}
}

func TestBlobDigestsAreChecked(t *testing.T) {
	b, _, root := newBlobs(t)
	writeFile(t, root+"/outside", "x")
	for _, d := range []digest.Digest{"", "x", "sha256:../../outside", "sha256:abc", "../outside:abc"} {
		if _, err := b.Stat(d); err == nil || errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("Stat(%q): %v", d, err)
		}
		if _, err := b.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d}); err == nil {
			t.Errorf("ReaderAt(%q) succeeds", d)
		}
		if err := b.Remove(&store.Batch{}, d); err == nil {
			t.Errorf("Remove(%q) succeeds", d)
		}
		if err := b.Persist(&store.Batch{}, d); err == nil {
			t.Errorf("Persist(%q) succeeds", d)
		}
	}
}

func TestBlobRemove(t *testing.T) {
	b, db, _ := newBlobs(t)
	ctx := t.Context()
	x, y := addBlob(t, b, "x"), addBlob(t, b, "y")
	reader, err := b.ReaderAt(ctx, ocispec.Descriptor{Digest: x})
	must(t, err)
	defer reader.Close()
	batch := &store.Batch{}
	must(t, b.Persist(batch, x))
	must(t, b.Persist(batch, y))
	db.Write(batch)

	batch = &store.Batch{}
	must(t, b.Remove(batch, x))
	must(t, b.Remove(batch, y))
	must(t, b.Remove(batch, digest.FromString("missing")))
	for _, d := range []digest.Digest{x, y} {
		if _, err := b.Stat(d); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("Stat after Remove: %v", err)
		}
		if _, err := b.ReaderAt(ctx, ocispec.Descriptor{Digest: d}); !errdefs.IsNotFound(err) {
			t.Errorf("ReaderAt after Remove: %v", err)
		}
		if err := b.Persist(&store.Batch{}, d); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("Persist after Remove: %v", err)
		}
	}
	// y comes back before the removal is durable, and must stay.
	addBlob(t, b, "y")
	db.Write(batch)
	must(t, db.Sync(ctx))
	if got := readBlob(t, b, y); got != "y" {
		t.Errorf("y holds %q", got)
	}
	if _, err := b.Stat(x); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("x: %v", err)
	}
	buf := make([]byte, 1)
	if _, err := reader.ReadAt(buf, 0); err != nil || string(buf) != "x" {
		t.Errorf("an open reader: %q, %v", buf, err)
	}
	addBlob(t, b, "x") // and again
	if got := readBlob(t, b, x); got != "x" {
		t.Errorf("x holds %q", got)
	}
}

func TestBlobSweep(t *testing.T) {
	b, db, root := newBlobs(t)
	kept, lost := addBlob(t, b, "kept"), addBlob(t, b, "lost")
	cut, gone := addBlob(t, b, "cut"), addBlob(t, b, "gone")
	w, err := b.Create()
	must(t, err)
	_, err = w.Write(make([]byte, 1<<20))
	must(t, err)
	writeFile(t, root+"/blobs/sha256/stray", "")
	batch := &store.Batch{}
	for _, d := range []digest.Digest{kept, cut, gone} {
		must(t, b.Persist(batch, d))
	}
	db.Write(batch)
	must(t, os.Truncate(filepath.Join(root, "blobs/sha256", cut.Encoded()), 1))
	must(t, os.Remove(filepath.Join(root, "blobs/sha256", gone.Encoded())))

	b = openBlobs(t, root, db)
	n, err := b.Sweep(t.Context())
	must(t, err)
	if errs := b.Check(t.Context(), true); len(errs) > 0 {
		t.Errorf("Check: %v", errs)
	}
	if n != 4 {
		t.Errorf("swept %d", n)
	}
	var left []digest.Digest
	must(t, b.Walk(func(i snapshot.BlobInfo) error { left = append(left, i.Digest); return nil }))
	if !slices.Equal(left, []digest.Digest{kept}) {
		t.Errorf("left: %v", left)
	}
	if _, err := b.Stat(lost); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("lost: %v", err)
	}
	if got := append(names(t, root+"/ingest"), names(t, root+"/blobs/sha256")...); len(got) != 1 {
		t.Errorf("files left: %v", got)
	}
	stop := errors.New("stop")
	if err := b.Walk(func(snapshot.BlobInfo) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("Walk = %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if _, err := b.Sweep(ctx); !errors.Is(err, stop) {
		t.Errorf("a cancelled sweep: %v", err)
	}
}

func TestBlobCheck(t *testing.T) {
	b, db, root := newBlobs(t)
	var digests []digest.Digest
	batch := &store.Batch{}
	for _, data := range []string{"good", "gone", "cut", "rotten"} {
		d := addBlob(t, b, data)
		digests = append(digests, d)
		must(t, b.Persist(batch, d))
	}
	db.Write(batch)
	if errs := b.Check(t.Context(), true); errs != nil {
		t.Fatalf("a good store: %v", errs)
	}
	path := func(i int) string { return filepath.Join(root, "blobs/sha256", digests[i].Encoded()) }
	must(t, os.Remove(path(1)))
	must(t, os.Truncate(path(2), 1))
	writeFile(t, path(3), "Rotten")
	fresh := addBlob(t, b, "fresh")
	writeFile(t, root+"/blobs/sha256/stray", "")
	has := func(errs []error, d digest.Digest, text string) {
		t.Helper()
		for _, err := range errs {
			if strings.Contains(err.Error(), d.Encoded()) && strings.Contains(err.Error(), text) {
				return
			}
		}
		t.Errorf("nothing about %q of %s in %v", text, d, errs)
	}
	for _, deep := range []bool{false, true} {
		errs := b.Check(t.Context(), deep)
		has(errs, digests[1], "record without a file")
		has(errs, digests[2], "has 1 bytes, and 3 in its record")
		has(errs, fresh, "has no record")
		if want := map[bool]int{false: 4, true: 6}[deep]; len(errs) != want {
			t.Errorf("deep %v: %d errors: %v", deep, len(errs), errs)
		}
		if deep {
			has(errs, digests[3], "has content with the digest")
		}
	}
	damaged, err := b.Damaged(t.Context())
	must(t, err)
	slices.Sort(damaged)
	want := []digest.Digest{digests[2], digests[3]}
	slices.Sort(want)
	if !slices.Equal(damaged, want) {
		t.Errorf("damaged: %v, want %v", damaged, want)
	}
}

func TestBlobsAsContentStore(t *testing.T) {
	b, _, root := newBlobs(t)
	ctx := t.Context()
	data := strings.Repeat("layer", 1<<18)
	desc := ocispec.Descriptor{Digest: digest.FromString(data), Size: int64(len(data))}
	open := func() content.Writer {
		t.Helper()
		w, err := content.OpenWriter(ctx, b, content.WithRef("ref"), content.WithDescriptor(desc))
		must(t, err)
		return w
	}
	// Two at once, of the same blob and ref.
	one, two := open(), open()
	must(t, content.Copy(ctx, one, strings.NewReader(data), desc.Size, desc.Digest))
	_, err := io.WriteString(two, data[:1000])
	must(t, err)
	status, err := two.Status()
	must(t, err)
	if status.Offset != 1000 || status.Ref != "ref" || status.Total != desc.Size || status.Expected != desc.Digest || status.StartedAt.IsZero() {
		t.Errorf("status %+v", status)
	}
	if two.Digest() != digest.FromString(data[:1000]) {
		t.Errorf("digest %s", two.Digest())
	}
	// Copying into it again starts where the reader does.
	must(t, content.Copy(ctx, two, strings.NewReader(data), desc.Size, desc.Digest))
	if one.Digest() != desc.Digest || two.Digest() != desc.Digest {
		t.Error("the writers' digests differ")
	}
	must(t, one.Close())
	must(t, two.Close())

	if _, err := b.Writer(ctx, content.WithDescriptor(desc)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a writer for what is there: %v", err)
	}
	must(t, content.WriteBlob(ctx, b, "again", strings.NewReader(data), desc))
	info, err := b.Info(ctx, desc.Digest)
	must(t, err)
	if info.Size != desc.Size || info.Digest != desc.Digest || info.CreatedAt.IsZero() {
		t.Errorf("info %+v", info)
	}
	r, err := b.ReaderAt(ctx, desc)
	must(t, err)
	if r.Size() != desc.Size {
		t.Errorf("reader's size %d", r.Size())
	}
	got, err := io.ReadAll(io.NewSectionReader(r, 5, 10))
	if string(got) != "layerlayer" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	must(t, r.Close())

	for _, fn := range []func() error{
		func() error { _, err := b.Info(ctx, digest.FromString("none")); return err },
		func() error {
			_, err := b.ReaderAt(ctx, ocispec.Descriptor{Digest: digest.FromString("none")})
			return err
		},
	} {
		if err := fn(); !errdefs.IsNotFound(err) || !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("no such blob: %v", err)
		}
	}

	// A wrong blob is refused, and its ingest goes.
	desc.Digest = digest.FromString("else")
	w := open()
	if err := content.Copy(ctx, w, strings.NewReader(data), desc.Size, desc.Digest); err == nil {
		t.Error("a wrong digest was accepted")
	}
	must(t, w.Close())
	if left := names(t, root+"/ingest"); left != nil {
		t.Errorf("ingests left: %v", left)
	}
}

func TestBlobTruncate(t *testing.T) {
	b, _, _ := newBlobs(t)
	w, err := b.Writer(t.Context())
	must(t, err)
	defer w.Close()
	_, err = io.WriteString(w, strings.Repeat("x", 1<<20))
	must(t, err)
	must(t, w.Truncate(1000))
	_, err = io.WriteString(w, "end")
	must(t, err)
	if err := w.Truncate(5000); !errdefs.IsInvalidArgument(err) {
		t.Errorf("truncating to more: %v", err)
	}
	want := strings.Repeat("x", 1000) + "end"
	must(t, w.Commit(t.Context(), 0, digest.FromString(want)))
	if err := w.Truncate(0); err == nil {
		t.Error("truncated after the commit")
	}
	if got := readBlob(t, b, w.Digest()); got != want {
		t.Errorf("it holds %d bytes", len(got))
	}
}

// Storing and removing the same blob at the same time: it is there, whole, or
// not there, and at the end as the last of them left it.
func TestBlobsConcurrently(t *testing.T) {
	b, db, root := newBlobs(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 50 {
				data := strings.Repeat(fmt.Sprint(i%3), 1000)
				d := addBlob(t, b, data)
				if r, err := b.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d}); err == nil {
					got, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
					if string(got) != data || err != nil {
						t.Errorf("read %d bytes, %v", len(got), err)
					}
					must(t, r.Close())
				} else if !errors.Is(err, snapshot.ErrNotFound) {
					t.Error(err)
				}
				if i%5 == 0 {
					batch := &store.Batch{}
					must(t, b.Remove(batch, d))
					db.Write(batch)
				}
			}
		})
	}
	wg.Wait()
	must(t, db.Sync(t.Context()))
	for i := range 3 {
		addBlob(t, b, strings.Repeat(fmt.Sprint(i), 1000))
	}
	if got := append(names(t, root+"/ingest"), names(t, root+"/blobs/sha256")...); len(got) != 3 {
		t.Errorf("files left: %v", got)
	}
}

func BenchmarkBlobWrite(b *testing.B) {
	blobs, _, _ := newBlobs(b)
	data := make([]byte, 32<<10)
	b.SetBytes(64 << 20)
	for b.Loop() {
		w, err := blobs.Create()
		must(b, err)
		for range 64 << 20 / len(data) {
			if _, err := w.Write(data); err != nil {
				b.Fatal(err)
			}
		}
		must(b, w.Close())
	}
}

func BenchmarkBlobSmall(b *testing.B) {
	blobs, _, _ := newBlobs(b)
	i := 0
	for b.Loop() {
		i++
		addBlob(b, blobs, fmt.Sprint("manifest ", i))
	}
}
