package cache

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// read returns the bytes of a layer, checked against its descriptor.
func (e *env) read(r *Ref, l Layer) []byte {
	e.t.Helper()
	rc := get(r.OpenBlob(e.t.Context(), l.Blob))(e.t)
	data := get(io.ReadAll(rc))(e.t)
	must(e.t, rc.Close())
	if int64(len(data)) != l.Blob.Size || digest.FromBytes(data) != l.Blob.Digest {
		e.t.Errorf("blob %s has other bytes", l.Blob.Digest)
	}
	return data
}

// untar lists the entries of a compressed layer and checks its diff ID.
func (e *env) untar(r *Ref, l Layer) (names []string) {
	e.t.Helper()
	z := get(decompress(bytes.NewReader(e.read(r, l))))(e.t)
	defer z.Close()
	data := get(io.ReadAll(z))(e.t)
	if digest.FromBytes(data) != l.DiffID || l.Blob.Annotations[annotationDiffID] != l.DiffID.String() {
		e.t.Errorf("layer %s has another diff ID than %s", l.Blob.Digest, l.DiffID)
	}
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return names
		}
		must(e.t, err)
		names = append(names, h.Name)
	}
}

// compat: EXP-025
func TestLayersOfBuiltRecords(t *testing.T) {
	for _, kind := range []string{"gzip", "zstd", "uncompressed"} {
		t.Run(kind, func(t *testing.T) {
			e := newEnv(t)
			var first []Layer
			for range 2 { // the same layers give the same bytes
				a := e.layer(nil, Options{}, "a=1", "x=1")
				b := e.layer(a, Options{}, "b=2", "-a")
				empty := e.layer(b, Options{})
				a.Release()
				b.Release()
				if empty.ChainID() != "" {
					t.Error("chain ID of layers that were never packed")
				}
				layers := get(empty.Layers(t.Context(), Compression{Type: kind, OCI: true}))(t)
				if len(layers) != 3 || empty.ChainID() == "" {
					t.Fatalf("%d layers, chain ID %q", len(layers), empty.ChainID())
				}
				want := [][]string{{"a", "x"}, {".wh.a", "b"}, nil}
				for i, l := range layers {
					if got := e.untar(empty, l); !slices.Equal(got, want[i]) {
						t.Errorf("layer %d has %q, want %q", i, got, want[i])
					}
					if l.Blob.MediaType != (layerType{compression: kind}).mediaType(true) {
						t.Errorf("media type %s", l.Blob.MediaType)
					}
				}
				if first == nil {
					first = layers
				}
				for i := range layers {
					if layers[i].Blob.Digest != first[i].Blob.Digest {
						t.Errorf("layer %d: %s, before %s", i, layers[i].Blob.Digest, first[i].Blob.Digest)
					}
				}
				empty.Release()
				e.empty()
			}
		})
	}
}

// compat: EXP-026
// compat: EXP-130
func TestCompressionVariants(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	base := src.add(t, "gzip", tarOf(t, "base=0"))
	pulled := e.pull(src, base)
	r := e.layer(pulled, Options{}, "a=1")
	pulled.Release()

	gz := get(r.Layers(t.Context(), Compression{}))(t)
	zst := get(r.Layers(t.Context(), Compression{Type: "zstd", OCI: true}))(t)
	if gz[0].Blob.Digest != base.Blob.Digest || zst[0].Blob.Digest != base.Blob.Digest || zst[1].Blob.Digest != gz[1].Blob.Digest {
		t.Error("existing blobs were not used as they are")
	}
	if zst[1].Blob.MediaType != ocispec.MediaTypeImageLayerGzip || gz[1].Blob.MediaType != "application/vnd.docker.image.rootfs.diff.tar.gzip" {
		t.Errorf("media types %s, %s", zst[1].Blob.MediaType, gz[1].Blob.MediaType)
	}
	forced := get(r.Layers(t.Context(), Compression{Type: "zstd", OCI: true, Force: true}))(t)
	for i, l := range forced {
		if l.Blob.MediaType != ocispec.MediaTypeImageLayerZstd || l.DiffID != gz[i].DiffID {
			t.Errorf("forced layer %d: %+v", i, l)
		}
		if !bytes.HasPrefix(e.read(r, l), zstdMagic) {
			t.Errorf("forced layer %d isn't zstd", i)
		}
		e.untar(r, l)
	}
	e.persist(r)
	r.Release()
	e.restart()
	r = get(e.m.Get(t.Context(), r.ID()))(t)
	again := get(r.Layers(t.Context(), Compression{Type: "zstd", OCI: true}))(t)
	back := get(r.Layers(t.Context(), Compression{}))(t)
	for i := range again {
		if again[i].Blob.Digest != forced[i].Blob.Digest || back[i].Blob.Digest != gz[i].Blob.Digest {
			t.Errorf("layer %d: its variants were not found again", i)
		}
	}
	r.Release()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

// Asked at the same time, a blob is made once.
func TestLayersAreMadeOnce(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := r.Layers(t.Context(), Compression{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	e.m.mu.Lock()
	n := len(r.r.blobs)
	e.m.mu.Unlock()
	if n != 1 {
		t.Errorf("%d blobs", n)
	}
	r.Release()
	e.empty()
}

// A blob that disappeared is made again from the files.
func TestMissingBlobIsMadeAgain(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	l := get(r.Layers(t.Context(), Compression{}))(t)[0]
	e.persist(r)
	r.Release()
	e.close()
	must(t, os.Remove(filepath.Join(e.root, "blobs", "sha256", l.Blob.Digest.Encoded())))
	e.open()
	r = get(e.m.Get(t.Context(), r.ID()))(t)
	again := get(r.Layers(t.Context(), Compression{}))(t)[0]
	if again.Blob.Digest != l.Blob.Digest {
		t.Errorf("other bytes: %s, before %s", again.Blob.Digest, l.Blob.Digest)
	}
	e.read(r, again)
	r.Release()
}

// A blob made of files that changed behind our back is not exported as if
// nothing had happened.
func TestChangedFilesAreNoticed(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	get(r.Layers(t.Context(), Compression{}))(t)
	e.m.mu.Lock()
	path := filepath.Join(e.root, "snapshots", r.r.snap, "fs", "a")
	e.m.mu.Unlock()
	must(t, os.WriteFile(path, []byte("tampered"), 0o644))
	e.m.dropBlob(r.r.blobs[0].desc.Digest, errors.New("test"))
	_, err := r.Layers(t.Context(), Compression{})
	wantErr(t, err, ErrLost) // by its times, or by its diff ID if they are the same
	r.Release()
	e.empty()
}

func TestOpenBlobOfAnother(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	if _, err := r.OpenBlob(t.Context(), ocispec.Descriptor{Digest: digest.FromString("x")}); err == nil {
		t.Error("opened a blob that isn't a layer")
	}
	var scratch *Ref
	if _, err := scratch.OpenBlob(t.Context(), ocispec.Descriptor{Digest: digest.FromString("x")}); err == nil {
		t.Error("opened a blob of nothing")
	}
	r.Release()
}

// A record that a blob is shared with may go at any time.
func TestSharedBlobOutlivesOneOwner(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	one, two, top := src.add(t, "gzip", tarOf(t, "one=1")), src.add(t, "gzip", tarOf(t, "two=2")), src.add(t, "gzip", tarOf(t, "top=3"))
	a, b := e.pull(src, one, top), e.pull(src, two, top)
	must(t, a.Extract(t.Context()))
	must(t, b.Extract(t.Context()))
	if src.opens[top.Blob.Digest] != 1 {
		t.Errorf("a blob was fetched %d times", src.opens[top.Blob.Digest])
	}
	a.Release()
	e.read(b, top)
	b.Release()
	e.empty()
}

// Before bytes go where they can't be taken back from they are read once: those
// that an earlier process stored, and those of a file that isn't the same any
// more. A blob that is lost is made again.
func TestVerifyBlob(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"none":     nil,
		"deleted":  os.Remove,
		"cut":      func(path string) error { return os.Truncate(path, 3) },
		"bit flip": flip,
	} {
		for _, restart := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/restart %t", name, restart), func(t *testing.T) {
				testVerifyBlob(t, damage, restart)
			})
		}
	}
}

func testVerifyBlob(t *testing.T, damage func(path string) error, restart bool) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "f=content")
	e.persist(r)
	l := get(r.Layers(t.Context(), Compression{}))(t)[0]
	id := r.ID()
	if restart {
		r.Release()
		e.restart()
		r = get(e.m.Get(t.Context(), id))(t)
	}
	defer r.Release()
	path := filepath.Join(e.root, "blobs", "sha256", l.Blob.Digest.Encoded())
	if damage != nil {
		must(t, os.Chmod(path, 0o600))
		must(t, damage(path))
		wantErr(t, r.VerifyBlob(t.Context(), l.Blob), ErrLost)
	}
	again := get(r.Layers(t.Context(), Compression{}))(t)[0]
	if again.Blob.Digest != l.Blob.Digest {
		t.Errorf("the blob is another, %s", again.Blob.Digest)
	}
	verifies := func() bool {
		rc := get(r.OpenBlob(t.Context(), again.Blob))(t)
		defer rc.Close()
		return rc.(*blobReader).verifier != nil
	}
	must(t, r.VerifyBlob(t.Context(), again.Blob))
	if verifies() {
		t.Error("it is verified once more")
	}
	e.m.mu.Lock()
	p := e.m.proven[again.Blob.Digest]
	p.at = p.at.Add(-proofAge)
	e.m.proven[again.Blob.Digest] = p
	e.m.mu.Unlock()
	if !verifies() {
		t.Error("it isn't verified though the last time is long ago")
	}
	must(t, r.VerifyBlob(t.Context(), again.Blob))
	if verifies() {
		t.Error("it is verified once more")
	}
	if err := r.Lost(); err != nil {
		t.Errorf("the record is lost: %v", err)
	}
}

// flip changes one byte in place. The file's time of change is what a proof goes
// by, and kernels before 6.13 take it from a clock that ticks every few
// milliseconds: a write right after the blob was stored is one that they leave no
// trace of (snapshot.FileVersion says why that is borne). A test that damages what
// it has just made writes until the time is another one.
func flip(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, err := os.Stat(path)
	if err != nil {
		return err
	}
	data[len(data)/2] ^= 1
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			return err
		}
		after, err := os.Stat(path)
		if err != nil {
			return err
		}
		if changed(after) != changed(before) {
			return nil
		}
	}
	return fmt.Errorf("%s was written and its time of change stays %v", path, changed(before))
}

func changed(fi os.FileInfo) syscall.Timespec { return fi.Sys().(*syscall.Stat_t).Ctim }

// A stored blob that was damaged, anywhere, is lost when it is to be converted,
// and made again from the files the next time.
func TestConvertDamagedBlob(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	gz := get(r.Layers(t.Context(), Compression{}))(t)[0]
	size := int(gz.Blob.Size)
	for _, at := range []int{0, 12, size / 2, size - 6, size - 1} {
		path := filepath.Join(e.root, "blobs", "sha256", gz.Blob.Digest.Encoded())
		data := get(os.ReadFile(path))(t)
		data[at] ^= 0x40
		must(t, os.Chmod(path, 0o600))
		must(t, os.WriteFile(path, data, 0o600))
		e.m.mu.Lock()
		clear(e.m.proven)
		e.m.mu.Unlock()
		force := Compression{Type: "zstd", OCI: true, Force: true}
		_, err := r.Layers(t.Context(), force)
		wantErr(t, err, ErrLost, gz.Blob.Digest.String())
		for _, l := range get(r.Layers(t.Context(), force))(t) {
			e.untar(r, l)
			e.m.dropBlob(l.Blob.Digest, errors.New("test"))
		}
		if again := get(r.Layers(t.Context(), Compression{}))(t)[0]; again.Blob.Digest != gz.Blob.Digest {
			t.Fatalf("made as %s again, was %s", again.Blob.Digest, gz.Blob.Digest)
		}
	}
	r.Release()
	e.empty()
}

// Files that aren't what their layer was made of are of no use to those that
// stand on them either.
func TestFilesOfAnotherLayer(t *testing.T) {
	e := newEnv(t)
	r := e.layer(nil, Options{}, "a=1")
	top := e.layer(r, Options{}, "b=1")
	gz := get(r.Layers(t.Context(), Compression{}))(t)[0]
	e.m.mu.Lock()
	path := filepath.Join(e.root, "snapshots", r.r.snap, "fs", "a")
	e.m.mu.Unlock()
	st := get(os.Stat(path))(t)
	must(t, os.WriteFile(path, []byte("2"), 0o644))
	must(t, os.Chtimes(path, st.ModTime(), st.ModTime())) // as if nothing had happened
	e.m.dropBlob(gz.Blob.Digest, errors.New("test"))
	_, err := r.Layers(t.Context(), Compression{})
	wantErr(t, err, ErrLost, "no longer give the diff ID")
	for _, ref := range []*Ref{r, top} {
		_, err := ref.Mounts(t.Context())
		wantErr(t, err, ErrLost)
		wantErr(t, ref.Whole(), ErrLost)
		ref.Release()
	}
	e.empty()
}
