package remotecache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

type env struct {
	*testing.T
	cfg Config
	reg *registrytest.Registry
}

func newEnv(t *testing.T) *env {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
	w, err := worker.New(context.Background(), worker.Config{Root: t.TempDir(), Platforms: []string{"linux/amd64"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return &env{t, Config{Cache: w.Cache(), Keys: w.Keys(), Sessions: w.Sessions(), Registry: w.Registry()}, registrytest.New(t)}
}

func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// blobs are where layers come from; a missing one can't be had.
type blobs map[digest.Digest][]byte

func (b blobs) Open(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if data, ok := b[desc.Digest]; ok {
		return io.NopCloser(strings.NewReader(string(data))), nil
	}
	return nil, errors.New("nobody has it")
}

// lazy is a stack of layers that are fetched from b.
func (e *env) lazy(b blobs, names ...string) *cache.Ref {
	e.Helper()
	var top *cache.Ref
	for _, n := range names {
		data, diffID := registrytest.Layer(e.T, map[string]string{n: n})
		if n != "lost" {
			b[digest.FromBytes(data)] = data
		}
		l := cache.Layer{Blob: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(data), Size: int64(len(data))}, DiffID: diffID}
		next, err := e.cfg.Cache.GetByBlob(e.Context(), l, top, b, cache.Options{Description: n, CreatedAt: time.Unix(1700000000, 0)})
		top.Release()
		e.must(err)
		top = next
	}
	return top
}

// project is two steps on a source, and a third whose layers are lost.
func project() []*remote.Step {
	of := func(key solver.Key) digest.Digest { return digest.NewDigestFromBytes(digest.SHA256, key[:]) }
	source := &remote.Step{Digest: of(solver.RootKey("source", 0))}
	steps := []*remote.Step{source}
	for _, op := range []digest.Digest{"one", "two", "lost"} {
		below := steps[len(steps)-1]
		if op == "lost" {
			below = source
		}
		steps = append(steps, &remote.Step{
			Digest: of(solver.RootKey(op, 0)), Inputs: [][]remote.Use{{{Step: below}}},
			Results: []solver.Record{{Result: "gone"}, {Result: string(op), CreatedAt: time.Unix(1700000001, 0)}},
		})
	}
	return steps
}

// find returns the files' names of what an import has for op.
func (e *env) find(im *Import, op digest.Digest, below solver.Key) (key solver.Key, ref *cache.Ref) {
	e.Helper()
	found, err := im.Lookup(solver.Lookup{Op: op, Inputs: [][]solver.InputKey{{{Key: below}}}})
	e.must(err)
	if len(found.Keys) != 1 || len(found.Records) == 0 {
		return solver.Key{}, nil
	}
	res, err := im.Load(e.Context(), found.Records[0].Result)
	e.must(err)
	return found.Keys[0], res.(ops.Result).Ref
}

// Results that can't be had, and those whose layers are lost on the way, are left
// out; the rest is found by another daemon, and fetched from the registry.
// compat: EXP-079
func TestExportAndImport(t *testing.T) {
	e := newEnv(t)
	b := blobs{}
	refs := map[string]*cache.Ref{"one": e.lazy(b, "base", "one"), "two": e.lazy(b, "base", "one", "two"), "lost": e.lazy(b, "base", "lost")}
	for _, r := range refs {
		defer r.Release()
	}
	build := Build{Steps: project(), Results: []*cache.Ref{refs["two"]}, Load: func(_ context.Context, rec solver.Record) (*cache.Ref, error) {
		if refs[rec.Result] == nil {
			return nil, solver.ErrNoResult
		}
		return refs[rec.Result].Clone(), nil
	}}
	attrs := map[string]string{"ref": e.reg.Host + "/cache:1", "mode": "max"}
	ex, err := NewExporter(e.cfg, "registry", attrs)
	e.must(err)
	resp, err := ex.Export(t.Context(), build)
	e.must(err)
	var desc ocispec.Descriptor
	e.must(json.Unmarshal([]byte(resp["cache.manifest"]), &desc))
	if !e.reg.Has("cache", desc.Digest.String()) || desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("the response names %v", desc)
	}

	other := newEnv(t)
	im, err := NewImport(other.cfg, "registry it", "registry", attrs, Client{}, nil)
	e.must(err)
	e.reg.Requests()
	e.must(im.Read(t.Context()))
	defer im.Close()
	one, ref := other.find(im, "one", solver.RootKey("source", 0))
	if ref == nil {
		t.Fatal("one isn't found")
	}
	ref.Release()
	_, ref = other.find(im, "two", one)
	if ref == nil {
		t.Fatal("two isn't found")
	}
	defer ref.Release()
	if got := ref.Origins(); !got[2].CreatedAt.Equal(time.Unix(1700000000, 0)) {
		t.Errorf("the layers were made at %v", got)
	}
	if _, lost := other.find(im, "lost", solver.RootKey("source", 0)); lost != nil {
		t.Error("what is lost is found")
	}
	if got := blobRequests(e.reg); got != 1 {
		t.Errorf("%d blobs were fetched before any was needed, want the config", got)
	}
	view, err := ref.Open(t.Context())
	e.must(err)
	defer func() { e.must(view.Close()) }()
	files, err := os.ReadDir(view.Path())
	e.must(err)
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	if !slices.Equal(names, []string{"base", "one", "two"}) {
		t.Errorf("files %q", names)
	}

	ex.max = false // now the result is what it was made of, and no more
	build.Results = []*cache.Ref{refs["one"]}
	_, err = ex.Export(t.Context(), build)
	e.must(err)
	if im, err = NewImport(other.cfg, "registry it", "registry", attrs, Client{}, nil); err != nil {
		t.Fatal(err)
	}
	e.must(im.Read(t.Context()))
	defer im.Close()
	if im.index.Results() != 1 {
		t.Errorf("%d results in min mode", im.index.Results())
	}
}

func blobRequests(reg *registrytest.Registry) (n int) {
	for _, r := range reg.Requests() {
		if strings.HasPrefix(r, "GET ") && strings.Contains(r, "/blobs/") {
			n++
		}
	}
	return n
}

// An import that can't be read says why, in time, and has nothing.
// compat: EXP-082
func TestImportsThatCanNotBeRead(t *testing.T) {
	put := func(e *env, config string) {
		c := e.reg.Blob("cache", remote.ConfigType, []byte(config))
		e.reg.Manifest("cache", "1", ocispec.MediaTypeImageManifest, registrytest.JSON(e.T, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: c}))
	}
	for want, prepare := range map[string]func(e *env){
		"not found": func(*env) {},
		"could not be read within": func(e *env) {
			e.reg.Before = func(_ http.ResponseWriter, req *http.Request) bool {
				<-req.Context().Done()
				return true
			}
		},
		"got content with the digest": func(e *env) {
			put(e, "{}")
			e.reg.Lie = func(name string, data []byte) []byte {
				if name == "blob" {
					return []byte("[]")
				}
				return data
			}
		},
		"isn't well-formed": func(e *env) { put(e, "{") },
		"is layer 4 of 0": func(e *env) {
			put(e, `{"records":[{"digest":"`+digest.FromString("x").String()+`","layers":[{"layer":4}]}]}`)
		},
		"holds no build": func(e *env) {
			e.reg.Push(e.T, "cache", "1", registrytest.Image{Layers: []map[string]string{{"f": "f"}}})
		},
		"more than the":       func(e *env) { put(e, strings.Repeat(" ", maxDocument+1)) },
		"isn't a well-formed": func(e *env) { e.reg.Manifest("cache", "1", ocispec.MediaTypeImageManifest, []byte("[")) },
	} {
		t.Run(want, func(t *testing.T) {
			e := newEnv(t)
			e.reg.Change(func() { e.reg.Faults = registrytest.Faults{} })
			prepare(e)
			im, err := NewImport(e.cfg, "it", "registry", map[string]string{"ref": e.reg.Host + "/cache:1"}, Client{}, nil)
			e.must(err)
			if want == "could not be read within" {
				im.bound = time.Millisecond
			}
			if err := im.Read(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			found, err := im.Lookup(solver.Lookup{Op: "op", Roots: []solver.Key{{1}}})
			if err != nil || len(found.Keys)+len(found.Records) > 0 {
				t.Errorf("found %v, %v", found, err)
			}
			im.Close()
		})
	}
}

func TestBadAttributes(t *testing.T) {
	for want, tt := range map[string]struct {
		typ   string
		attrs map[string]string
	}{
		"type gha":                    {"gha", nil},
		`type "x"`:                    {"x", nil},
		"ref is missing":              {"registry", nil},
		"dest is missing":             {"local", nil},
		"neither min nor max":         {"local", map[string]string{"dest": "d", "mode": "medium"}},
		"ignore-error":                {"local", map[string]string{"dest": "d", "ignore-error": "no way"}},
		"needs oci-mediatypes=true":   {"local", map[string]string{"dest": "d", "oci-mediatypes": "false", "image-manifest": "true"}},
		"zstd needs oci-mediatypes":   {"local", map[string]string{"dest": "d", "oci-mediatypes": "false", "compression": "zstd"}},
		`compression-level: "high"`:   {"local", map[string]string{"dest": "d", "compression-level": "high"}},
		"compression level 10 of gzi": {"local", map[string]string{"dest": "d", "compression-level": "10"}},
	} {
		if _, err := NewExporter(Config{}, tt.typ, tt.attrs); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("export %s %v: %v, want %q", tt.typ, tt.attrs, err, want)
		}
	}
	for want, tt := range map[string]struct {
		typ   string
		attrs map[string]string
	}{
		"type s3":        {"s3", nil},
		`type "inline"`:  {"inline", nil},
		"ref is missing": {"registry", nil},
		"src is missing": {"local", nil},
		`digest ""`:      {"local", map[string]string{"src": "s"}},
		`digest "x"`:     {"local", map[string]string{"src": "s", "digest": "x"}},
	} {
		if _, err := NewImport(Config{}, "it", tt.typ, tt.attrs, Client{}, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("import %s %v: %v, want %q", tt.typ, tt.attrs, err, want)
		}
	}
}

// An import whose layers can't be had is given up, once, after a few of them; one
// that merely lacks some is not.
func TestImportThatIsGivenUp(t *testing.T) {
	e := newEnv(t)
	b := blobs{}
	names := []string{"a", "b", "c", "d", "e"}
	ref := e.lazy(b, names...)
	defer ref.Release()
	build := Build{Steps: project(), Results: []*cache.Ref{ref}, Load: func(_ context.Context, rec solver.Record) (*cache.Ref, error) {
		if rec.Result != "one" {
			return nil, solver.ErrNoResult
		}
		return ref.Clone(), nil
	}}
	attrs := map[string]string{"ref": e.reg.Host + "/cache:1", "mode": "max"}
	ex, err := NewExporter(e.cfg, "registry", attrs)
	e.must(err)
	_, err = ex.Export(t.Context(), build)
	e.must(err)
	layers, err := ref.Layers(t.Context(), cache.Compression{})
	e.must(err)

	for status, asked := range map[int]int{http.StatusNotFound: len(names), http.StatusTeapot: maxFailures} {
		other := newEnv(t)
		var told []error
		im, err := NewImport(other.cfg, "registry it", "registry", attrs, Client{}, func(err error) { told = append(told, err) })
		e.must(err)
		e.must(im.Read(t.Context()))
		e.reg.Change(func() {
			e.reg.Before = func(w http.ResponseWriter, req *http.Request) bool {
				if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
					return false
				}
				w.WriteHeader(status)
				return true
			}
		})
		_, top := other.find(im, "one", solver.RootKey("source", 0))
		if top == nil {
			t.Fatal("one isn't found")
		}
		e.reg.Requests()
		for _, l := range layers {
			rc, err := im.Open(t.Context(), l.Blob)
			if err == nil {
				_, err = io.ReadAll(rc)
				rc.Close()
			}
			if err == nil {
				t.Fatalf("%d: a layer is there", status)
			}
			if err := im.Failed(l.Blob, err); !strings.Contains(err.Error(), "the imported cache registry it: ") {
				t.Errorf("%d: %v", status, err)
			}
		}
		if got := blobRequests(e.reg); got != asked {
			t.Errorf("%d: %d layers were asked for, want %d", status, got, asked)
		}
		if err := top.Extract(t.Context()); !errors.Is(err, cache.ErrLost) || !strings.Contains(err.Error(), "the imported cache registry it: ") {
			t.Errorf("%d: the layers of the result: %v", status, err)
		}
		top.Release()
		_, found := other.find(im, "one", solver.RootKey("source", 0))
		if gaveUp := asked == maxFailures; gaveUp != (found == nil) || gaveUp != (len(told) == 1) {
			t.Errorf("%d: found %v, told %v", status, found, told)
		}
		found.Release()
		im.Close()
		e.reg.Change(func() { e.reg.Before = nil })
	}
}

// One that is silent for minutes is given up at once.
func TestSilentImportIsGivenUp(t *testing.T) {
	for _, err := range []error{fmt.Errorf("%w for 2m0s", cache.ErrStalled), fmt.Errorf("fetch: %w", os.ErrDeadlineExceeded)} {
		told := 0
		im, bad := NewImport(Config{}, "it", "registry", map[string]string{"ref": "r.example/cache:1"}, Client{}, func(error) { told++ })
		if bad != nil {
			t.Fatal(bad)
		}
		for _, name := range []digest.Digest{"one", "two"} {
			if got := im.Failed(ocispec.Descriptor{Digest: name}, err); !errors.Is(got, err) {
				t.Errorf("told %v, it says %v", err, got)
			}
		}
		if _, got := im.Open(t.Context(), ocispec.Descriptor{}); !errors.Is(got, err) || told != 1 {
			t.Errorf("after %v: %v, told %d times", err, got, told)
		}
	}
}
