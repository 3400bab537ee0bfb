// Package registrytest is an image registry in memory, for tests: it pulls,
// pushes and mounts, demands tokens or passwords, and misbehaves on request.
package registrytest

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry is a registry. Its fields may be changed between requests only
// through Change.
type Registry struct {
	Server *httptest.Server
	Host   string // as in references

	mu        sync.Mutex // guards the fields below
	blobs     map[string]map[digest.Digest][]byte
	manifests map[string]map[string]manifest // by tag and by digest
	uploads   int
	requests  []string
	Faults
	Auth
}

// Faults are ways to misbehave.
type Faults struct {
	// Before is called before a request is handled; true means that it wrote
	// the response.
	Before func(w http.ResponseWriter, r *http.Request) bool
	// Lie replaces the content of blobs and manifests as they are sent.
	Lie func(name string, content []byte) []byte
	// Cut ends the body of a blob after so many bytes, that often.
	Cut, CutTimes int
}

// Auth is what the registry demands.
type Auth struct {
	// Users have passwords; nil means that nothing is demanded. With "" as a
	// user, anyone may pull.
	Users map[string]string
	// Basic demands passwords rather than tokens.
	Basic bool
	// Expired tokens are refused.
	Expired map[string]bool
	// Narrow tokens are for pull only, whatever is asked for.
	Narrow bool
	issued int
	tokens map[string]grant
}

type grant struct {
	user   string
	scopes []string
}

type manifest struct {
	mediaType string
	data      []byte
}

// New starts a registry without TLS on the loopback interface.
func New(t testing.TB) *Registry {
	r := newRegistry()
	r.Server = httptest.NewServer(r)
	r.Host = strings.TrimPrefix(r.Server.URL, "http://")
	t.Cleanup(r.Server.Close)
	return r
}

// NewTLS starts a registry with a certificate that nobody trusts.
func NewTLS(t testing.TB) *Registry {
	r := newRegistry()
	r.Server = httptest.NewUnstartedServer(r)
	r.Server.Config.ErrorLog = nil
	r.Server.StartTLS()
	r.Host = strings.TrimPrefix(r.Server.URL, "https://")
	t.Cleanup(r.Server.Close)
	return r
}

func newRegistry() *Registry {
	return &Registry{
		blobs:     map[string]map[digest.Digest][]byte{},
		manifests: map[string]map[string]manifest{},
	}
}

// Change calls fn while no request is handled.
func (r *Registry) Change(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn()
}

// Requests returns the requests so far, as "GET /v2/name/...", and forgets
// them.
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.requests
	r.requests = nil
	return out
}

// Blob adds a blob to a repository.
func (r *Registry) Blob(repo, mediaType string, data []byte) ocispec.Descriptor {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := digest.FromBytes(data)
	r.putBlobLocked(repo, d, data)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (r *Registry) putBlobLocked(repo string, d digest.Digest, data []byte) {
	if r.blobs[repo] == nil {
		r.blobs[repo] = map[digest.Digest][]byte{}
	}
	r.blobs[repo][d] = data
}

// Manifest adds a manifest or index to a repository, under tag if that isn't
// empty.
func (r *Registry) Manifest(repo, tag, mediaType string, data []byte) ocispec.Descriptor {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := digest.FromBytes(data)
	r.putManifestLocked(repo, tag, manifest{mediaType, data})
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (r *Registry) putManifestLocked(repo, tag string, m manifest) {
	if r.manifests[repo] == nil {
		r.manifests[repo] = map[string]manifest{}
	}
	r.manifests[repo][digest.FromBytes(m.data).String()] = m
	if tag != "" {
		r.manifests[repo][tag] = m
	}
}

// Has tells whether a repository has a blob or manifest.
func (r *Registry) Has(repo string, ref string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.manifests[repo][ref]; ok {
		return true
	}
	_, ok := r.blobs[repo][digest.Digest(ref)]
	return ok
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	r.mu.Lock()
	r.requests = append(r.requests, req.Method+" "+req.URL.Path)
	before := r.Before
	r.mu.Unlock()
	if before != nil && before(w, req) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if req.URL.Path == "/token" {
		r.tokenLocked(w, req, body)
		return
	}
	path, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok {
		fail(w, http.StatusNotFound, "NOT_FOUND", "no such page")
		return
	}
	if path == "" {
		return
	}
	for _, kind := range []string{"/manifests/", "/blobs/uploads/", "/blobs/"} {
		repo, ref, ok := strings.Cut(path, kind)
		if !ok {
			continue
		}
		if !r.allowedLocked(w, req, repo) {
			return
		}
		switch kind {
		case "/manifests/":
			r.manifestLocked(w, req, repo, ref, body)
		case "/blobs/uploads/":
			r.uploadLocked(w, req, repo, ref, body)
		default:
			r.blobLocked(w, req, repo, ref)
		}
		return
	}
	fail(w, http.StatusNotFound, "NOT_FOUND", "no such page")
}

func fail(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

func (r *Registry) manifestLocked(w http.ResponseWriter, req *http.Request, repo, ref string, body []byte) {
	if req.Method == http.MethodPut {
		m := manifest{req.Header.Get("Content-Type"), body}
		tag := ref
		if strings.Contains(ref, ":") {
			tag = ""
		}
		r.putManifestLocked(repo, tag, m)
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(body).String())
		w.WriteHeader(http.StatusCreated)
		return
	}
	m, ok := r.manifests[repo][ref]
	if !ok {
		fail(w, http.StatusNotFound, "MANIFEST_UNKNOWN", "manifest unknown")
		return
	}
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(m.data).String())
	w.Header().Set("Content-Type", m.mediaType)
	r.sendLocked(w, req, "manifest", m.data)
}

func (r *Registry) blobLocked(w http.ResponseWriter, req *http.Request, repo, ref string) {
	data, ok := r.blobs[repo][digest.Digest(ref)]
	if !ok {
		fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "blob unknown")
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	r.sendLocked(w, req, "blob", data)
}

func (r *Registry) sendLocked(w http.ResponseWriter, req *http.Request, kind string, data []byte) {
	if r.Lie != nil {
		data = r.Lie(kind, data)
	}
	status := http.StatusOK
	if v, ok := strings.CutPrefix(req.Header.Get("Range"), "bytes="); ok {
		from, err := strconv.Atoi(strings.TrimSuffix(v, "-"))
		if err == nil && from <= len(data) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(data)-1, len(data)))
			data, status = data[from:], http.StatusPartialContent
		}
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(status)
	if req.Method == http.MethodHead {
		return
	}
	if kind == "blob" && r.CutTimes > 0 && r.Cut < len(data) {
		r.CutTimes--
		w.Write(data[:r.Cut])
		panic(http.ErrAbortHandler)
	}
	w.Write(data)
}

func (r *Registry) uploadLocked(w http.ResponseWriter, req *http.Request, repo, id string, body []byte) {
	q := req.URL.Query()
	if req.Method == http.MethodPost {
		if from := q.Get("from"); from != "" {
			if data, ok := r.blobs[from][digest.Digest(q.Get("mount"))]; ok {
				r.putBlobLocked(repo, digest.Digest(q.Get("mount")), data)
				w.Header().Set("Docker-Content-Digest", q.Get("mount"))
				w.WriteHeader(http.StatusCreated)
				return
			}
		}
		r.uploads++
		w.Header().Set("Location", fmt.Sprintf("/v2/%s/blobs/uploads/%d", repo, r.uploads))
		w.WriteHeader(http.StatusAccepted)
		return
	}
	d := digest.Digest(q.Get("digest"))
	if digest.FromBytes(body) != d {
		fail(w, http.StatusBadRequest, "DIGEST_INVALID", "content doesn't have the digest "+d.String())
		return
	}
	r.putBlobLocked(repo, d, body)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
}
