package registry

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// newTestClient retries at once.
func newTestClient(cfg Config) *Client {
	c := New(cfg)
	c.delay = time.Microsecond
	return c
}

func fetch(ctx context.Context, r *Resolver, ref string, desc ocispec.Descriptor) ([]byte, error) {
	f, err := r.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	rc, err := f.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

func yes() *bool { v := true; return &v }
func no() *bool  { v := false; return &v }

// pull resolves repo:tag and fetches its manifest.
func pull(t *testing.T, r *Resolver, ref string) error {
	t.Helper()
	_, desc, err := r.Resolve(t.Context(), ref)
	if err != nil {
		return err
	}
	data, err := fetch(t.Context(), r, ref, desc)
	if err == nil && digest.FromBytes(data) != desc.Digest {
		t.Errorf("%s: got other content than was resolved", ref)
	}
	return err
}

// compat: DMN-101
func TestPlainHTTP(t *testing.T) {
	reg := registrytest.New(t)
	reg.Push(t, "a/b", "1", registrytest.Image{})
	for _, tt := range []struct {
		name  string
		host  HostConfig
		fails string
	}{
		{name: "unset falls back", host: HostConfig{}},
		{name: "http", host: HostConfig{PlainHTTP: yes()}},
		{name: "http and insecure", host: HostConfig{PlainHTTP: yes(), Insecure: yes()}},
		{name: "insecure falls back", host: HostConfig{Insecure: yes()}},
		{name: "https only", host: HostConfig{PlainHTTP: no()}, fails: "speaks HTTP without TLS; set http = true in [registry.\"" + reg.Host},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newTestClient(Config{Hosts: map[string]HostConfig{reg.Host: tt.host}})
			defer c.Close()
			check(t, pull(t, c.Resolver(Access{}), reg.Host+"/a/b:1"), tt.fails)
		})
	}
}

// check compares an error with what it should say, "" being none.
func check(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("unexpected error: %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

func pemFile(t *testing.T, dir, name string, reg *registrytest.Registry) string {
	t.Helper()
	file := filepath.Join(dir, name)
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.Server.Certificate().Raw})
	if err := os.WriteFile(file, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// compat: DMN-047, DMN-102
func TestTLS(t *testing.T) {
	reg := registrytest.NewTLS(t)
	reg.Push(t, "a/b", "1", registrytest.Image{})
	dir := t.TempDir()
	ca := pemFile(t, dir, "ca.crt", reg)
	broken := filepath.Join(t.TempDir(), "broken.pem")
	if err := os.WriteFile(broken, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		host  HostConfig
		fails string
	}{
		{name: "unknown authority", fails: "signed by an unknown authority; name the CA with ca = [...] in [registry.\"" + reg.Host},
		{name: "ca", host: HostConfig{RootCAs: []string{ca}}},
		{name: "tlsconfigdir", host: HostConfig{TLSConfigDirs: []string{filepath.Join(dir, "none"), dir}}},
		{name: "insecure", host: HostConfig{Insecure: yes()}},
		{name: "missing ca", host: HostConfig{RootCAs: []string{filepath.Join(dir, "none.pem")}}, fails: "none.pem: no such file"},
		{name: "broken ca", host: HostConfig{RootCAs: []string{broken}}, fails: "broken.pem holds no PEM certificate"},
		{name: "missing key", host: HostConfig{KeyPairs: []KeyPair{{Key: "k.pem", Cert: ca}}}, fails: "load key pair"},
		{name: "http where TLS is spoken", host: HostConfig{PlainHTTP: yes()}, fails: "remove http = true from [registry.\"" + reg.Host},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newTestClient(Config{Hosts: map[string]HostConfig{reg.Host: tt.host}})
			defer c.Close()
			check(t, pull(t, c.Resolver(Access{}), reg.Host+"/a/b:1"), tt.fails)
		})
	}
	t.Run("insecure access", func(t *testing.T) {
		c := newTestClient(Config{})
		defer c.Close()
		check(t, pull(t, c.Resolver(Access{Insecure: true}), reg.Host+"/a/b:1"), "")
		check(t, pull(t, c.Resolver(Access{}), reg.Host+"/a/b:1"), "unknown authority")
	})
}

func TestPairsOfConfigDir(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"x.cert", "x.key", "other.txt"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err := tlsConfig(HostConfig{TLSConfigDirs: []string{dir}})
	check(t, err, fmt.Sprintf("load key pair %s/x.cert, %s/x.key", dir, dir))
}

// compat: DMN-100
func TestMirrors(t *testing.T) {
	main, first, second := registrytest.New(t), registrytest.New(t), registrytest.New(t)
	main.Push(t, "a/b", "1", registrytest.Image{Env: []string{"X=1"}})
	second.Push(t, "prefix/a/b", "1", registrytest.Image{Env: []string{"X=1"}})
	c := newTestClient(Config{Hosts: map[string]HostConfig{
		main.Host:  {Mirrors: []string{first.Host, second.Host + "/prefix"}, PlainHTTP: yes()},
		first.Host: {PlainHTTP: yes()},
	}})
	defer c.Close()
	r := c.Resolver(Access{})
	ref := main.Host + "/a/b:1"

	check(t, pull(t, r, ref), "")
	if got := main.Requests(); len(got) != 0 {
		t.Errorf("the registry was asked though a mirror has the image: %q", got)
	}
	if got := first.Requests(); len(got) == 0 || got[0] != "HEAD /v2/a/b/manifests/1" {
		t.Errorf("first mirror: %q", got)
	}
	if got := second.Requests(); len(got) == 0 || got[0] != "HEAD /v2/prefix/a/b/manifests/1" {
		t.Errorf("second mirror: %q", got)
	}

	first.Server.Close()
	second.Change(func() {
		second.Before = func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }
	})
	check(t, pull(t, r, ref), "")
	if got := main.Requests(); len(got) == 0 {
		t.Error("the registry wasn't asked when the mirrors failed")
	}

	second.Requests()
	blob := []byte("layer")
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(blob), Size: 5}
	if _, err := r.Push(t.Context(), ref, desc, opener(blob)); err != nil {
		t.Fatal(err)
	}
	if !main.Has("a/b", desc.Digest.String()) || len(second.Requests()) != 0 {
		t.Error("a push went to a mirror")
	}
}

func opener(data []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

// compat: DMN-105
func TestRetries(t *testing.T) {
	reg := registrytest.New(t)
	reg.Push(t, "a/b", "1", registrytest.Image{})
	c := newTestClient(Config{})
	defer c.Close()
	r, ref := c.Resolver(Access{}), reg.Host+"/a/b:1"
	check(t, pull(t, r, ref), "")

	failing := func(times int, fn func(w http.ResponseWriter)) *atomic.Int64 {
		n := &atomic.Int64{}
		reg.Change(func() {
			reg.Before = func(w http.ResponseWriter, _ *http.Request) bool {
				if n.Add(1) > int64(times) {
					return false
				}
				fn(w)
				return true
			}
		})
		return n
	}
	for _, tt := range []struct {
		name  string
		times int
		fn    func(w http.ResponseWriter)
		fails string
		most  int64
	}{
		{"500 twice", 2, func(w http.ResponseWriter) { w.WriteHeader(500) }, "", 4},
		{"503 for good", 100, func(w http.ResponseWriter) { w.WriteHeader(503) }, "503 Service Unavailable (tried 5 times)", 10},
		{"429", 3, func(w http.ResponseWriter) { w.Header().Set("Retry-After", "0"); w.WriteHeader(429) }, "", 5},
		{"429 for good", 100, func(w http.ResponseWriter) { w.Header().Set("Retry-After", "0"); w.WriteHeader(429) }, "429 Too Many Requests (tried 5 times)", 10},
		{"reset", 2, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, "", 6},
		{"reset for good", 100, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, "closed the connection (tried 5 times)", 12},
		{"403", 100, func(w http.ResponseWriter) { w.WriteHeader(403) }, "access denied: 403 Forbidden", 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := failing(tt.times, tt.fn)
			err := pull(t, r, ref)
			check(t, err, tt.fails)
			if tt.fails != "" && !strings.Contains(fmt.Sprint(err), reg.Host) {
				t.Errorf("%v doesn't name the registry", err)
			}
			if n.Load() > tt.most {
				t.Errorf("%d requests", n.Load())
			}
		})
	}
}

func TestCutBody(t *testing.T) {
	reg := registrytest.New(t)
	data := bytes.Repeat([]byte("0123456789"), 50_000)
	desc := reg.Blob("a/b", ocispec.MediaTypeImageLayer, data)
	c := newTestClient(Config{})
	defer c.Close()
	r := c.Resolver(Access{})

	reg.Change(func() { reg.Cut, reg.CutTimes = 100_000, 3 })
	got, err := fetch(t.Context(), r, reg.Host+"/a/b", desc)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("got %d of %d bytes: %v", len(got), len(data), err)
	}
	if n := len(reg.Requests()); n != 4 {
		t.Errorf("%d requests for three cuts", n)
	}

	reg.Change(func() { reg.Cut, reg.CutTimes = 0, 1000 })
	if _, err := fetch(t.Context(), r, reg.Host+"/a/b", desc); err == nil {
		t.Error("a body that never comes is no error")
	}

	reg.Change(func() {
		reg.CutTimes = 0
		reg.Before = func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(503)
			io.WriteString(w, `{"errors":[{"code":"UNAVAILABLE","message":"out to lunch"}]}`)
			return true
		}
	})
	_, err = fetch(t.Context(), r, reg.Host+"/a/b", desc)
	check(t, err, "fetch "+desc.Digest.String()+" of "+reg.Host+"/a/b: registry "+reg.Host+": 503 Service Unavailable: out to lunch (tried 5 times)")
}

func TestErrors(t *testing.T) {
	reg := registrytest.New(t)
	c := newTestClient(Config{})
	defer c.Close()
	r := c.Resolver(Access{})

	_, _, err := r.Resolve(t.Context(), reg.Host+"/no/such:thing")
	check(t, err, "resolve "+reg.Host+"/no/such:thing: not found")
	if !errdefs.IsNotFound(err) {
		t.Errorf("%v isn't a not-found error", err)
	}

	const down = "127.0.0.1:1" // a port that nobody is given who asks for any
	_, _, err = r.Resolve(t.Context(), down+"/a:1")
	check(t, err, "registry "+down+": connection refused; is it running?")

	_, _, err = r.Resolve(t.Context(), "Not A Reference")
	check(t, err, `image reference "Not A Reference"`)

	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	if _, _, err = r.Resolve(ctx, reg.Host+"/a:1"); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestSignedURLs shows that what a redirect hands out stays out of errors.
func TestSignedURLs(t *testing.T) {
	reg := registrytest.New(t)
	desc := reg.Blob("a", ocispec.MediaTypeImageLayer, []byte("x"))
	const target = "http://127.0.0.1:1/blob?X-Amz-Signature=topsecret"
	reg.Change(func() {
		reg.Before = func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", target)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		}
	})
	c := newTestClient(Config{})
	defer c.Close()
	_, err := fetch(t.Context(), c.Resolver(Access{}), reg.Host+"/a", desc)
	if err == nil || strings.Contains(err.Error(), "topsecret") {
		t.Errorf("got %v", err)
	}
}

func TestLimit(t *testing.T) {
	reg := registrytest.New(t)
	desc := reg.Blob("a", ocispec.MediaTypeImageLayer, []byte("x"))
	c := newTestClient(Config{MaxConcurrency: 2})
	defer c.Close()
	f, err := c.Resolver(Access{}).Fetcher(t.Context(), reg.Host+"/a")
	if err != nil {
		t.Fatal(err)
	}
	var open []io.Closer
	for range 2 {
		rc, err := f.Fetch(t.Context(), desc)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, rc)
	}
	full, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Fetch(full, desc); !errors.Is(err, context.Canceled) {
		t.Errorf("a third blob: %v", err)
	}
	config := desc
	config.MediaType = ocispec.MediaTypeImageConfig
	rc, err := f.Fetch(t.Context(), config)
	if err != nil {
		t.Fatal("a config waits for layers")
	}
	rc.Close()
	open[0].Close()
	open[0].Close()
	rc, err = f.Fetch(t.Context(), desc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Fetch(full, desc); !errors.Is(err, context.Canceled) {
		t.Errorf("closing twice gave two slots back: %v", err)
	}
	rc.Close()
	open[1].Close()
}

// compat: DMN-108
// What is pushed may have to be fetched from the same registry first: uploads
// don't keep the connections that this takes.
func TestPushOfWhatIsFetched(t *testing.T) {
	reg := registrytest.New(t)
	c := newTestClient(Config{MaxConcurrency: 1})
	defer c.Close()
	r := c.Resolver(Access{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	from, err := r.Fetcher(ctx, reg.Host+"/from:1")
	if err != nil {
		t.Fatal(err)
	}
	var eg errgroup.Group
	for i := range 4 {
		desc := reg.Blob("from", ocispec.MediaTypeImageLayer, fmt.Appendf(nil, "layer %d", i))
		eg.Go(func() error {
			_, err := r.Push(ctx, reg.Host+"/to:1", desc, func(ctx context.Context) (io.ReadCloser, error) { return from.Fetch(ctx, desc) })
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		t.Error(err)
	}
}

func TestPush(t *testing.T) {
	reg := registrytest.New(t)
	c := newTestClient(Config{})
	defer c.Close()
	r := c.Resolver(Access{})
	data := bytes.Repeat([]byte("layer"), 100_000)
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}

	var opened int
	open := func(ctx context.Context) (io.ReadCloser, error) { opened++; return opener(data)(ctx) }
	var mu sync.Mutex
	failures := 2
	reg.Change(func() {
		reg.Before = func(w http.ResponseWriter, req *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if req.Method != http.MethodPut || failures == 0 {
				return false
			}
			failures--
			w.WriteHeader(502)
			return true
		}
	})
	existed, err := r.Push(t.Context(), reg.Host+"/a:1", desc, open)
	if err != nil || existed || !reg.Has("a", desc.Digest.String()) {
		t.Fatalf("push: existed %v, %v", existed, err)
	}
	if opened != 3 {
		t.Errorf("opened %d times, want 3", opened)
	}
	existed, err = r.Push(t.Context(), reg.Host+"/a:1", desc, open)
	if err != nil || !existed || opened != 3 {
		t.Errorf("second push: existed %v, opened %d times, %v", existed, opened, err)
	}

	from, err := ParseReference(reg.Host + "/a")
	if err != nil {
		t.Fatal(err)
	}
	mounted := desc
	mounted.Annotations = SourceAnnotations(nil, from)
	reg.Requests()
	existed, err = r.Push(t.Context(), reg.Host+"/b:1", mounted, open)
	if err != nil || !existed || opened != 3 || !reg.Has("b", desc.Digest.String()) {
		t.Errorf("mount: existed %v, opened %d times, %v", existed, opened, err)
	}
	if slices.ContainsFunc(reg.Requests(), func(s string) bool { return strings.HasPrefix(s, "PUT") }) {
		t.Error("a mounted blob was uploaded")
	}

	wrong := desc
	wrong.Digest = digest.FromString("other")
	_, err = r.Push(t.Context(), reg.Host+"/a:1", wrong, open)
	check(t, err, "push "+wrong.Digest.String()+" to "+reg.Host+"/a:1")

	manifest := []byte(`{"schemaVersion":2}`)
	md := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))}
	if _, err = r.Push(t.Context(), reg.Host+"/a:tagged", md, opener(manifest)); err != nil || !reg.Has("a", "tagged") {
		t.Errorf("push manifest: %v", err)
	}
}

// compat: DMN-107
func TestParseReference(t *testing.T) {
	dgst := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]string{
		"alpine":                         "docker.io/library/alpine:latest",
		"user/img:1":                     "docker.io/user/img:1",
		"docker.io/alpine":               "docker.io/library/alpine:latest",
		"index.docker.io/library/alpine": "docker.io/library/alpine:latest",
		"localhost:5000/a":               "localhost:5000/a:latest",
		"r.example/a/b:t@" + dgst:        "r.example/a/b:t@" + dgst,
		"alpine@" + dgst:                 "docker.io/library/alpine@" + dgst,
	} {
		got, err := ParseReference(in)
		if err != nil || got.String() != want {
			t.Errorf("%s: got %s, %v, want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "UPPER", "a b", "x@sha256:short"} {
		if got, err := ParseReference(in); err == nil {
			t.Errorf("%q: got %s", in, got)
		}
	}
	c := New(Config{Hosts: map[string]HostConfig{"docker.io": {Mirrors: []string{"http://m.example/p"}}}})
	hosts, err := c.hosts("docker.io", false)
	if err != nil {
		t.Fatal(err)
	}
	if len(hosts) != 2 || hosts[0].Host != "m.example" || hosts[0].Path != "/v2/p" || hosts[0].Scheme != "http" || hosts[1].Host != "registry-1.docker.io" {
		t.Errorf("hosts of Docker Hub: %+v", hosts)
	}
}

func TestScopes(t *testing.T) {
	s := parseScopes("repository:a/b:push,pull repository:c:pull", "repository:a/b:pull", "registry:catalog:*", "odd")
	want := []string{"odd", "registry:catalog:*", "repository:a/b:pull,push", "repository:c:pull"}
	if got := s.list(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if !s.contains(parseScopes("repository:a/b:pull")) || s.contains(parseScopes("repository:c:push")) || s.contains(parseScopes("repository:d:pull")) {
		t.Error("contains is wrong")
	}
}

func TestSourceAnnotations(t *testing.T) {
	ref, err := ParseReference("r.example/a/b")
	if err != nil {
		t.Fatal(err)
	}
	const key = "containerd.io/distribution.source.r.example"
	withPort := ref
	withPort.Host += ":5000"
	if got := SourceAnnotations(nil, withPort)[key]; got != "a/b" {
		t.Errorf("host with a port: %q", got)
	}
	one := map[string]string{"k": "v"}
	two := SourceAnnotations(one, ref)
	if len(one) != 1 || two[key] != "a/b" || two["k"] != "v" {
		t.Errorf("got %v from %v", two, one)
	}
	ref.Repository = "c"
	if got := SourceAnnotations(two, ref)[key]; got != "a/b,c" {
		t.Errorf("second source: %q", got)
	}
}
