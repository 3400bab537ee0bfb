package cache

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// needRoot fails the test unless it may mount.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts overlays and has to run as root")
	}
}

// env is a cache on a directory of its own.
type env struct {
	t     testing.TB
	root  string
	db    *store.DB
	snaps snapshot.Snapshotter
	blobs *snapshot.Blobs
	m     *Manager
	log   bytes.Buffer
	logMu sync.Mutex
	// delay is that of group commits; 0 is the default.
	delay time.Duration
	// warn is told what the store warns of; by default that fails the test.
	warn func(msg string, args ...any)
	// adopt is what the next manager is to take up.
	adopt []Interrupted
}

func newEnv(t testing.TB) *env {
	t.Helper()
	needRoot(t)
	return newEnvAt(t, t.TempDir())
}

// newEnvAt is newEnv on a directory of the caller's.
func newEnvAt(t testing.TB, root string) *env {
	t.Helper()
	e := &env{t: t, root: root}
	e.open()
	t.Cleanup(e.close)
	return e
}

func (e *env) Write(p []byte) (int, error) {
	e.logMu.Lock()
	defer e.logMu.Unlock()
	return e.log.Write(p)
}

func (e *env) logged() string {
	e.logMu.Lock()
	defer e.logMu.Unlock()
	return e.log.String()
}

func (e *env) open() {
	e.t.Helper()
	var err error
	warn := e.warn
	if warn == nil {
		warn = func(msg string, args ...any) { e.t.Errorf("store: %s %v", msg, args) }
	}
	e.db, err = store.Open(store.Options{Root: e.root, Delay: e.delay, Warn: warn})
	must(e.t, err)
	e.snaps, err = snapshot.NewOverlay(e.root, e.db)
	must(e.t, err)
	e.blobs, err = snapshot.NewBlobs(e.root, e.db)
	must(e.t, err)
	e.m, err = Open(e.t.Context(), Config{
		Store: e.db, Snapshots: e.snaps, Blobs: e.blobs, Root: e.root, Adopt: e.adopt,
		Log: slog.New(slog.NewTextHandler(e, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	must(e.t, err)
}

// close closes the cache, which must be whole and have no handles.
func (e *env) close() {
	e.t.Helper()
	if e.db == nil {
		return
	}
	e.check()
	e.addsUp()
	if err := e.m.Close(); err != nil {
		e.t.Error(err)
	}
	e.down()
}

// down closes what is below the manager.
func (e *env) down() {
	e.t.Helper()
	if err := e.db.Close(); err != nil {
		e.t.Error(err)
	}
	if c, ok := e.snaps.(io.Closer); ok {
		if err := c.Close(); err != nil {
			e.t.Error(err)
		}
	}
	if err := e.blobs.Close(); err != nil {
		e.t.Error(err)
	}
	e.db = nil
}

// restart closes and opens the cache.
func (e *env) restart() {
	e.t.Helper()
	e.close()
	e.open()
}

// crash opens the cache again without telling the manager that it ends, right
// after a group commit.
func (e *env) crash() {
	e.t.Helper()
	must(e.t, e.db.Sync(context.Background()))
	e.m.mu.Lock()
	e.m.closed = true
	e.m.mu.Unlock()
	e.down()
	e.open()
}

func (e *env) check() {
	e.t.Helper()
	rep, err := e.m.Check(context.Background(), true)
	if err != nil {
		e.t.Error(err)
		return
	}
	for _, p := range rep.Problems {
		e.t.Errorf("check: %s", p)
	}
}

// addsUp fails unless du and what is on disk agree to 1 %.
func (e *env) addsUp() {
	e.t.Helper()
	e.cleared()
	space := get(e.m.Space(context.Background(), ""))(e.t)
	usages, total := int64(0), allocated(e.t, e.root)
	for _, u := range get(e.m.DiskUsage(context.Background(), nil, 0))(e.t) {
		usages += u.Size
	}
	if off := space.Total() - total; off > total/100 || -off > total/100 {
		e.t.Errorf("du adds up to %d, there are %d bytes: %+v", space.Total(), total, space)
	}
	if usages != space.Records {
		e.t.Errorf("du lists %d bytes of records, not %d", usages, space.Records)
	}
}

// allocated is what the file system has given to root and all below it.
func allocated(t testing.TB, root string) (total int64) {
	t.Helper()
	seen := map[uint64]bool{}
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		err = syscall.Lstat(path, &st)
		if !seen[st.Ino] {
			seen[st.Ino] = true
			total += st.Blocks * 512
		}
		return err
	}))
	return total
}

// empty fails unless nothing at all is left.
func (e *env) empty() {
	e.t.Helper()
	rep, err := e.m.Check(context.Background(), false)
	must(e.t, err)
	if rep.Records+rep.Snapshots+rep.Blobs > 0 {
		e.t.Errorf("left: %+v", *rep)
	}
	e.cleared()
	for _, dir := range []string{"snapshots", "blobs"} {
		filepath.WalkDir(filepath.Join(e.root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && (d.Type().IsRegular() || d.Name() == "fs") {
				e.t.Errorf("left: %s", path)
			}
			return err
		})
	}
}

// cleared waits until what was removed is gone from disk.
func (e *env) cleared() {
	e.t.Helper()
	must(e.t, e.m.removed(context.Background()))
	must(e.t, e.snaps.(settler).Settle(context.Background())) // also if a test has put a fake in between
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func get[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// layer commits a record on top of parent with the given files; a name that
// starts with "-" is removed.
func (e *env) layer(parent *Ref, opts Options, files ...string) *Ref {
	e.t.Helper()
	u := get(e.m.New(e.t.Context(), parent, opts))(e.t)
	e.write(u, files...)
	return get(u.Commit(e.t.Context()))(e.t)
}

// write writes files, each "path=content", or "-path". All times are the same,
// so that the same files make the same layer.
func (e *env) write(u *Mutable, files ...string) {
	e.t.Helper()
	v := get(u.Open(e.t.Context()))(e.t)
	defer func() { must(e.t, v.Close()) }()
	defer func() {
		must(e.t, filepath.WalkDir(v.Path()+"/.", func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0)))
		}))
	}()
	for _, f := range files {
		if name, ok := strings.CutPrefix(f, "-"); ok {
			must(e.t, os.RemoveAll(filepath.Join(v.Path(), name)))
			continue
		}
		name, content, _ := strings.Cut(f, "=")
		path := filepath.Join(v.Path(), name)
		must(e.t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(e.t, os.WriteFile(path, []byte(content), 0o644))
	}
}

// files lists what a record shows, as "path=content", sorted.
func (e *env) files(r *Ref) []string {
	e.t.Helper()
	v := get(r.Open(e.t.Context()))(e.t)
	defer func() { must(e.t, v.Close()) }()
	return listFiles(e.t, v.Path())
}

func listFiles(t testing.TB, root string) (out []string) {
	t.Helper()
	must(t, filepath.WalkDir(root+"/.", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		rel, _ := filepath.Rel(root, path)
		out = append(out, rel+"="+string(content))
		return err
	}))
	slices.Sort(out)
	return out
}

func (e *env) wantFiles(r *Ref, want ...string) {
	e.t.Helper()
	if got := e.files(r); !slices.Equal(got, want) {
		e.t.Errorf("files %q, want %q", got, want)
	}
}

func (e *env) persist(refs ...*Ref) {
	e.t.Helper()
	b := &store.Batch{}
	for _, r := range refs {
		must(e.t, r.Persist(b))
	}
	e.db.Write(b)
}

// tarOf makes a layer of files, each "path=content", or "-path" for a whiteout.
func tarOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		name, content, _ := strings.Cut(f, "=")
		if gone, ok := strings.CutPrefix(name, "-"); ok {
			name = filepath.Join(filepath.Dir(gone), ".wh."+filepath.Base(gone))
		}
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}))
		_, err := w.Write([]byte(content))
		must(t, err)
	}
	must(t, w.Close())
	return out.Bytes()
}

// memSource is a BlobSource from memory, with faults on demand.
type memSource struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	opens map[digest.Digest]int
	// open, if set, is called before each Open; body may replace the bytes.
	open func(ctx context.Context, d digest.Digest) error
	body func(d digest.Digest, r io.Reader) io.Reader
}

func newSource() *memSource {
	return &memSource{blobs: map[digest.Digest][]byte{}, opens: map[digest.Digest]int{}}
}

func (s *memSource) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	s.mu.Lock()
	data, ok := s.blobs[desc.Digest]
	s.opens[desc.Digest]++
	open, body := s.open, s.body
	s.mu.Unlock()
	if open != nil {
		if err := open(ctx, desc.Digest); err != nil {
			return nil, err
		}
	}
	if !ok {
		return nil, fmt.Errorf("registry has no blob %s", desc.Digest)
	}
	var r io.Reader = bytes.NewReader(data)
	if body != nil {
		r = body(desc.Digest, r)
	}
	if rc, ok := r.(io.ReadCloser); ok {
		return rc, nil
	}
	return io.NopCloser(r), nil
}

func (s *memSource) count() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.opens {
		n += c
	}
	return n
}

// add compresses a tar as one of uncompressed, gzip and zstd, and makes it
// fetchable.
func (s *memSource) add(t testing.TB, kind string, tar []byte) Layer {
	t.Helper()
	data := pressed(t, Compression{Type: kind}, tar, 1<<20)
	d := digest.FromBytes(data)
	s.mu.Lock()
	s.blobs[d] = data
	s.mu.Unlock()
	return Layer{
		Blob:   ocispec.Descriptor{MediaType: layerType{compression: kind}.mediaType(true), Digest: d, Size: int64(len(data))},
		DiffID: digest.FromBytes(tar),
	}
}

// pull makes records of layers, lowest first, and returns the topmost.
func (e *env) pull(src BlobSource, layers ...Layer) *Ref {
	e.t.Helper()
	var top *Ref
	for i, l := range layers {
		next := get(e.m.GetByBlob(e.t.Context(), l, top, src, Options{Description: fmt.Sprintf("layer %d", i)}))(e.t)
		top.Release()
		top = next
	}
	return top
}

// statuses records the last state of every status.
type statuses struct {
	first chan struct{} // if set, closed at the first event
	mu    sync.Mutex
	last  map[string]progress.Status
}

func (s *statuses) Write(e progress.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil {
		s.last = map[string]progress.Status{}
		if s.first != nil {
			close(s.first)
		}
	}
	s.last[e.Status.ID] = *e.Status
}

func (s *statuses) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.last))
}

func (s *statuses) in(ctx context.Context) context.Context {
	return progress.With(ctx, progress.NewScope(s, "sha256:v"))
}

func wantErr(t testing.TB, err, want error, parts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q doesn't say %q", err, p)
		}
	}
}
