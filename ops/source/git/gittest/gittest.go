// Package gittest makes repositories and serves them over HTTP, for tests.
package gittest

import (
	"maps"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Server serves the repositories of a directory by git's own program.
type Server struct {
	*httptest.Server
	Dir string

	mu       sync.Mutex // guards the fields below
	requests []*http.Request
	guard    func(*http.Request) int
	handler  http.Handler
}

// NewServer serves until the test ends.
func NewServer(t testing.TB) *Server {
	t.Helper()
	path := strings.TrimSpace(run(t, "/", "--exec-path")) + "/git-http-backend"
	s := &Server{Dir: t.TempDir()}
	s.handler = &cgi.Handler{
		Path: path,
		Env:  []string{"GIT_PROJECT_ROOT=" + s.Dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_GLOBAL=" + os.DevNull, "GIT_CONFIG_NOSYSTEM=1"},
	}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, r.Clone(r.Context()))
		guard, handler := s.guard, s.handler
		s.mu.Unlock()
		if guard != nil {
			if status := guard(r); status != 0 {
				http.Error(w, http.StatusText(status), status)
				return
			}
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

// Guard answers what fn gives a status for with that; nil is nothing.
func (s *Server) Guard(fn func(*http.Request) int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.guard = fn
}

// Replace serves by what fn makes of the handler so far.
func (s *Server) Replace(fn func(http.Handler) http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handler = fn(s.handler)
}

// Requests are those since the last call.
func (s *Server) Requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.requests
	s.requests = nil
	return out
}

// Repo is a repository with a work tree.
type Repo struct {
	t    testing.TB
	Dir  string
	Name string // as servers have it
	URL  string
}

// Repo makes an empty repository at name, with the branch main.
func (s *Server) Repo(t testing.TB, name string, options ...string) *Repo {
	t.Helper()
	r := &Repo{t: t, Dir: filepath.Join(s.Dir, name), Name: name, URL: s.URL + "/" + name}
	if err := os.MkdirAll(r.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r.Git(append([]string{"init", "--quiet", "--initial-branch=main"}, options...)...)
	return r
}

// Commit makes files, which are contents by path, all there is, and returns the
// commit.
func (r *Repo) Commit(files map[string]string) string {
	r.t.Helper()
	r.Git("rm", "-rfq", "--ignore-unmatch", ".")
	for _, name := range slices.Sorted(maps.Keys(files)) {
		p := filepath.Join(r.Dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			r.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(files[name]), 0o644); err != nil {
			r.t.Fatal(err)
		}
		r.Git("add", "-f", "--", name)
	}
	r.Git("commit", "-q", "--allow-empty", "-m", "commit")
	return r.Git("rev-parse", "HEAD")
}

// Git runs git in the work tree.
func (r *Repo) Git(args ...string) string {
	r.t.Helper()
	return run(r.t, r.Dir, args...)
}

func run(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.DevNull, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull,
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com",
		"GIT_AUTHOR_DATE=1700000000 +0000", "GIT_COMMITTER_DATE=1700000000 +0000", "GIT_ALLOW_PROTOCOL=file:http",
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}
