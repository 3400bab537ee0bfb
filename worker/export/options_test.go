package export

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func kv(pairs ...string) map[string]string {
	out := map[string]string{}
	for _, p := range pairs {
		k, v, _ := strings.Cut(p, "=")
		out[k] = v
	}
	return out
}

// compat: EXP-008, EXP-030
func TestBadAttributes(t *testing.T) {
	for _, c := range []struct {
		typ   string
		attrs map[string]string
		want  []string
	}{
		{"nope", nil, []string{`"nope"`, "image", "tar"}},
		{"", nil, []string{"no exporter"}},
		{"image", kv("push=maybe"), []string{"push", "maybe"}},
		{"image", kv("name=UPPER"), []string{"UPPER"}},
		{"image", kv("name=ok,also bad"), []string{"also bad"}},
		{"image", kv("compression=lzma"), []string{"lzma", "gzip"}},
		{"image", kv("compression=gzip", "compression-level=10"), []string{"10", "0 to 9"}},
		{"image", kv("compression-level=x"), []string{"compression-level", "x"}},
		{"image", kv("compression=zstd", "oci-mediatypes=false"), []string{"zstd", "oci-mediatypes"}},
		{"image", kv("source-date-epoch=now"), []string{"source-date-epoch", "now"}},
		{"image", kv("rewrite-timestamp=true"), []string{"rewrite-timestamp"}},
		{"image", kv("annotation-bogus.k=v"), []string{"annotation-bogus.k"}},
		{"image", kv("annotation[not a platform].k=v"), []string{"annotation"}},
		{"oci", kv("tar=false"), []string{"tar=false"}},
		{"oci", kv("tar=x"), []string{"tar", "x"}},
		{"local", kv("mode=sync"), []string{"mode", "sync"}},
		{"tar", kv("mode=copy"), []string{"type=local"}},
		{"tar", kv("platform-split=x"), []string{"platform-split"}},
	} {
		_, err := New(Config{}, c.typ, c.attrs)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s %v: error %v, want %q", c.typ, c.attrs, err, want)
			}
		}
	}
}

// compat: EXP-030, EXP-031
func TestImageOptions(t *testing.T) {
	o, err := parseImageOptions("image", kv("name=a,b:1", "push", "registry.insecure=1", "name-canonical=", "compression=zstd",
		"compression-level=3", "force-compression=true", "dangling-name-prefix=d", "danging-name-empty-only=true", "my.own=x", "source-date-epoch=7"))
	if err != nil {
		t.Fatal(err)
	}
	if !o.push || !o.insecure || !o.danglingIfEmpty || !o.compression.Force || *o.compression.Level != 3 || o.epoch.time.Unix() != 7 {
		t.Errorf("options %+v", o)
	}
	if string(o.metadata["my.own"]) != "x" || len(o.metadata) != 1 {
		t.Errorf("metadata %q", o.metadata)
	}
	names, err := o.fullNames(nil)
	if err != nil || !slices.Equal(names, []string{"docker.io/library/a:latest", "docker.io/library/b:1"}) {
		t.Errorf("names %q, %v", names, err)
	}
}

// compat: EXP-010, EXP-144
func TestNamesOfTheFrontend(t *testing.T) {
	o := imageOptions{names: []string{"*", "x"}}
	names, err := o.fullNames(map[string][]byte{"image.name": []byte("a:1,b")})
	if err != nil || !slices.Equal(names, []string{"docker.io/library/a:1", "docker.io/library/b:latest", "docker.io/library/x:latest"}) {
		t.Errorf("names %q, %v", names, err)
	}
	if _, err := o.fullNames(map[string][]byte{"image.name": []byte("BAD NAME")}); err == nil {
		t.Error("a bad name of the frontend was accepted")
	}
}

// compat: EXP-016, EXP-017
func TestLocalNames(t *testing.T) {
	dgst := digest.FromString("x")
	for _, c := range []struct {
		attrs map[string]string
		names []string
		want  []string
	}{
		{nil, nil, nil},
		{nil, []string{"r/a:1"}, []string{"r/a:1"}},
		{kv("dangling-name-prefix=d"), nil, []string{"d@" + dgst.String()}},
		{kv("dangling-name-prefix=d"), []string{"r/a:1"}, []string{"r/a:1", "d@" + dgst.String()}},
		{kv("dangling-name-prefix=d", "danging-name-empty-only"), []string{"r/a:1"}, []string{"r/a:1"}},
		{kv("dangling-name-prefix=d", "danging-name-empty-only"), nil, []string{"d@" + dgst.String()}},
	} {
		o, err := parseImageOptions("image", c.attrs)
		if err != nil {
			t.Fatal(err)
		}
		e := &imageExporter{opts: o}
		if got := e.withDangling(c.names, dgst); !slices.Equal(got, c.want) {
			t.Errorf("%v of %q: %q, want %q", c.attrs, c.names, got, c.want)
		}
	}
}

func TestEpochPrecedence(t *testing.T) {
	md := map[string][]byte{"source.date.epoch": []byte("100"), "source.date.epoch/linux/arm64": []byte("200")}
	set := func(v string) epoch {
		e, err := parseEpoch(v)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	for _, c := range []struct {
		e        epoch
		platform string
		want     int64 // -1 is none
	}{
		{epoch{}, "", 100}, {epoch{}, "linux/arm64", 200}, {epoch{}, "linux/amd64", 100},
		{set("5"), "linux/arm64", 5}, {set(""), "linux/arm64", -1},
	} {
		got, err := c.e.or(md, c.platform)
		if err != nil {
			t.Fatal(err)
		}
		if (got.time == nil) != (c.want < 0) || got.time != nil && got.time.Unix() != c.want {
			t.Errorf("%+v for %q: %v, want %d", c.e, c.platform, got.time, c.want)
		}
	}
	if _, err := (epoch{}).or(map[string][]byte{"source.date.epoch": []byte("x")}, ""); err == nil {
		t.Error("a bad epoch of the frontend was accepted")
	}
	if now := at(3); set("").created(now) != now || set("5").created(now) != time.Unix(5, 0).UTC() {
		t.Error("created ignores the epoch")
	}
}

// compat: EXP-028, EXP-145
func TestAnnotations(t *testing.T) {
	var a annotations
	for _, k := range []string{"annotation.k=1", "annotation-manifest[linux/amd64].k=2", "annotation[linux/arm64].only=3",
		"annotation-manifest-descriptor.d=4", "annotation-index.i=5", "annotation-index[linux/amd64].p=6", "annotation-index-descriptor.x.y=7"} {
		k, v, _ := strings.Cut(k, "=")
		if err := a.add(k, v); err != nil {
			t.Fatal(err)
		}
	}
	a, err := a.with(map[string][]byte{"annotation.k": []byte("md"), "annotations": []byte("of a frontend's own"), "image.name": nil})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ where, platform, want string }{
		{onManifest, "", "map[k:md]"}, {onManifest, "linux/amd64", "map[k:2]"}, {onManifest, "linux/arm64", "map[k:md only:3]"},
		{onManifestDescriptor, "linux/arm64", "map[d:4]"}, {onIndex, "", "map[i:5 p:6]"}, {onIndexDescriptor, "", "map[x.y:7]"},
	} {
		if got := fmt.Sprint(a.at(c.where, c.platform)); got != c.want {
			t.Errorf("%s %q: %s, want %s", c.where, c.platform, got, c.want)
		}
	}
	all := map[string]bool{"linux/amd64": true, "linux/arm64": true}
	if err := a.check(all, true, true); err != nil {
		t.Error(err)
	}
	for want, err := range map[string]error{
		"several platforms":   a.check(all, false, true),
		"oci-mediatypes=true": a.check(all, true, false),
		"linux/arm64":         a.check(map[string]bool{"linux/amd64": true}, true, true),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	plain := annotations{}
	if err := plain.add("annotation.k", "v"); err != nil {
		t.Fatal(err)
	}
	if err := plain.check(nil, false, false); err != nil {
		t.Errorf("manifests of Docker's media types may have annotations: %v", err)
	}
}

func TestParts(t *testing.T) {
	const two = `{"Platforms":[{"ID":"a","Platform":{"os":"linux","architecture":"amd64"}},{"ID":"b","Platform":{"os":"linux","architecture":"arm64"}}]}`
	md := func(v string) map[string][]byte { return map[string][]byte{"refs.platforms": []byte(v)} }
	for _, c := range []struct {
		name string
		src  Source
		ids  []string
		want string // error
	}{
		{"One", Source{}, []string{""}, ""},
		{"OneNamed", Source{Metadata: md(`{"Platforms":[{"ID":"a"}]}`)}, []string{"a"}, ""},
		{"OneForTwo", Source{Metadata: md(two)}, nil, "2 platforms"},
		{"Garbage", Source{Metadata: md(`[`)}, nil, "refs.platforms"},
		{"UnlistedMap", Source{Refs: refsOf("a")}, nil, "doesn't list"},
		{"Two", Source{Refs: refsOf("a", "b"), Metadata: md(two)}, []string{"a", "b"}, ""},
		{"Missing", Source{Refs: refsOf("a"), Metadata: md(two)}, nil, "nothing for it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, isMap, err := parts(c.src)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q", err, c.want)
			}
			var ids []string
			for _, p := range got {
				ids = append(ids, p.id)
			}
			if !slices.Equal(ids, c.ids) || err == nil && isMap != (c.src.Refs != nil) {
				t.Errorf("platforms %q, map %v", ids, isMap)
			}
		})
	}
}

func TestFileOptions(t *testing.T) {
	o, err := parseFileOptions("local", kv("platform-split=false", "source-date-epoch=5", "mode=delete", "attestation-prefix=x", "unknown=1"))
	if err != nil || o.split == nil || *o.split || o.epoch.time.Unix() != 5 {
		t.Errorf("options %+v, %v", o, err)
	}
}

func FuzzAttributes(f *testing.F) {
	f.Add("image", "annotation-manifest[linux/amd64].k", "v")
	f.Add("oci", "name", "a,b@sha256:x,*")
	f.Fuzz(func(t *testing.T, typ, k, v string) {
		attrs := map[string]string{k: v}
		before := maps.Clone(attrs)
		_, _ = New(Config{}, typ, attrs)
		if !maps.Equal(attrs, before) {
			t.Errorf("attributes were changed to %q", attrs)
		}
	})
}
