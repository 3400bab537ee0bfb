package cache

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func threeLayers(t testing.TB, src *memSource) []Layer {
	return []Layer{
		src.add(t, "gzip", tarOf(t, "a=1", "dir/b=2")),
		src.add(t, "zstd", tarOf(t, "c=3", "-a")),
		src.add(t, "uncompressed", tarOf(t, "d=4")),
	}
}

// compat: CTL-072
func TestExtract(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layers := threeLayers(t, src)
	r := e.pull(src, layers...)
	if src.count() != 0 {
		t.Error("something was fetched before it was needed")
	}
	if r.ChainID() == "" {
		t.Error("the chain ID is unknown")
	}
	var seen statuses
	must(t, r.Extract(seen.in(t.Context())))
	e.wantFiles(r, "c=3", "d=4", "dir/b=2")
	if src.count() != 3 {
		t.Errorf("%d fetches", src.count())
	}
	for _, l := range layers {
		s := seen.last[l.Blob.Digest.String()]
		if s.Current != l.Blob.Size || s.Total != l.Blob.Size || s.Started == nil || s.Completed == nil || s.Vertex != "sha256:v" {
			t.Errorf("status of %s: %+v", l.Blob.Digest, s)
		}
		if s := seen.last["extracting "+l.Blob.Digest.String()]; s.Completed == nil {
			t.Errorf("extracting %s isn't complete: %+v", l.Blob.Digest, s)
		}
	}
	r.Release()
	e.empty()
}

// A layer whose last record is collected at the moment in which another one of it
// is made is there, or is fetched again.
func TestExtractWhileCollecting(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layer := src.add(t, "gzip", tarOf(t, "a=1"))
	for range 200 {
		old := e.pull(src, layer)
		must(t, old.Extract(t.Context()))
		old.Release()
		collected := make(chan error)
		go func() { collected <- e.m.Prune(t.Context(), PruneOptions{All: true}, nil) }()
		r := e.pull(src, layer)
		must(t, r.Extract(t.Context()))
		e.wantFiles(r, "a=1")
		r.Release()
		must(t, <-collected)
	}
}

// A blob that is deleted while what is below it is fetched is a loss, after which
// it is fetched again.
func TestExtractDeletedBlob(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layers := []Layer{src.add(t, "gzip", tarOf(t, "a=1")), src.add(t, "gzip", tarOf(t, "b=2"))}
	r := e.pull(src, layers...)
	must(t, r.EnsureBlob(t.Context(), layers[1].Blob))
	remove := sync.OnceFunc(func() {
		if err := os.Remove(filepath.Join(e.root, "blobs", "sha256", layers[1].Blob.Digest.Encoded())); err != nil {
			t.Error(err)
		}
	})
	src.body = func(d digest.Digest, body io.Reader) io.Reader {
		if d == layers[0].Blob.Digest {
			remove()
		}
		return body
	}
	wantErr(t, r.Extract(t.Context()), ErrLost, layers[1].Blob.Digest.String())
	again := e.pull(src, layers...)
	must(t, again.Extract(t.Context()))
	e.wantFiles(again, "a=1", "b=2")
	if n := src.opens[layers[1].Blob.Digest]; n != 2 {
		t.Errorf("the deleted blob was fetched %d times, want a second time", n)
	}
	again.Release()
	r.Release()
}

// The media type of an image in the wild isn't always that of its bytes.
func TestExtractGoesByTheBytes(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	l := src.add(t, "zstd", tarOf(t, "a=1"))
	l.Blob.MediaType = ocispec.MediaTypeImageLayerGzip
	r := e.pull(src, l)
	e.wantFiles(r, "a=1")
	r.Release()
}

func TestSameBlobsAreOneRecord(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layers := threeLayers(t, src)
	a := e.pull(src, layers...)
	b := e.pull(src, layers...)
	if a.ID() != b.ID() {
		t.Errorf("two records for the same blobs")
	}
	e.persist(a)
	a.Release()
	b.Release()
	e.restart()
	a, err := e.m.Get(t.Context(), a.ID())
	must(t, err)
	_, err = a.Mounts(t.Context())
	wantErr(t, err, ErrLost, "no build has said where to get it")
	if _, err := e.m.Get(t.Context(), a.ID()); !errors.Is(err, ErrNotFound) {
		t.Errorf("a record that can't be had is handed out: %v", err)
	}
	b = e.pull(src, layers...)
	if a.ID() != b.ID() {
		t.Errorf("another record for the same blobs after a restart")
	}
	e.wantFiles(a, "c=3", "d=4", "dir/b=2")
	get(e.m.Get(t.Context(), a.ID()))(t).Release()
	a.Release()
	b.Release()
	e.restart()
	a = get(e.m.Get(t.Context(), b.ID()))(t)
	e.wantFiles(a, "c=3", "d=4", "dir/b=2")
	a.Release()
}

// The same content in another compressed form is another record, for the sake
// of export, and the same files.
func TestSameChainSharesFiles(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	tars := [][]byte{tarOf(t, "a=1"), tarOf(t, "b=2")}
	var gz, zst []Layer
	for _, tar := range tars {
		gz = append(gz, src.add(t, "gzip", tar))
		zst = append(zst, src.add(t, "zstd", tar))
	}
	early := e.pull(src, zst...) // before the other has files
	a := e.pull(src, gz...)
	must(t, a.Extract(t.Context()))
	late := e.pull(src, zst[0])
	fetched := src.count()
	e.wantFiles(early, "a=1", "b=2")
	e.wantFiles(late, "a=1")
	if src.count() != fetched {
		t.Error("known content was fetched again")
	}
	if early.ID() == a.ID() || early.ChainID() != a.ChainID() {
		t.Error("two forms are one record, or have different chains")
	}
	for r, want := range map[*Ref]Layer{early: zst[1], a: gz[1]} {
		got := get(r.Layers(t.Context(), Compression{OCI: true}))(t)
		if got[1].Blob.Digest != want.Blob.Digest && r == a {
			t.Errorf("exports %s, not its own %s", got[1].Blob.Digest, want.Blob.Digest)
		}
	}
	child := e.layer(early, Options{}, "c=3")
	e.persist(child)
	for _, r := range []*Ref{late, a, early, child} {
		r.Release() // the owner of the files before those that share them
	}
	e.restart()
	child = get(e.m.Get(t.Context(), child.ID()))(t)
	e.wantFiles(child, "a=1", "b=2", "c=3")
	child.Release()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

func TestExtractFaults(t *testing.T) {
	boom := errors.New("registry says 503")
	wrong := func(n int) func(digest.Digest, io.Reader) io.Reader {
		return func(_ digest.Digest, r io.Reader) io.Reader {
			data, _ := io.ReadAll(r)
			data[n%len(data)] ^= 1
			return bytes.NewReader(data)
		}
	}
	tests := map[string]struct {
		spoil func(src *memSource, l *Layer)
		want  []string
	}{
		"unreachable": {func(s *memSource, _ *Layer) {
			s.open = func(context.Context, digest.Digest) error { return boom }
		}, []string{boom.Error()}},
		"breaks off": {func(s *memSource, _ *Layer) {
			s.body = func(_ digest.Digest, r io.Reader) io.Reader {
				return io.MultiReader(io.LimitReader(r, 20), failing{boom})
			}
		}, []string{boom.Error()}},
		"network gone": {func(s *memSource, _ *Layer) {
			s.open = func(context.Context, digest.Digest) error { return syscall.EACCES }
		}, []string{"permission denied"}},
		"ends early": {func(s *memSource, _ *Layer) {
			s.body = func(_ digest.Digest, r io.Reader) io.Reader { return io.LimitReader(r, 20) }
		}, []string{"ends after 20 of"}},
		"goes on": {func(s *memSource, _ *Layer) {
			s.body = func(_ digest.Digest, r io.Reader) io.Reader { return io.MultiReader(r, zeros{}) }
		}, []string{"longer than"}},
		"other bytes in the header": {func(s *memSource, _ *Layer) { s.body = wrong(4) }, []string{"sha256:"}},
		"other bytes at the end":    {func(s *memSource, _ *Layer) { s.body = wrong(60) }, []string{"sha256:"}},
		"other size":                {func(s *memSource, l *Layer) { l.Blob.Size++ }, []string{"ends after"}},
		"other diff ID":             {func(s *memSource, l *Layer) { l.DiffID = digest.FromString("x") }, []string{digest.FromString("x").String()}},
		"not a tar": {func(s *memSource, l *Layer) {
			data := bytes.Repeat([]byte("no tar"), 500)
			d := digest.FromBytes(data)
			s.blobs[d] = data
			*l = Layer{ocispec.Descriptor{MediaType: ociLayer, Digest: d, Size: int64(len(data))}, d}
		}, []string{"unpack layer"}},
	}
	for name, tc := range tests {
		for _, position := range []string{"bottom", "top"} {
			t.Run(name+"/"+position, func(t *testing.T) {
				e := newEnv(t)
				good, bad := newSource(), newSource()
				base := good.add(t, "gzip", tarOf(t, "base=0"))
				l := bad.add(t, "gzip", tarOf(t, "a=1"))
				orig := l
				tc.spoil(bad, &l)
				var below *Ref
				if position == "top" {
					below = e.pull(good, base)
				}
				r := get(e.m.GetByBlob(t.Context(), l, below, bad, Options{}))(t)
				var seen statuses
				err := r.Extract(seen.in(t.Context()))
				wantErr(t, err, ErrLost, append(tc.want, l.Blob.Digest.String())...)
				for _, name := range seen.names() {
					if s := seen.last[name]; s.Completed != nil && name == "extracting "+l.Blob.Digest.String() {
						t.Errorf("%s is shown as complete", name)
					}
				}
				if _, err := e.m.Get(t.Context(), r.ID()); !errors.Is(err, ErrNotFound) {
					t.Errorf("lost record is handed out: %v", err)
				}
				e.check()
				// A source that works makes it good again.
				if l.DiffID == orig.DiffID && l.Blob.Size == orig.Blob.Size {
					well := newSource()
					well.blobs = bad.blobs
					again := get(e.m.GetByBlob(t.Context(), l, below, well, Options{}))(t)
					if again.ID() != r.ID() {
						t.Error("another record for the same blob")
					}
					must(t, r.Extract(t.Context()))
					again.Release()
				}
				r.Release()
				below.Release()
				e.empty()
			})
		}
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// An older source is asked when the newest fails.
func TestExtractTriesOlderSources(t *testing.T) {
	e := newEnv(t)
	old, dead := newSource(), newSource()
	l := old.add(t, "gzip", tarOf(t, "a=1"))
	r := e.pull(old, l)
	again := e.pull(dead, l)
	e.wantFiles(r, "a=1")
	if dead.count() != 1 {
		t.Errorf("the newest source was asked %d times", dead.count())
	}
	r.Release()
	again.Release()
}

func TestExtractIsJoined(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	r := e.pull(src, threeLayers(t, src)...)
	gate := make(chan struct{})
	src.open = func(context.Context, digest.Digest) error { <-gate; return nil }
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			if err := r.Extract(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	close(gate)
	wg.Wait()
	if src.count() != 3 {
		t.Errorf("%d fetches of 3 layers", src.count())
	}
	e.wantFiles(r, "c=3", "d=4", "dir/b=2")
	r.Release()
	e.empty()
}

// Who leaves doesn't disturb who stays, and the last one ends the transfer.
func TestExtractCancelled(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	r := e.pull(src, threeLayers(t, src)...)
	started := make(chan struct{}, 10)
	gate := make(chan struct{})
	src.body = func(_ digest.Digest, r io.Reader) io.Reader {
		started <- struct{}{}
		return &gated{Reader: r, gate: gate, closed: make(chan struct{})}
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- r.Extract(ctx) }()
	<-started
	joined := statuses{first: make(chan struct{})}
	go func() { second <- r.Extract(joined.in(t.Context())) }()
	<-joined.first // who sees progress has joined
	cancel(enough)
	if err := <-first; !errors.Is(err, enough) {
		t.Errorf("first: %v", err)
	}
	close(gate)
	if err := <-second; err != nil {
		t.Errorf("second: %v", err)
	}
	e.wantFiles(r, "c=3", "d=4", "dir/b=2")
	r.Release()
	e.empty()

	// Alone, and cancelled while a read hangs.
	src.body = func(_ digest.Digest, r io.Reader) io.Reader {
		started <- struct{}{}
		return &gated{Reader: r, gate: make(chan struct{}), closed: make(chan struct{})}
	}
	for len(started) > 0 {
		<-started
	}
	r = e.pull(src, threeLayers(t, src)...)
	ctx, cancel = context.WithCancelCause(t.Context())
	go func() { first <- r.Extract(ctx) }()
	<-started
	cancel(enough)
	if err := <-first; !errors.Is(err, enough) {
		t.Errorf("alone: %v", err)
	}
	get(e.m.Get(t.Context(), r.ID()))(t).Release() // not lost
	src.body = nil
	e.wantFiles(r, "c=3", "d=4", "dir/b=2")
	r.Release()
	e.empty()
}

// gated is a body that hangs until the gate opens or it is closed.
type gated struct {
	io.Reader
	gate   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (g *gated) Read(p []byte) (int, error) {
	select {
	case <-g.gate:
		return g.Reader.Read(p)
	case <-g.closed:
		return 0, os.ErrClosed
	}
}

func (g *gated) Close() error {
	g.once.Do(func() { close(g.closed) })
	return nil
}

// Layers above one that is slow are fetched meanwhile.
func TestExtractFetchesSideBySide(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	layers := threeLayers(t, src)
	r := e.pull(src, layers...)
	bottom := layers[0].Blob.Digest
	var others sync.WaitGroup
	others.Add(2)
	src.body = func(d digest.Digest, r io.Reader) io.Reader {
		if d != bottom {
			return &atEnd{Reader: r, do: others.Done}
		}
		others.Wait() // hangs the test if they wait for this one
		return r
	}
	must(t, r.Extract(t.Context()))
	e.wantFiles(r, "c=3", "d=4", "dir/b=2")
	r.Release()
	e.empty()
}

type atEnd struct {
	io.Reader
	do   func()
	once sync.Once
}

func (a *atEnd) Read(p []byte) (int, error) {
	n, err := a.Reader.Read(p)
	if err == io.EOF {
		a.once.Do(a.do)
	}
	return n, err
}

// Somebody who wants the blob only keeps the transfer going when the
// extraction leaves, and nothing of the extraction stays.
func TestExtractLeavesABlobWaiter(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	l := src.add(t, "gzip", tarOf(t, "a=1"))
	r := e.pull(src, l)
	gate, started := make(chan struct{}), make(chan struct{}, 1)
	src.body = func(_ digest.Digest, r io.Reader) io.Reader {
		started <- struct{}{}
		return &gated{Reader: r, gate: gate, closed: make(chan struct{})}
	}
	ctx, cancel := context.WithCancel(t.Context())
	extract, ensure := make(chan error, 1), make(chan error, 1)
	go func() { extract <- r.Extract(ctx) }()
	<-started
	joined := statuses{first: make(chan struct{})}
	go func() { ensure <- r.EnsureBlob(joined.in(t.Context()), l.Blob) }()
	<-joined.first
	cancel()
	if err := <-extract; !errors.Is(err, context.Canceled) {
		t.Errorf("extract: %v", err)
	}
	close(gate)
	if err := <-ensure; err != nil {
		t.Errorf("ensure: %v", err)
	}
	e.check()
	if src.count() != 1 {
		t.Errorf("%d fetches", src.count())
	}
	e.wantFiles(r, "a=1")
	r.Release()
	e.empty()
}

// A stored blob that went bad is fetched again, or is a miss.
func TestCorruptStoredBlob(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	l := src.add(t, "uncompressed", tarOf(t, "a=1"))
	for _, sourced := range []bool{true, false} {
		r := e.pull(src, l)
		must(t, r.EnsureBlob(t.Context(), l.Blob))
		e.persist(r)
		r.Release()
		e.restart()
		path := filepath.Join(e.root, "blobs", "sha256", l.Blob.Digest.Encoded())
		data := get(os.ReadFile(path))(t)
		data[600] ^= 1
		must(t, os.Chmod(path, 0o600))
		must(t, os.WriteFile(path, data, 0o600))

		r = get(e.m.Get(t.Context(), r.ID()))(t)
		rc := get(r.OpenBlob(t.Context(), l.Blob))(t)
		_, err := io.Copy(io.Discard, rc)
		wantErr(t, err, ErrLost, l.Blob.Digest.String())
		must(t, rc.Close())
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		if sourced {
			again := e.pull(src, l)
			again.Release()
			e.wantFiles(r, "a=1")
		} else {
			_, err := r.Mounts(t.Context())
			wantErr(t, err, ErrLost, l.Blob.Digest.String())
		}
		r.Release()
		must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
		e.empty()
	}
}

func TestGetByBlobRefusesNonsense(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	good := src.add(t, "gzip", tarOf(t, "a=1"))
	for name, spoil := range map[string]func(*Layer){
		"digest":       func(l *Layer) { l.Blob.Digest = "sha256:short" },
		"path":         func(l *Layer) { l.Blob.Digest = "../../etc" },
		"diff ID":      func(l *Layer) { l.DiffID = "md5:d41d8cd98f00b204e9800998ecf8427e" },
		"no diff ID":   func(l *Layer) { l.DiffID = "" },
		"negative":     func(l *Layer) { l.Blob.Size = -1 },
		"empty digest": func(l *Layer) { l.Blob.Digest = "" },
	} {
		l := good
		spoil(&l)
		if _, err := e.m.GetByBlob(t.Context(), l, nil, src, Options{}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	e.empty()
}

// compat: LLB-176
func TestMergeOfLazyRecords(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	base := src.add(t, "gzip", tarOf(t, "base=0", "x=base"))
	left := e.pull(src, base, src.add(t, "gzip", tarOf(t, "left=1", "x=left")))
	right := e.pull(src, base, src.add(t, "gzip", tarOf(t, "right=2")))
	m := get(e.m.Merge(t.Context(), []*Ref{left, nil, right}, Options{}))(t)
	if src.count() != 0 {
		t.Error("merging fetched")
	}
	layers := get(m.Layers(t.Context(), Compression{}))(t)
	if src.count() != 0 || len(layers) != 4 || layers[0].DiffID != layers[2].DiffID {
		t.Errorf("%d fetches for %v, want base, left, base, right", src.count(), layers)
	}
	left.Release()
	right.Release()
	e.wantFiles(m, "base=0", "left=1", "right=2", "x=base")
	if src.count() != 3 {
		t.Errorf("%d fetches", src.count())
	}
	child := e.layer(m, Options{}, "child=3", "-left")
	e.persist(child)
	m.Release()
	id := child.ID()
	child.Release()
	e.crash()
	child = get(e.m.Get(t.Context(), id))(t)
	e.wantFiles(child, "base=0", "child=3", "right=2", "x=base")
	child.Release()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

func TestMergeAndDiff(t *testing.T) {
	e := newEnv(t)
	a := e.layer(nil, Options{}, "a=1")
	b := e.layer(a, Options{}, "b=2")
	c := e.layer(b, Options{}, "c=3", "-a")
	same := get(e.m.Merge(t.Context(), []*Ref{b}, Options{}))(t)
	if same.ID() != b.ID() {
		t.Error("a merge of one is another record")
	}
	// What a merge puts on top of b is found, be it b again.
	twice := get(e.m.Merge(t.Context(), []*Ref{b, b}, Options{}))(t)
	e.wantFiles(twice, "a=1", "b=2")
	again, ok := e.m.Diff(t.Context(), b, twice, Options{})
	if !ok {
		t.Fatal("no diff to a merge with repeated layers")
	}
	e.wantFiles(again, "a=1", "b=2")
	if d, ok := e.m.Diff(t.Context(), b, a, Options{}); ok || d != nil {
		t.Error("diff of what isn't above")
	}
	if d, ok := e.m.Diff(t.Context(), b, b, Options{}); !ok || d != nil {
		t.Error("diff of the same isn't empty")
	}
	d, ok := e.m.Diff(t.Context(), a, c, Options{})
	if !ok {
		t.Fatal("no diff")
	}
	e.wantFiles(d, "b=2", "c=3")
	other := e.layer(nil, Options{}, "a=x", "z=9")
	m := get(e.m.Merge(t.Context(), []*Ref{other, d}, Options{}))(t)
	e.wantFiles(m, "b=2", "c=3", "z=9") // c's removal counts here too
	for _, r := range []*Ref{a, b, c, same, twice, again, d, other, m} {
		r.Release()
	}
	e.empty()
}

// Deletions of pulled layers count where a merge or a diff puts them, fetched or
// not: in what is mounted as in what is exported.
//
// compat: LLB-080, LLB-081, LLB-176
func TestMergeOfPulledDeletions(t *testing.T) {
	for _, lazy := range []bool{true, false} {
		e := newEnv(t)
		src := newSource()
		other := e.pull(src, src.add(t, "gzip", tarOf(t, "d/kept=o", "d/x=o", "e/y=o", "f=o", "g=o")))
		image := []Layer{
			src.add(t, "gzip", tarOf(t, "d/x=1", "-f")),
			// Deletes what its parent has, what it hasn't, and a directory's content.
			src.add(t, "gzip", tarOf(t, "-d/x", "-g", "e/.wh..wh..opq", "e/new=2")),
		}
		base, top := e.pull(src, image[0]), e.pull(src, image...)
		if !lazy {
			must(t, other.Extract(t.Context()))
			must(t, top.Extract(t.Context()))
		}
		fetched := src.count()
		merged := get(e.m.Merge(t.Context(), []*Ref{other, top}, Options{}))(t)
		diff, ok := e.m.Diff(t.Context(), base, top, Options{})
		if !ok {
			t.Fatal("no diff")
		}
		onDiff := get(e.m.Merge(t.Context(), []*Ref{other, diff}, Options{}))(t)
		blobs := get(merged.Layers(t.Context(), Compression{}))(t)
		if len(blobs) != 3 || blobs[1].Blob.Digest != image[0].Blob.Digest || blobs[2].Blob.Digest != image[1].Blob.Digest {
			t.Errorf("the merge exports %v, not the layers as they came", blobs)
		}
		if src.count() != fetched {
			t.Error("merging and exporting fetched")
		}
		e.wantFiles(merged, "d/kept=o", "e/new=2")
		e.wantFiles(onDiff, "d/kept=o", "e/new=2", "f=o")
		e.wantFiles(diff, "e/new=2")
		e.wantFiles(top, "e/new=2")
		e.wantFiles(base, "d/x=1")
		child := e.layer(base, Options{}, "child=3")
		e.wantFiles(child, "child=3", "d/x=1")
		for _, r := range []*Ref{other, base, top, merged, diff, onDiff, child} {
			r.Release()
		}
		e.empty()
	}
}

// A layer that has to be copied for a merge takes more space from then on, and du
// and fsck know.
func TestMergeGrowsALayer(t *testing.T) {
	e := newEnv(t)
	base := e.layer(nil, Options{}, "d/x=1", "d/y=1")
	top := e.layer(base, Options{}, "-d", "d/x=2")
	other := e.layer(nil, Options{}, "d/kept=3")
	size := func() int64 {
		for _, u := range get(e.m.DiskUsage(t.Context(), nil, 0))(t) {
			if u.ID == top.ID() {
				return u.Size
			}
		}
		t.Fatal("the record is gone")
		return 0
	}
	e.persist(top, other)
	before := size()
	merged := get(e.m.Merge(t.Context(), []*Ref{other, top}, Options{}))(t)
	e.wantFiles(merged, "d/kept=3", "d/x=2")
	if after := size(); after <= before {
		t.Errorf("the layer took %d bytes, and with a copy %d", before, after)
	}
	e.persist(merged)
	e.check()
	e.addsUp()
	id := merged.ID()
	for _, r := range []*Ref{base, top, other, merged} {
		r.Release()
	}
	e.crash()
	merged = get(e.m.Get(t.Context(), id))(t)
	e.wantFiles(merged, "d/kept=3", "d/x=2")
	merged.Release()
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	e.empty()
}

// Merges of merges double their layers, but not without end.
func TestMergeWithoutEnd(t *testing.T) {
	e := newEnv(t)
	m := e.layer(nil, Options{}, "a=1")
	for range 40 {
		next := get(e.m.Merge(t.Context(), []*Ref{m, m}, Options{}))(t)
		m.Release()
		m = next
	}
	if n := len(m.r.stack()); n > maxStack {
		t.Errorf("it has %d layers", n)
	}
	e.wantFiles(m, "a=1")
	m.Release()
	e.empty()
}

// A pulled layer of the same content as a stack still has only its own files
// as its layer.
func TestStackLendsNoFilesToALayer(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	one, two := tarOf(t, "one=1"), tarOf(t, "two=2")
	a, b := e.pull(src, src.add(t, "gzip", one)), e.pull(src, src.add(t, "gzip", two))
	m := get(e.m.Merge(t.Context(), []*Ref{a, b}, Options{}))(t)
	must(t, m.Extract(t.Context()))
	base := e.pull(src, src.add(t, "zstd", one))
	top := e.pull(src, src.add(t, "zstd", one), src.add(t, "zstd", two))
	if m.ChainID() != top.ChainID() {
		t.Fatal("the chains differ")
	}
	must(t, top.Extract(t.Context()))
	d, ok := e.m.Diff(t.Context(), base, top, Options{})
	if !ok {
		t.Fatal("no diff")
	}
	e.wantFiles(d, "two=2")
	for _, r := range []*Ref{a, b, m, base, top, d} {
		r.Release()
	}
	e.empty()
}

func TestParallelExtractsOfManyChains(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	shared := src.add(t, "gzip", tarOf(t, "base=0"))
	var refs []*Ref
	for i := range 8 {
		l := src.add(t, "gzip", tarOf(t, "n="+string(rune('a'+i))))
		refs = append(refs, e.pull(src, shared, l))
	}
	var wg sync.WaitGroup
	for _, r := range refs {
		for range 2 {
			wg.Go(func() {
				if err := r.Extract(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if n := src.opens[shared.Blob.Digest]; n != 1 {
		t.Errorf("the shared layer was fetched %d times", n)
	}
	for i, r := range refs {
		e.wantFiles(r, "base=0", "n="+string(rune('a'+i)))
		r.Release()
	}
	e.empty()
}
