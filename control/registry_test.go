package control

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/hack/testimage"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registry serves images that tests tag, and nothing else.
type registry struct {
	host string
	dir  string

	mu   sync.Mutex // guards the fields below
	tags map[string]ocispec.Descriptor
	made map[string]ocispec.Descriptor // by variable
}

func newRegistry(t testing.TB) *registry {
	r := &registry{dir: t.TempDir(), tags: map[string]ocispec.Descriptor{}, made: map[string]ocispec.Descriptor{}}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

// tag makes name stand for a busybox image that has a variable of that value.
func (r *registry) tag(t testing.TB, name, variable string) digest.Digest {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if d, ok := r.made[variable]; ok {
		r.tags[name] = d
		return d.Digest
	}
	img, err := testimage.Busybox()
	must(t, err)
	img.Config.Env = append(img.Config.Env, "BASE="+variable)
	img.Layers = append(img.Layers, []testimage.File{{Name: "etc/base", Mode: 0o644, Data: []byte(variable)}})
	l, err := img.Write(filepath.Join(r.dir, fmt.Sprintf("%x", sha256.Sum256([]byte(variable)))))
	must(t, err)
	r.tags[name], r.made[variable] = l.Manifest, l.Manifest
	return l.Manifest.Digest
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	what := req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]
	if req.URL.Path == "/v2/" {
		return
	}
	if strings.Contains(req.URL.Path, "/manifests/") {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		r.mu.Lock()
		if d, ok := r.tags[what]; ok {
			what = d.Digest.String()
		}
		r.mu.Unlock()
	}
	found, err := filepath.Glob(filepath.Join(r.dir, "*/blobs/sha256", strings.TrimPrefix(what, "sha256:")))
	if err != nil || len(found) == 0 {
		http.NotFound(w, req)
		return
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Docker-Content-Digest", what)
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	if req.Method != http.MethodHead {
		w.Write(data) // who hung up finds out
	}
}
