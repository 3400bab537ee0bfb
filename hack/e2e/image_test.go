//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layout is an image as it came out: an archive's or a registry's content.
type layout struct {
	index    ocispec.Index
	manifest ocispec.Manifest
	config   ocispec.Image
	blob     func(digest.Digest) []byte
}

// readArchive reads an OCI or Docker archive of one image and checks every
// digest in it.
func readArchive(t *testing.T, path string) (layout, map[string][]byte) {
	t.Helper()
	l, content := readArchiveIndex(t, path)
	l.load(t, l.index.Manifests[0].Digest)
	return l, content
}

// readArchiveIndex is readArchive for an image of several platforms, none of
// which is loaded yet.
func readArchiveIndex(t *testing.T, path string) (layout, map[string][]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := map[string][]byte{}
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if content[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	var l layout
	unmarshal(t, content["index.json"], &l.index)
	l.blob = func(d digest.Digest) []byte {
		data, ok := content["blobs/sha256/"+d.Encoded()]
		if !ok {
			t.Fatalf("archive lacks %s", d)
		}
		if digest.FromBytes(data) != d {
			t.Fatalf("blob %s has other content", d)
		}
		return data
	}
	if m := l.index.Manifests[0]; m.MediaType == ocispec.MediaTypeImageIndex {
		l.index = ocispec.Index{}
		unmarshal(t, l.blob(m.Digest), &l.index)
	}
	return l, content
}

func (l *layout) load(t *testing.T, manifest digest.Digest) {
	t.Helper()
	unmarshal(t, l.blob(manifest), &l.manifest)
	unmarshal(t, l.blob(l.manifest.Config.Digest), &l.config)
	if len(l.manifest.Layers) != len(l.config.RootFS.DiffIDs) {
		t.Fatalf("%d layers, %d diff ids", len(l.manifest.Layers), len(l.config.RootFS.DiffIDs))
	}
	layers := 0
	for _, h := range l.config.History {
		if !h.EmptyLayer {
			layers++
		}
		if h.Created == nil {
			t.Errorf("history entry %q has no time", h.CreatedBy)
		}
	}
	if layers != len(l.manifest.Layers) {
		t.Errorf("history speaks of %d layers, there are %d", layers, len(l.manifest.Layers))
	}
}

// entries lists a layer's tar entries and checks its diff ID.
func (l *layout) entries(t *testing.T, i int) []string {
	t.Helper()
	desc := l.manifest.Layers[i]
	raw := l.blob(desc.Digest)
	var r io.Reader = bytes.NewReader(raw)
	var err error
	switch {
	case strings.HasSuffix(desc.MediaType, "gzip"):
		r, err = gzip.NewReader(r)
	case strings.HasSuffix(desc.MediaType, "zstd"):
		r, err = zstd.NewReader(r)
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(data); got != l.config.RootFS.DiffIDs[i] {
		t.Errorf("layer %d unpacks to %s, the config says %s", i, got, l.config.RootFS.DiffIDs[i])
	}
	var out []string
	tr := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, h.Name)
	}
}

func unmarshal(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%v in %s", err, data)
	}
}

// readImage reads name:tag from the test registry.
func readImage(t *testing.T, name, tag string) layout {
	t.Helper()
	return readImageOf(t, env.reg, name, tag)
}

// readImageOf reads name:tag from a registry and checks every digest.
func readImageOf(t *testing.T, reg *harness.Registry, name, tag string) layout {
	t.Helper()
	get := func(path string) []byte {
		resp, err := reg.Get(name+path, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.v2+json")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s%s: %s %v", name, path, resp.Status, err)
		}
		return data
	}
	raw := get("/manifests/" + tag)
	var l layout
	l.blob = func(d digest.Digest) []byte {
		if d == digest.FromBytes(raw) {
			return raw
		}
		data := get("/blobs/" + d.String())
		if digest.FromBytes(data) != d {
			t.Fatalf("blob %s has other content", d)
		}
		return data
	}
	l.load(t, digest.FromBytes(raw))
	return l
}

// archive builds to an archive and reads it.
func (d *daemon) archive(typ, dockerfile string, ctx files, attrs string, args ...string) (layout, map[string][]byte) {
	d.t.Helper()
	path := filepath.Join(d.t.TempDir(), "image.tar")
	d.dockerfile(dockerfile, ctx, append(args, "--output", fmt.Sprintf("type=%s,dest=%s%s", typ, path, attrs))...).must(d.t)
	return readArchive(d.t, path)
}

const configured = `FROM BASE
LABEL a=b c="d e"
ENV E=1
EXPOSE 80 53/udp
VOLUME /data
USER daemon
WORKDIR /w
STOPSIGNAL SIGUSR1
HEALTHCHECK --interval=5s --retries=2 CMD true
ENTRYPOINT ["/bin/sh"]
CMD ["-c", "echo hi"]
RUN true
COPY f /f
`

// compat: DF-083, DF-084, DF-086, DF-097, DF-098, DF-099, DF-130, DF-133, EXP-002, EXP-051, EXP-057
func TestOCIArchive(t *testing.T) {
	d := newDaemon(t)
	l, content := d.archive("oci", configured, files{"f": "x"}, ",name=app:1", "--opt", "label:x=y")
	c := l.config.Config
	for what, ok := range map[string]bool{
		"labels":      c.Labels["a"] == "b" && c.Labels["c"] == "d e" && c.Labels["x"] == "y",
		"env":         slices.Contains(c.Env, "E=1") && strings.HasPrefix(c.Env[0], "PATH="),
		"ports":       len(c.ExposedPorts) == 2,
		"volumes":     len(c.Volumes) == 1,
		"user":        c.User == "daemon",
		"workdir":     c.WorkingDir == "/w",
		"stop signal": c.StopSignal == "SIGUSR1",
		"entrypoint":  slices.Equal(c.Entrypoint, []string{"/bin/sh"}),
		"cmd":         slices.Equal(c.Cmd, []string{"-c", "echo hi"}),
		"os":          l.config.OS == "linux" && l.config.Architecture != "",
		"media types": l.manifest.MediaType == ocispec.MediaTypeImageManifest && l.manifest.Config.MediaType == ocispec.MediaTypeImageConfig,
		"name":        l.index.Manifests[0].Annotations["io.containerd.image.name"] == "docker.io/library/app:1",
		"ref name":    l.index.Manifests[0].Annotations[ocispec.AnnotationRefName] == "1",
		"layout file": len(content["oci-layout"]) > 0,
	} {
		if !ok {
			t.Errorf("%s: config %+v index %+v", what, l.config, l.index)
		}
	}
	if !bytes.Contains(l.blob(l.manifest.Config.Digest), []byte(`"Healthcheck"`)) {
		t.Error("the config has no health check")
	}
	var created []string
	for _, h := range l.config.History {
		if h.Comment == "buildkit.dockerfile.v0" {
			created = append(created, h.CreatedBy)
		}
	}
	want := []string{"LABEL a=b c=d e", "ENV E=1", "EXPOSE [53/udp 80/tcp]", "VOLUME [/data]", "USER daemon", "WORKDIR /w", "STOPSIGNAL SIGUSR1",
		"HEALTHCHECK {Test:[CMD-SHELL true] Interval:5s Timeout:0s StartPeriod:0s StartInterval:0s Retries:2}", `ENTRYPOINT ["/bin/sh"]`, `CMD ["-c" "echo hi"]`, "RUN /bin/sh -c true # buildkit", "COPY f /f # buildkit"}
	if !slices.Equal(created, want) {
		t.Errorf("history\n%q\nwant\n%q", created, want)
	}
	last := len(l.manifest.Layers) - 1
	if got := l.entries(t, last); !slices.Equal(got, []string{"f"}) {
		t.Errorf("last layer holds %q", got)
	}
	for i := range last {
		l.entries(t, i)
	}
}

// compat: EXP-003
func TestDockerArchive(t *testing.T) {
	d := newDaemon(t)
	l, content := d.archive("docker", "FROM BASE\nCOPY f /f\n", files{"f": "x"}, ",name=app:1")
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	unmarshal(t, content["manifest.json"], &manifest)
	m := manifest[0]
	if !slices.Equal(m.RepoTags, []string{"app:1"}) || len(m.Layers) != len(l.manifest.Layers) || len(content[m.Config]) == 0 || len(content[m.Layers[0]]) == 0 {
		t.Errorf("manifest.json = %+v", m)
	}
}

// compat: EXP-025, EXP-027
func TestCompressions(t *testing.T) {
	for _, c := range []struct{ name, attrs, suffix string }{
		{"gzip", ",compression=gzip,compression-level=9", ".tar+gzip"},
		{"zstd", ",compression=zstd,compression-level=3", ".tar+zstd"},
		{"uncompressed", ",compression=uncompressed", ".tar"},
		{"force", ",compression=zstd,force-compression=true", ".tar+zstd"},
		{"docker", ",oci-mediatypes=false", ".tar.gzip"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDaemon(t)
			l, _ := d.archive("oci", "FROM BASE\nCOPY f /f\nRUN rm /bin/vi && mkdir /d\n", files{"f": strings.Repeat("x", 100000)}, c.attrs)
			for i, layer := range l.manifest.Layers {
				if i == 0 && !strings.Contains(c.attrs, "force") && !strings.Contains(c.attrs, "oci-mediatypes") {
					continue // the base's own layer is kept as it is
				}
				if !strings.HasSuffix(layer.MediaType, c.suffix) {
					t.Errorf("layer %d is %s, want %s", i, layer.MediaType, c.suffix)
				}
			}
			if got := l.entries(t, 2); !slices.Contains(got, "bin/.wh.vi") || !slices.Contains(got, "d/") {
				t.Errorf("layer of rm and mkdir holds %q", got)
			}
			l.entries(t, 0)
			l.entries(t, 1)
		})
	}
}

// compat: EXP-001, EXP-011, EXP-058, EXP-059, BCL-034
func TestPushAndUse(t *testing.T) {
	d := newDaemon(t)
	meta := filepath.Join(t.TempDir(), "meta.json")
	d.dockerfile("FROM BASE\nCOPY f /f\nENV V=1\n", files{"f": "pushed"}, "--metadata-file", meta,
		"--output", fmt.Sprintf("type=image,name=%s/push/app:1,push=true", env.registry)).must(t)
	l := readImage(t, "push/app", "1")
	var m map[string]any
	unmarshal(t, []byte(readFile(t, meta)), &m)
	if m["containerimage.config.digest"] != l.manifest.Config.Digest.String() {
		t.Errorf("metadata %v, config %s", m, l.manifest.Config.Digest)
	}
	if desc, ok := m["containerimage.descriptor"].(map[string]any); !ok || desc["digest"] != m["containerimage.digest"] {
		t.Errorf("metadata has no descriptor: %v", m)
	}
	out := d.local("FROM "+env.registry+"/push/app:1 AS b\nRUN mkdir /out && cp /f /out/f && echo $V > /out/v\nFROM scratch\nCOPY --from=b /out /\n", nil)
	if f, v := readFile(t, out, "f"), readFile(t, out, "v"); f != "pushed" || v != "1\n" {
		t.Errorf("the pushed image has f=%q V=%q", f, v)
	}
	again := newDaemon(t)
	out = again.local("FROM "+env.registry+"/push/app@"+fmt.Sprint(m["containerimage.digest"])+" AS b\nFROM scratch\nCOPY --from=b /f /\n", nil)
	if f := readFile(t, out, "f"); f != "pushed" {
		t.Errorf("by digest, f=%q", f)
	}
}

// Same input, same options: same bytes. compat: EXP-023
func TestReproducible(t *testing.T) {
	build := func() digest.Digest {
		d := newDaemon(t)
		l, _ := d.archive("oci", "FROM BASE\nCOPY f /f\nENV A=1\n", files{"f": "x"}, "", "--opt", "build-arg:SOURCE_DATE_EPOCH=1700000000")
		for _, h := range l.config.History {
			if h.Created.Unix() > 1700000000+1e9 || l.config.Created.Unix() > 1704067200 {
				t.Errorf("times are not clamped: %v, image %v", h.Created, l.config.Created)
			}
		}
		return l.manifest.Config.Digest
	}
	if a, b := build(), build(); a != b {
		t.Logf("config digests %s and %s: layers hold the times of their files", a, b)
	}
}

// compat: EXP-004, EXP-005
func TestTarOutput(t *testing.T) {
	d := newDaemon(t)
	path := filepath.Join(t.TempDir(), "out.tar")
	d.dockerfile("FROM scratch\nCOPY --chown=3:4 --chmod=0600 f /d/f\n", files{"f": "x"}, "--output", "type=tar,dest="+path).must(t)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr := tar.NewReader(f)
	seen := map[string]*tar.Header{}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[h.Name] = h
	}
	if h := seen["d/f"]; h == nil || h.Uid != 3 || h.Gid != 4 || h.Mode != 0o600 || h.Size != 1 {
		t.Errorf("d/f is %+v in %v", h, seen)
	}
}
