//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/kilnbuild/kiln/hack/testimage"
)

// Bad input: a clear error, and a daemon that goes on.
// compat: CTL-082, CTL-087, DF-011, DF-012, BCL-008, X-10
func TestBadDockerfiles(t *testing.T) {
	d := newDaemon(t)
	for _, c := range []struct {
		name, dockerfile string
		want             []string
	}{
		{"SyntaxError", "FROM BASE\nRUN [\"a\n\nENV\n", []string{"Dockerfile:4", "ENV"}},
		{"UnknownInstruction", "FROM BASE\nRUM true\n", []string{"Dockerfile:2", "unknown instruction: RUM", "RUN"}},
		{"MissingStage", "FROM BASE\nCOPY --from=nostage-here.invalid/x /a /b\n", []string{"nostage-here.invalid"}},
		{"MissingFile", "FROM BASE\nCOPY not-there.txt /x\n", []string{"Dockerfile:2", "not-there.txt", "not found"}},
		{"ExitCode", "FROM BASE\nRUN echo the last words; exit 7\n", []string{"Dockerfile:2", "exit 7", "exit code: 7", "the last words"}},
		{"NoSuchCommand", "FROM BASE\nRUN [\"/no/such/program\"]\n", []string{"/no/such/program"}},
		{"NoSuchImage", "FROM " + env.registry + "/no/such:image\nRUN true\n", []string{"no/such:image", "not found"}},
		{"BadFlag", "FROM BASE\nCOPY --chwn=1 a b\n", []string{"Dockerfile:2", "chwn"}},
		{"BadMountType", "FROM BASE\nRUN --mount=type=bogus,target=/x true\n", []string{"Dockerfile:2", "bogus"}},
		{"InsecureNotAllowed", "FROM BASE\nRUN --security=insecure true\n", []string{"security.insecure", "not allowed"}},
		{"HostNetworkNotAllowed", "FROM BASE\nRUN --network=host true\n", []string{"network.host", "not allowed"}},
		{"Empty", "", []string{"empty"}},
		{"UnknownTarget", "FROM BASE AS a\n", []string{"nope"}},
		{"RequiredSecret", "FROM BASE\nRUN --mount=type=secret,id=nope,required=true true\n", []string{"nope", "not found"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var args []string
			if c.name == "UnknownTarget" {
				args = []string{"--opt", "target=nope"}
			}
			d.dockerfile(c.dockerfile, nil, args...).fails(t, c.want...)
		})
	}
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
}

func TestRegistryTrouble(t *testing.T) {
	d := newDaemon(t)
	t.Run("Down", func(t *testing.T) {
		d.dockerfile("FROM "+harness.Nobody+"/x/y:z\nRUN true\n", nil).fails(t, harness.Nobody, "connection refused")
	})
	t.Run("LiesAboutADigest", func(t *testing.T) {
		liar := lyingRegistry(t, func(layer []byte) []byte {
			out := append([]byte(nil), layer...)
			out[len(out)/2] ^= 0xff
			return out
		})
		d.dockerfile("FROM "+liar+"/x/y:latest\nRUN true\n", nil).fails(t, "sha256:", "digest")
	})
	t.Run("LayerWithEscapes", func(t *testing.T) {
		victim := filepath.Join(t.TempDir(), "victim")
		hostile := testimage.Image{Layers: [][]testimage.File{{
			{Name: "bin/", Mode: 0o755},
			{Name: "../../../../../../../../" + victim, Mode: 0o644, Data: []byte("escaped")},
			{Name: "abs", Mode: 0o777, Link: filepath.Dir(victim)},
			{Name: "abs/victim", Mode: 0o644, Data: []byte("escaped")},
			{Name: "rel", Mode: 0o777, Link: "../../../../../../../../../../" + filepath.Dir(victim)},
			{Name: "rel/victim", Mode: 0o644, Data: []byte("escaped")},
			{Name: "hard", HardLink: "/etc/passwd"},
		}}}
		l, err := hostile.Write(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Push(env.registry, "hostile/x", "latest"); err != nil {
			t.Fatal(err)
		}
		// Whether the image is refused or unpacked inside its root is its
		// own business; nothing outside may be touched.
		d.dockerfile("FROM "+env.registry+"/hostile/x:latest AS h\nFROM scratch\nCOPY --from=h / /\n", nil)
		if _, err := os.Lstat(victim); err == nil {
			t.Errorf("a layer wrote %s", victim)
		}
	})
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
}

// lyingRegistry passes requests on to the test registry and changes layers.
func lyingRegistry(t *testing.T, change func([]byte) []byte) string {
	t.Helper()
	layer := env.layout.Blobs[1].Digest
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := strings.Replace(r.URL.Path, "/v2/x/y/", "/v2/library/busybox/", 1)
		req, err := http.NewRequest(r.Method, "http://"+env.registry+path, nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		req.Header = r.Header.Clone()
		req.Header.Del("Range")
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		buf := make([]byte, resp.ContentLength)
		if r.Method == http.MethodGet && resp.ContentLength > 0 {
			for n := 0; n < len(buf); {
				m, err := resp.Body.Read(buf[n:])
				n += m
				if err != nil {
					break
				}
			}
			if strings.HasSuffix(path, layer.String()) {
				buf = change(buf)
			}
			w.Write(buf)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// Definitions that no client of good will sends. compat: LLB-001, LLB-003
func TestGarbageDefinitions(t *testing.T) {
	d := newDaemon(t)
	buildctl := filepath.Join(env.peer, "buildctl")
	for i, stdin := range []string{"garbage", "\x0a\x00", "\x0a\x04abcd\x0a\x04efgh", strings.Repeat("\x0a\x02\x0a\x00", 100)} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			d.run(buildctl, stdin, "build").fails(t, "error")
		})
	}
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
}

// A daemon whose log nobody reads any more goes on and ends in order.
func TestLogReaderIsGone(t *testing.T) {
	d := newDaemon(t)
	d.stop()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d.output = w
	d.start()
	if err := errors.Join(w.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	d.dockerfile("FROM BASE\nRUN exit 1\n", nil).fails(t, "exit code: 1") // failures are logged
	d.dockerfile("FROM BASE\nRUN true\n", nil).must(t)
	d.stop()
}
