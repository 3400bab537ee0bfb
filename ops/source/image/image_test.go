package image

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm64 = ocispec.Platform{OS: "linux", Architecture: "arm64"}
)

// daemon is what a source works with, on a state directory.
type daemon struct {
	*Source
	cache *cache.Manager
	close func()
}

func start(t *testing.T, root string) *daemon {
	t.Helper()
	c := cachetest.Open(t, root)
	sm, err := session.NewManager()
	must(t, err)
	client := registry.New(registry.Config{})
	t.Cleanup(client.Close)
	return &daemon{cache: c.Manager, close: c.Shut, Source: New(Options{Cache: c.Manager, Store: c.Store, Registry: client, Sessions: sm})}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (d *daemon) resolve(t *testing.T, ref string, p ocispec.Platform, attrs map[string]string) ops.SourceInstance {
	t.Helper()
	i, err := d.Resolve(&pb.SourceOp{Identifier: "docker-image://" + ref, Attrs: attrs}, p)
	must(t, err)
	return i
}

// files lists what ref holds.
func files(t *testing.T, ref *cache.Ref) map[string]string {
	t.Helper()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	out := map[string]string{}
	entries, err := os.ReadDir(view.Path())
	must(t, err)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(view.Path(), e.Name()))
		must(t, err)
		out[e.Name()] = string(data)
	}
	return out
}

func check(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" {
		must(t, err)
	} else if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

// compat: LLB-090, X-1
func TestPull(t *testing.T) {
	reg := registrytest.New(t)
	root := reg.Push(t, "a/b", "1",
		registrytest.Image{Platform: amd64, Layers: []map[string]string{{"f": "amd", "g": "lower"}, {"g": "upper"}}},
		registrytest.Image{Platform: arm64, Layers: []map[string]string{{"f": "arm"}}})
	dir := t.TempDir()
	d := start(t, dir)
	ref := reg.Host + "/a/b:1"

	var mu sync.Mutex
	var seen []string
	ctx := progress.With(t.Context(), progress.NewScope(progress.WriterFunc(func(e progress.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Status != nil && e.Status.Completed != nil {
			seen = append(seen, e.Status.ID)
		}
	}), "sha256:x"))
	i := d.resolve(t, ref, amd64, nil)
	key, more, err := i.CacheKey(ctx, nil, 0)
	must(t, err)
	if more {
		t.Error("more than one key")
	}
	if !slices.Equal(seen, []string{"resolve " + ref}) {
		t.Errorf("statuses %q", seen)
	}
	if want := digest.FromString(fmt.Sprintf(`{"Digest":%q,"OS":"linux","Arch":"amd64"}`, root.Digest)).String(); key != want {
		t.Errorf("key %s, want %s", key, want)
	}
	r, err := i.Fetch(ctx, nil)
	must(t, err)
	if got := reg.Requests(); len(got) != 4 || got[0] != "HEAD /v2/a/b/manifests/1" || !strings.Contains(got[3], "/blobs/") {
		t.Errorf("requests for index, manifest and config: %q", got)
	}
	if got := r.Description(); got != "pulled from "+ref {
		t.Errorf("description %q", got)
	}
	if got := files(t, r); got["f"] != "amd" || got["g"] != "upper" {
		t.Errorf("got %v", got)
	}
	if n := len(reg.Requests()); n != 2 {
		t.Errorf("%d requests for two layers", n)
	}
	r.Release()

	other, err := d.resolve(t, ref, arm64, nil).Fetch(ctx, nil)
	must(t, err)
	if got := files(t, other); got["f"] != "arm" {
		t.Errorf("arm64 got %v", got)
	}
	other.Release()

	// A digest whose manifest was seen needs no registry, not even after a
	// restart; by another name it does.
	d.close()
	d = start(t, dir)
	reg.Requests()
	pinned := reg.Host + "/a/b@" + root.Digest.String()
	again, _, err := d.resolve(t, pinned, amd64, nil).CacheKey(ctx, nil, 0)
	must(t, err)
	if again != key {
		t.Errorf("key of the digest %s, of the tag %s", again, key)
	}
	if got := reg.Requests(); len(got) != 0 {
		t.Errorf("requests %q", got)
	}
	_, _, err = d.resolve(t, reg.Host+"/other@"+root.Digest.String(), amd64, nil).CacheKey(ctx, nil, 0)
	if !errdefs.IsNotFound(err) {
		t.Errorf("another repository: %v", err)
	}
}

// compat: LLB-090
func TestScratch(t *testing.T) {
	reg := registrytest.New(t)
	reg.Push(t, "empty", "1", registrytest.Image{Platform: amd64})
	d := start(t, t.TempDir())
	r, err := d.resolve(t, reg.Host+"/empty:1", amd64, nil).Fetch(t.Context(), nil)
	must(t, err)
	if r != nil {
		t.Errorf("got %s", r.ID())
	}
}

// compat: LLB-092, LLB-093, LLB-094
func TestAttrs(t *testing.T) {
	reg := registrytest.New(t)
	root := reg.Push(t, "a", "1", registrytest.Image{Platform: amd64, Layers: []map[string]string{{"one": "1"}, {"two": "2"}}})
	d := start(t, t.TempDir())
	ref := reg.Host + "/a:1"

	i := d.resolve(t, ref, amd64, map[string]string{pb.AttrImageLayerLimit: "1", pb.AttrImageChecksum: root.Digest.String(), pb.AttrImageRecordType: "frontend"})
	key, _, err := i.CacheKey(t.Context(), nil, 0)
	must(t, err)
	if want := digest.FromString(fmt.Sprintf(`{"Digest":%q,"OS":"linux","Arch":"amd64","Limit":1}`, root.Digest)).String(); key != want {
		t.Errorf("key %s, want %s", key, want)
	}
	r, err := i.Fetch(t.Context(), nil)
	must(t, err)
	if got := files(t, r); len(got) != 1 || got["one"] != "1" {
		t.Errorf("got %v", got)
	}
	r.Release()

	for attr, tt := range map[string]struct{ value, resolve, load string }{
		pb.AttrImageLayerLimit:  {value: "3", load: "layer limit 3 is greater than the number of layers"},
		pb.AttrImageChecksum:    {value: digest.FromString("x").String(), load: "does not match expected checksum"},
		pb.AttrImageResolveMode: {value: "sometimes", resolve: "invalid resolvemode"},
		pb.AttrImageRecordType:  {value: "odd", resolve: "invalid record type"},
	} {
		i, err := d.Resolve(&pb.SourceOp{Identifier: "docker-image://" + ref, Attrs: map[string]string{attr: tt.value}}, amd64)
		if tt.resolve != "" {
			check(t, err, tt.resolve)
			continue
		}
		must(t, err)
		_, _, err = i.CacheKey(t.Context(), nil, 0)
		check(t, err, tt.load)
	}
	for _, v := range []string{"0", "-1", "x", ""} {
		_, err := d.Resolve(&pb.SourceOp{Identifier: "docker-image://" + ref, Attrs: map[string]string{pb.AttrImageLayerLimit: v}}, amd64)
		check(t, err, "invalid layer limit")
	}
}

// compat: LLB-091
func TestModes(t *testing.T) {
	reg := registrytest.New(t)
	old := reg.Push(t, "a", "1", registrytest.Image{Platform: amd64})
	d := start(t, t.TempDir())
	ref := reg.Host + "/a:1"
	ask := func(mode string) (Meta, error) {
		return d.ResolveMeta(t.Context(), MetaRequest{Ref: ref, Platform: amd64, Mode: mode})
	}
	if m, err := ask("local"); err != nil || m.Digest != old.Digest {
		t.Errorf("local, unknown: %v, %v", m.Digest, err)
	}
	reg.Push(t, "a", "1", registrytest.Image{Platform: amd64, Env: []string{"A=B"}})
	if m, err := ask("local"); err != nil || m.Digest != old.Digest {
		t.Errorf("local, known: %v, %v", m.Digest, err)
	}
	for _, mode := range []string{"", "default", "pull"} {
		if m, err := ask(mode); err != nil || m.Digest == old.Digest {
			t.Errorf("%q: the old digest, %v", mode, err)
		}
	}
	_, err := ask("never")
	check(t, err, "invalid resolvemode")
}

// A build sees one state of a tag: on all platforms, in steps and for who asks
// about it. Another build sees what is there then.
//
// compat: LLB-117
func TestOnce(t *testing.T) {
	reg := registrytest.New(t)
	both := func(version string) ocispec.Descriptor {
		return reg.Push(t, "a", "1", registrytest.Image{Platform: amd64, Env: []string{"V=" + version}}, registrytest.Image{Platform: arm64, Env: []string{"V=" + version}})
	}
	old := both("1")
	d := start(t, t.TempDir())
	ref := reg.Host + "/a:1"
	first, second := (&ops.Build{}).Group(), (&ops.Build{}).Group()
	key := func(g session.Group, p ocispec.Platform) string {
		key, _, err := d.resolve(t, ref, p, nil).CacheKey(t.Context(), g, 0)
		must(t, err)
		return key
	}
	want := func(root ocispec.Descriptor, p ocispec.Platform) string {
		key, err := manifestKey(root.Digest, p, nil)
		must(t, err)
		return key
	}
	if got := key(first, amd64); got != want(old, amd64) {
		t.Errorf("amd64: key %s", got)
	}
	moved := both("2")
	reg.Requests()
	if got := key(first, arm64); got != want(old, arm64) {
		t.Errorf("arm64, after the tag moved: key %s isn't of what amd64 got", got)
	}
	m, err := d.ResolveMeta(t.Context(), MetaRequest{Ref: ref, Platform: amd64, Mode: "pull", Group: first})
	if err != nil || m.Digest != old.Digest {
		t.Errorf("asked about it, it is %s: %v", m.Digest, err)
	}
	for _, r := range reg.Requests() {
		if strings.Contains(r, "/manifests/1") {
			t.Errorf("the tag is asked for again: %s", r)
		}
	}
	if got := key(second, arm64); got != want(moved, arm64) {
		t.Errorf("another build: key %s", got)
	}
}

// compat: GW-021
func TestResolveMeta(t *testing.T) {
	reg := registrytest.New(t)
	root := reg.Push(t, "a", "1",
		registrytest.Image{Platform: amd64, Env: []string{"ARCH=amd"}},
		registrytest.Image{Platform: arm64, Env: []string{"ARCH=arm"}})
	d := start(t, t.TempDir())
	m, err := d.ResolveMeta(t.Context(), MetaRequest{Ref: reg.Host + "/a:1", Platform: arm64})
	must(t, err)
	if m.Digest != root.Digest || m.Ref != reg.Host+"/a:1" || !strings.Contains(string(m.Config), "ARCH=arm") {
		t.Errorf("got %s %s %s", m.Ref, m.Digest, m.Config)
	}
	reg.Requests()
	m, err = d.ResolveMeta(t.Context(), MetaRequest{Ref: reg.Host + "/a:1", NoConfig: true})
	must(t, err)
	if m.Digest != root.Digest || m.Config != nil {
		t.Errorf("without config: %s %s", m.Digest, m.Config)
	}
	if got := reg.Requests(); len(got) != 1 || !strings.HasPrefix(got[0], "HEAD") {
		t.Errorf("requests %q", got)
	}
	_, err = d.ResolveMeta(t.Context(), MetaRequest{Ref: reg.Host + "/none:1", Platform: arm64})
	check(t, err, reg.Host+"/none:1: not found")
	_, err = d.ResolveMeta(t.Context(), MetaRequest{Ref: reg.Host + "/a:1", Platform: ocispec.Platform{OS: "plan9", Architecture: "mips"}})
	check(t, err, "has no image for plan9/mips, only for linux/amd64, linux/arm64")
}

func TestBadImages(t *testing.T) {
	reg := registrytest.New(t)
	d := start(t, t.TempDir())
	ref := reg.Host + "/bad:x"
	config := reg.Blob("bad", ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"diff_ids":[]}}`))
	layer := reg.Blob("bad", ocispec.MediaTypeImageLayer, []byte("layer"))
	text := reg.Blob("bad", "text/plain", []byte("helm"))
	two := reg.Blob("bad", ocispec.MediaTypeImageConfig, []byte(`{"rootfs":{"diff_ids":["sha256:x"]}}`))
	manifest := func(c ocispec.Descriptor, layers ...ocispec.Descriptor) []byte {
		var m ocispec.Manifest
		m.SchemaVersion, m.Config, m.Layers = 2, c, layers
		return registrytest.JSON(t, m)
	}
	odd := layer
	odd.Digest = "md5:1234"
	silent := reg.Manifest("bad", "", ocispec.MediaTypeImageManifest, manifest(config))
	for name, tt := range map[string]struct {
		mediaType string
		data      []byte
		want      string
	}{
		"schema1":        {images.MediaTypeDockerSchema1Manifest, []byte(`{"schemaVersion":1}`), "schema version 1"},
		"schema1 hidden": {ocispec.MediaTypeImageManifest, []byte(`{"schemaVersion":1,"fsLayers":[]}`), "schema version 1"},
		"no JSON":        {ocispec.MediaTypeImageManifest, []byte(`<html>`), "isn't valid JSON"},
		"nothing":        {ocispec.MediaTypeImageManifest, []byte(`{}`), "neither an image manifest nor an index"},
		"both":           {ocispec.MediaTypeImageManifest, []byte(`{"layers":[],"manifests":[]}`), "ambiguous"},
		"other type":     {ocispec.MediaTypeImageIndex, manifest(config), "doesn't have the form"},
		"layers missing": {ocispec.MediaTypeImageManifest, manifest(two), "manifest has 0 layers"},
		"no layer type":  {ocispec.MediaTypeImageManifest, manifest(two, text), "layer 1 has the media type \"text/plain\""},
		"layer digest":   {ocispec.MediaTypeImageManifest, manifest(two, odd), "layer 1 has the digest"},
		"diff ID":        {ocispec.MediaTypeImageManifest, manifest(two, layer), "layer 1 has the diff ID"},
		"config":         {ocispec.MediaTypeImageManifest, manifest(layer), "not a container image"},
		"no config":      {ocispec.MediaTypeImageManifest, []byte(`{"layers":[]}`), "names a blob with the digest \"\""},
		"empty index":    {ocispec.MediaTypeImageIndex, []byte(`{"manifests":[]}`), "has no image for linux/amd64"},
		"attestations only": {ocispec.MediaTypeImageIndex, registrytest.JSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{{
			MediaType: silent.MediaType, Digest: silent.Digest, Size: silent.Size, Annotations: map[string]string{attestationKey: "attestation-manifest"},
		}}}), "has no image for linux/amd64"},
		"no platform": {ocispec.MediaTypeImageIndex, registrytest.JSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{silent}}), "has no image for linux/amd64"},
	} {
		reg.Manifest("bad", "x", tt.mediaType, tt.data)
		_, err := d.ResolveMeta(t.Context(), MetaRequest{Ref: ref, Platform: amd64})
		if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), ref) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}
	nested := silent
	for range maxDepth {
		nested = reg.Manifest("bad", "", ocispec.MediaTypeImageIndex, registrytest.JSON(t, ocispec.Index{Manifests: []ocispec.Descriptor{nested}}))
	}
	_, err := d.ResolveMeta(t.Context(), MetaRequest{Ref: reg.Host + "/bad@" + nested.Digest.String(), Platform: amd64})
	check(t, err, "nested more than")
}

func TestLyingRegistry(t *testing.T) {
	reg := registrytest.New(t)
	root := reg.Push(t, "a", "1", registrytest.Image{Platform: amd64, Layers: []map[string]string{{"f": "true"}}})
	d := start(t, t.TempDir())
	ref := reg.Host + "/a:1"

	i := d.resolve(t, ref, amd64, nil)
	reg.Change(func() {
		reg.Lie = func(kind string, data []byte) []byte {
			if kind == "manifest" {
				return []byte(strings.Replace(string(data), ":2", ":2 ", 1))
			}
			return data
		}
	})
	_, _, err := i.CacheKey(t.Context(), nil, 0)
	check(t, err, "asked for "+root.Digest.String()+", got content with the digest sha256:")

	reg.Change(func() { reg.Lie = nil })
	r, err := i.Fetch(t.Context(), nil)
	must(t, err)
	defer r.Release()
	reg.Change(func() {
		reg.Lie = func(_ string, data []byte) []byte { data = slices.Clone(data); data[len(data)/2] ^= 1; return data }
	})
	if err := r.Extract(t.Context()); err == nil {
		t.Error("a corrupt layer was unpacked")
	}
}

// TestFetchLater shows that layers come with the sessions of who needs them,
// long after the image was resolved, and that failures don't stick.
func TestFetchLater(t *testing.T) {
	reg := registrytest.New(t)
	reg.Push(t, "a", "1", registrytest.Image{Platform: amd64, Layers: []map[string]string{{"f": "x"}}})
	d := start(t, t.TempDir())
	i := d.resolve(t, reg.Host+"/a:1", amd64, nil)

	reg.Change(func() {
		reg.Before = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true }
	})
	_, _, err := i.CacheKey(t.Context(), nil, 0)
	check(t, err, "access denied")
	reg.Change(func() { reg.Before = nil })
	_, _, err = i.CacheKey(t.Context(), nil, 0)
	must(t, err)

	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := i.Fetch(ctx, nil)
	must(t, err)
	defer r.Release()
	cancel(nil)
	if got := files(t, r); got["f"] != "x" {
		t.Errorf("got %v", got)
	}
}

// compat: LLB-095, LLB-159
func TestBlob(t *testing.T) {
	reg := registrytest.New(t)
	desc := reg.Blob("a", "text/plain", []byte("content"))
	d := start(t, t.TempDir())
	op := func(ref string, attrs map[string]string) *pb.SourceOp {
		return &pb.SourceOp{Identifier: "docker-image+blob://" + ref, Attrs: attrs}
	}
	ref := reg.Host + "/a@" + desc.Digest.String()
	i, err := d.Resolve(op(ref, map[string]string{pb.AttrHTTPFilename: "../x.txt", pb.AttrHTTPPerm: "0640", pb.AttrHTTPUID: "5", pb.AttrHTTPGID: "6"}), amd64)
	must(t, err)
	key, _, err := i.CacheKey(t.Context(), nil, 0)
	must(t, err)
	if want := digest.FromString(fmt.Sprintf(`{"Version":"v1","Digest":%q,"Filename":"x.txt","Perm":416,"UID":5,"GID":6}`, desc.Digest)).String(); key != want {
		t.Errorf("key %s, want %s", key, want)
	}
	if got := reg.Requests(); len(got) != 0 {
		t.Errorf("the key took %q", got)
	}
	r, err := i.Fetch(t.Context(), nil)
	must(t, err)
	defer r.Release()
	view, err := r.Open(t.Context())
	must(t, err)
	defer view.Close()
	st, err := os.Stat(filepath.Join(view.Path(), "x.txt"))
	must(t, err)
	if st.Mode().Perm() != 0o640 || st.ModTime().Unix() != 0 || st.Size() != 7 {
		t.Errorf("got %v %v", st.Mode(), st.ModTime())
	}

	for ref, want := range map[string]string{
		reg.Host + "/a:tag":                                "without a tag",
		reg.Host + "/a:tag@" + desc.Digest.String():        "without a tag",
		reg.Host + "/a@" + digest.FromString("x").String(): "",
	} {
		i, err := d.Resolve(op(ref, nil), amd64)
		if want != "" {
			check(t, err, want)
			continue
		}
		must(t, err)
		if _, err = i.Fetch(t.Context(), nil); !errdefs.IsNotFound(err) {
			t.Errorf("missing blob: %v", err)
		}
	}
	reg.Change(func() { reg.Lie = func(string, []byte) []byte { return []byte("c0ntent") } })
	i, err = d.Resolve(op(ref, nil), amd64)
	must(t, err)
	_, err = i.Fetch(t.Context(), nil)
	check(t, err, "got content with the digest")
}

func TestKnownIsBounded(t *testing.T) {
	db, err := store.Open(store.Options{Root: t.TempDir()})
	must(t, err)
	defer db.Close()
	k := openKnown(db)
	for i := range maxKnown + 10 {
		data := fmt.Append(nil, i)
		k.putBlob("r", ocispec.Descriptor{Digest: digest.FromBytes(data), MediaType: "m"}, data)
	}
	n := 0
	db.Scan(bucket, "", func(string, []byte) bool { n++; return true })
	if n > maxKnown || n < maxKnown/4 || n != k.count {
		t.Errorf("%d entries, %d counted", n, k.count)
	}
	last := fmt.Append(nil, maxKnown+9)
	if data, desc, ok := k.blob("r", digest.FromBytes(last)); !ok || string(data) != string(last) || desc.MediaType != "m" {
		t.Error("the newest entry is gone")
	}
	if openKnown(db).count != n {
		t.Error("another count after opening")
	}
}

func FuzzParseDocument(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:x"},"layers":[]}`), ocispec.MediaTypeImageManifest)
	f.Add([]byte(`{"manifests":[{"platform":{"os":"linux"}}]}`), "")
	f.Fuzz(func(t *testing.T, data []byte, mediaType string) {
		doc, err := parseDocument(data, mediaType)
		if err == nil && doc.isIndex {
			choose(doc.Manifests, amd64)
		}
	})
}

// A pull is shared with those who would ask the same repository in the same
// right; by another name, the same image may be another's to give.
func TestPullSharing(t *testing.T) {
	d := start(t, t.TempDir())
	dgst := digest.FromString("x").String()
	key := func(ref string) string {
		t.Helper()
		k, err := d.resolve(t, ref, amd64, nil).(ops.SharedSource).SharingKey(t.Context(), session.NewGroup())
		must(t, err)
		return k
	}
	if key("host/a:1") != key("host/a@"+dgst) {
		t.Error("a tag and a digest of a repository are not shared")
	}
	if key("host/a@"+dgst) == key("host/b@"+dgst) || key("host/a@"+dgst) == key("elsewhere/a@"+dgst) {
		t.Error("repositories share pulls")
	}
	store := sharedByOrigin(t, clientStore{}, "one")
	if store != sharedByOrigin(t, clientStore{}, "one") || store == sharedByOrigin(t, clientStore{}, "two") {
		t.Error("a client's own store is not read for that client alone")
	}
}

// clientStore is an Origin that clients have themselves.
type clientStore struct{ Origin }

func sharedByOrigin(t *testing.T, o Origin, sessions ...string) string {
	t.Helper()
	k, err := NewInstance(nil, Spec{}, o).SharingKey(t.Context(), session.NewGroup(sessions...))
	must(t, err)
	return k
}
