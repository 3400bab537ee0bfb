package export

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func refsOf(ids ...string) map[string]*cache.Ref {
	out := map[string]*cache.Ref{}
	for _, id := range ids {
		out[id] = nil
	}
	return out
}

// env is a real cache with what exporters need beside it.
type env struct {
	t     *testing.T
	cfg   Config
	blobs *snapshot.Blobs
}

func newEnv(t *testing.T) *env {
	t.Helper()
	c := cachetest.Open(t, t.TempDir())
	sessions, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	reg := registry.New(registry.Config{})
	t.Cleanup(func() {
		reg.Close()
		c.Shut()
	})
	return &env{t: t, blobs: c.Blobs, cfg: Config{Cache: c.Manager, Sessions: sessions, Registry: reg, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}}
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// file returns a ref with one more file on top of parent.
func (e *env) file(parent *cache.Ref, name, content string) *cache.Ref {
	e.t.Helper()
	u, err := e.cfg.Cache.New(e.t.Context(), parent, cache.Options{Description: "write " + name})
	e.must(err)
	v, err := u.Open(e.t.Context())
	e.must(err)
	e.must(os.WriteFile(filepath.Join(v.Path(), name), []byte(content), 0o644))
	e.must(v.Close())
	ref, err := u.Commit(e.t.Context())
	e.must(err)
	return ref
}

// exported runs an exporter of the given attributes to its end.
func (e *env) exported(typ string, attrs map[string]string, src Source) Done {
	e.t.Helper()
	ex, err := New(e.cfg, typ, attrs)
	e.must(err)
	done, err := ex.Export(e.t.Context(), src, Request{Group: session.NewGroup("")})
	e.must(err)
	if done.Finalize != nil {
		e.must(done.Finalize(e.t.Context()))
	}
	return done
}

const twoPlatforms = `{"Platforms":[{"ID":"linux/amd64","Platform":{"os":"linux","architecture":"amd64"}},{"ID":"linux/arm64","Platform":{"os":"linux","architecture":"arm64"}}]}`

// What an image is made of is cache as anything else is: there while a build has
// it, and nothing is left of it when it is pruned.
//
// compat: CTL-046, EXP-015
func TestImageIsCache(t *testing.T) {
	e := newEnv(t)
	ref := e.file(nil, "f", "content")
	done := e.exported("image", kv("name=made", "store", "unpack", "name-canonical"), Source{Ref: ref})
	if done.Response["image.name"] != "docker.io/library/made:latest" || done.Response["containerimage.digest"] == "" {
		t.Errorf("response %v", done.Response)
	}
	stored := func() (n int) {
		e.must(e.cfg.Cache.Prune(t.Context(), cache.PruneOptions{All: true}, nil))
		e.must(e.blobs.Walk(func(snapshot.BlobInfo) error {
			n++
			return nil
		}))
		return n
	}
	if n := stored(); n != 1 {
		t.Errorf("%d blobs are stored for an image of one layer", n)
	}
	ref.Release()
	if n := stored(); n != 0 {
		t.Errorf("%d blobs outlive their records", n)
	}
}

// compat: EXP-054
func TestMediaTypes(t *testing.T) {
	e := newEnv(t)
	ref := e.file(nil, "f", "content")
	defer ref.Release()
	for _, c := range []struct {
		attrs                          map[string]string
		index, manifest, config, layer string
	}{
		{kv("oci-mediatypes=true"), ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip},
		{kv("oci-mediatypes=false"), images.MediaTypeDockerSchema2ManifestList, images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2Config, images.MediaTypeDockerSchema2LayerGzip},
		{kv("compression=uncompressed", "force-compression"), ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayer},
		{kv("compression=zstd", "force-compression"), ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerZstd},
	} {
		opts, err := parseImageOptions("image", c.attrs)
		e.must(err)
		img, err := assemble(t.Context(), e.cfg, opts, Source{Ref: ref})
		e.must(err)
		var m ocispec.Manifest
		e.must(json.Unmarshal(img.blobs[len(img.blobs)-1].data, &m))
		if img.root.MediaType != c.manifest || m.MediaType != c.manifest || m.Config.MediaType != c.config || m.Layers[0].MediaType != c.layer {
			t.Errorf("%v: root %s, config %s, layer %s", c.attrs, img.root.MediaType, m.Config.MediaType, m.Layers[0].MediaType)
		}
		if len(m.Layers[0].Annotations) > 0 {
			t.Errorf("%v: internal annotations %v", c.attrs, m.Layers[0].Annotations)
		}
		many, err := assemble(t.Context(), e.cfg, opts, Source{
			Refs:     map[string]*cache.Ref{"linux/amd64": ref, "linux/arm64": ref},
			Metadata: map[string][]byte{"refs.platforms": []byte(twoPlatforms)},
		})
		e.must(err)
		if many.root.MediaType != c.index || many.config != "" {
			t.Errorf("%v: root of an index %s, config %q", c.attrs, many.root.MediaType, many.config)
		}
		seen := map[digest.Digest]bool{}
		for _, b := range many.blobs {
			if seen[b.desc.Digest] {
				t.Errorf("%v: blob %s twice", c.attrs, b.desc.Digest)
			}
			seen[b.desc.Digest] = true
		}
	}
}

func readTar(t *testing.T, data []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	tr := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(content)
	}
}

// compat: EXP-057
func TestArchives(t *testing.T) {
	e := newEnv(t)
	base := e.file(nil, "f", "content")
	defer base.Release()
	ref := e.file(base, "g", "more")
	defer ref.Release()
	pack := func(docker bool, src Source) []byte {
		opts, err := parseImageOptions("oci", kv("name=x,y.io/z:1", "source-date-epoch=1000000000"))
		e.must(err)
		img, err := assemble(t.Context(), e.cfg, opts, src)
		e.must(err)
		names, err := opts.fullNames(nil)
		e.must(err)
		_, desc, err := img.response(names, at(1))
		e.must(err)
		var buf bytes.Buffer
		e.must(archive{image: img, desc: desc, names: names, docker: docker}.write(t.Context(), &buf))
		return buf.Bytes()
	}
	first, again := pack(true, Source{Ref: ref}), pack(true, Source{Ref: ref})
	if !bytes.Equal(first, again) {
		t.Error("the same image gave different bytes")
	}
	files := readTar(t, first)
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	e.must(json.Unmarshal([]byte(files["manifest.json"]), &list))
	if len(list) != 1 || !slices.Equal(list[0].RepoTags, []string{"x:latest", "y.io/z:1"}) || len(list[0].Layers) != 2 {
		t.Fatalf("manifest.json %s", files["manifest.json"])
	}
	var config ocispec.Image
	e.must(json.Unmarshal([]byte(files[list[0].Config]), &config))
	if len(config.RootFS.DiffIDs) != 2 || len(config.History) != 2 || config.History[1].CreatedBy != "write g" {
		t.Errorf("config %s", files[list[0].Config])
	}
	for name, content := range files {
		if hex, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && hex != "" && digest.FromString(content).Encoded() != hex {
			t.Errorf("%s has another content", name)
		}
	}
	var index ocispec.Index
	e.must(json.Unmarshal([]byte(files["index.json"]), &index))
	if len(index.Manifests) != 2 || index.Manifests[1].Annotations["io.containerd.image.name"] != "y.io/z:1" ||
		index.Manifests[1].Annotations[ocispec.AnnotationRefName] != "1" || index.Manifests[0].Annotations[ocispec.AnnotationCreated] == "" {
		t.Errorf("index.json %s", files["index.json"])
	}
	if _, ok := readTar(t, pack(false, Source{Ref: ref}))["manifest.json"]; ok {
		t.Error("an OCI archive has a manifest.json")
	}
	scratch := readTar(t, pack(true, Source{}))
	if !strings.Contains(scratch["manifest.json"], `"Layers":null`) {
		t.Errorf("scratch: %s", scratch["manifest.json"])
	}
	e.must(json.Unmarshal([]byte(scratch["index.json"]), &index))
	if m := scratch["blobs/sha256/"+index.Manifests[0].Digest.Encoded()]; !strings.Contains(m, `"layers": []`) {
		t.Errorf("scratch: %s", m)
	}
}

// compat: EXP-003
func TestDockerArchiveRefusesMaps(t *testing.T) {
	ex, err := New(Config{}, "docker", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ex.Export(t.Context(), Source{Refs: refsOf("a")}, Request{}); err == nil || !strings.Contains(err.Error(), "one platform") {
		t.Errorf("error %v", err)
	}
}

func TestOutputWithoutSession(t *testing.T) {
	e := newEnv(t)
	for _, typ := range []string{"oci", "docker", "tar", "local"} {
		ex, err := New(e.cfg, typ, nil)
		e.must(err)
		if _, err := ex.Export(t.Context(), Source{}, Request{}); err == nil || !strings.Contains(err.Error(), "session") {
			t.Errorf("%s: error %v", typ, err)
		}
	}
}

func TestPushOrder(t *testing.T) {
	e := newEnv(t)
	reg := registrytest.New(t)
	ref := e.file(nil, "f", "content")
	defer ref.Release()
	other := e.file(nil, "g", "other")
	defer other.Release()
	done := e.exported("image", map[string]string{"name": reg.Host + "/a/b:1", "push": "true"}, Source{
		Refs:     map[string]*cache.Ref{"linux/amd64": ref, "linux/arm64": other},
		Metadata: map[string][]byte{"refs.platforms": []byte(twoPlatforms)},
	})
	if !reg.Has("a/b", "1") || !reg.Has("a/b", done.Response["containerimage.digest"]) {
		t.Fatal("the index isn't there")
	}
	var manifests []string
	for _, r := range reg.Requests() {
		switch {
		case strings.HasPrefix(r, "PUT") && strings.Contains(r, "/manifests/"):
			manifests = append(manifests, r)
		case strings.HasPrefix(r, "PUT") && len(manifests) > 0:
			t.Errorf("%s after a manifest", r)
		}
	}
	if len(manifests) != 3 || !strings.Contains(manifests[2], "/manifests/1") {
		t.Errorf("manifests in the order %q", manifests)
	}
}

// A layer that was never fetched and that the registry has is not fetched to
// push it.
func TestPushFetchesNothingThatTheRegistryHas(t *testing.T) {
	e := newEnv(t)
	reg := registrytest.New(t)
	data, diffID := registrytest.Layer(t, map[string]string{"f": "content"})
	desc := reg.Blob("a/b", ocispec.MediaTypeImageLayerGzip, data)
	fetched := &countingSource{}
	ref, err := e.cfg.Cache.GetByBlob(t.Context(), cache.Layer{Blob: desc, DiffID: diffID}, nil, fetched, cache.Options{})
	e.must(err)
	defer ref.Release()
	e.exported("image", map[string]string{"name": reg.Host + "/a/b:2", "push": ""}, Source{Ref: ref})
	if !reg.Has("a/b", "2") || fetched.n > 0 {
		t.Errorf("pushed: %v, layers fetched: %d", reg.Has("a/b", "2"), fetched.n)
	}
}

// countingSource has nothing to give.
type countingSource struct{ n int }

func (s *countingSource) Open(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	s.n++
	return nil, errors.New("not to be fetched")
}

func TestPushErrorsNameTheImage(t *testing.T) {
	e := newEnv(t)
	reg := registrytest.New(t)
	reg.Change(func() {
		reg.Before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
				http.Error(w, "no", http.StatusForbidden)
				return true
			}
			return false
		}
	})
	ex, err := New(e.cfg, "image", map[string]string{"name": reg.Host + "/a/b:1", "push": "true"})
	e.must(err)
	done, err := ex.Export(t.Context(), Source{}, Request{Group: session.NewGroup("")})
	e.must(err)
	if err := done.Finalize(t.Context()); err == nil || !strings.Contains(err.Error(), reg.Host+"/a/b:1") {
		t.Errorf("error %v", err)
	}
	ex, err = New(e.cfg, "image", kv("push"))
	e.must(err)
	if _, err := ex.Export(t.Context(), Source{}, Request{}); err == nil || !strings.Contains(err.Error(), "needs a name") {
		t.Errorf("push without a name: %v", err)
	}
}

// compat: EXP-040
func TestTreeOfPlatforms(t *testing.T) {
	e := newEnv(t)
	a, b := e.file(nil, "f", "A"), e.file(nil, "f", "B")
	defer a.Release()
	defer b.Release()
	src := Source{Refs: map[string]*cache.Ref{"linux/amd64": a, "linux/arm64": b}, Metadata: map[string][]byte{"refs.platforms": []byte(twoPlatforms)}}
	got, err := e.tarOf(nil, src)
	e.must(err)
	if got["linux_amd64/f"] != "A" || got["linux_arm64/f"] != "B" {
		t.Errorf("files %q", got)
	}
	got, err = e.tarOf(nil, Source{Ref: a})
	e.must(err)
	if got["f"] != "A" {
		t.Errorf("files %q", got)
	}
	one := Source{Ref: a, Metadata: map[string][]byte{"refs.platforms": []byte(`{"Platforms":[{"ID":"linux/amd64"}]}`)}}
	got, err = e.tarOf(kv("platform-split"), one)
	e.must(err)
	if got["linux_amd64/f"] != "A" {
		t.Errorf("files %q", got)
	}
	if _, err := e.tarOf(kv("platform-split"), Source{Ref: a}); err == nil {
		t.Error("a directory per platform of a result without any")
	}
	if _, err := e.tarOf(kv("platform-split=false"), src); err == nil {
		t.Error("two platforms overwrote one another")
	}
}
