//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/ops/source/git/gittest"
)

// remote is what builds fetch from: a repository and files.
type remote struct {
	git   *gittest.Server
	repo  *gittest.Repo
	files *httptest.Server
	first string // commit of the tag v1

	mu       sync.Mutex // guards the fields below
	content  map[string]string
	sent     int // files that were sent
	requests int
	wanted   string // Authorization header; "" is any
}

func startRemote(t *testing.T) *remote {
	t.Helper()
	r := &remote{git: gittest.NewServer(t), content: map[string]string{"/f.txt": "one"}}
	r.repo = r.git.Repo(t, "repo.git")
	dockerfile := "FROM scratch\nCOPY . /\n"
	r.first = r.repo.Commit(map[string]string{"Dockerfile": dockerfile, "a": "1", "sub/Dockerfile": dockerfile, "sub/b": "sub"})
	r.repo.Git("tag", "-a", "-m", "first", "v1")
	r.repo.Commit(map[string]string{"Dockerfile": dockerfile, "a": "2", "sub/Dockerfile": dockerfile, "sub/b": "sub"})
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for name, data := range map[string]string{"Dockerfile": "FROM scratch\nCOPY d /\n", "d/x": "packed"} {
		h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o640, Uid: 3, Gid: 4, Size: int64(len(data)), ModTime: time.Unix(1.5e9, 0)}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	r.content["/c.tar"], r.content["/df"] = buf.String(), "FROM scratch\nCOPY context /got\n"
	r.files = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.files.Close)
	return r
}

func (r *remote) serve(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.requests++
	wanted := r.wanted
	data, ok := r.content[req.URL.Path]
	r.mu.Unlock()
	tag := fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(data)))
	switch {
	case wanted != "" && req.Header.Get("Authorization") != wanted:
		w.WriteHeader(http.StatusUnauthorized)
		return
	case !ok:
		http.NotFound(w, req)
		return
	case strings.Contains(req.Header.Get("If-None-Match"), tag):
		w.Header().Set("ETag", tag)
		w.WriteHeader(http.StatusNotModified)
		return
	}
	r.mu.Lock()
	r.sent++
	r.mu.Unlock()
	w.Header().Set("ETag", tag)
	w.Header().Set("Last-Modified", "Tue, 14 Nov 2017 22:13:20 GMT")
	if _, err := w.Write([]byte(data)); err != nil {
		return // the client has left
	}
}

func (r *remote) set(path, data string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.content[path] = data
}

// taken is how many files were sent since the last call, to how many requests.
func (r *remote) taken() (sent, requests int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	sent, requests = r.sent, r.requests
	r.sent, r.requests = 0, 0
	return sent, requests
}

// in puts the addresses into a text.
func (r *remote) in(s string) string {
	return strings.NewReplacer("GIT", r.repo.URL, "HTTP", r.files.URL, "FIRST", r.first,
		"SUM", fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("one"))), "BASE", env.base).Replace(s)
}

// The same files come out as from upstream's daemon, whose cache is used as well.
//
// compat: DF-042, DF-087, DF-088, DF-089, DF-121, DF-122, DF-125, LLB-C16, LLB-C17, LLB-C18, LLB-C22, LLB-C23, LLB-C24, LLB-C26, LLB-C27, LLB-C30, LLB-C32, LLB-C33, LLB-C34, X-8
func TestRemoteSources(t *testing.T) {
	d, peer, r := newDaemon(t), peerDaemon(t), startRemote(t)
	for i, c := range []struct {
		name, dockerfile string
		args             []string
	}{
		{name: "ADD of git", dockerfile: "FROM scratch\nADD GIT /main/\nADD GIT#v1:sub /sub/\nADD GIT?tag=v1&subdir=sub /sub2/\nADD --checksum=FIRST GIT#v1 /v1/\n" +
			"ADD GIT?branch=main&commit=FIRST&fetch-by-commit=1&submodules=false /by/\nADD --chown=5:6 --chmod=600 GIT#FIRST /own/\n"},
		{name: "ADD of git with its directory", dockerfile: "FROM scratch\nADD --keep-git-dir GIT#main /kept/\n"},
		{name: "ADD of a file", dockerfile: "FROM scratch\nADD HTTP/f.txt /dir/\nADD --checksum=SUM HTTP/f.txt /sum\nADD --chmod=755 --chown=1:2 HTTP/f.txt /own\n" +
			"ADD HTTP/c.tar /packed/\nADD --unpack=true HTTP/c.tar /unpacked/\n"},
		{name: "git context", args: []string{"--opt", "context=GIT"}},
		{name: "git context of a ref and directory", args: []string{"--opt", "context=GIT#v1:sub"}},
		{name: "git context with its directory", args: []string{"--opt", "context=GIT#FIRST", "--opt", "build-arg:BUILDKIT_CONTEXT_KEEP_GIT_DIR=1"}},
		{name: "git context with the commit's time", args: []string{"--opt", "context=GIT#v1", "--opt", "build-arg:SOURCE_DATE_EPOCH=context"}},
		{name: "archive context", args: []string{"--opt", "context=HTTP/c.tar"}},
		{name: "remote Dockerfile", args: []string{"--opt", "context=HTTP/df"}},
		{name: "named contexts", dockerfile: "FROM scratch\nCOPY --from=repo a /a\nCOPY --from=file context /f\n",
			args: []string{"--opt", "context:repo=GIT#v1", "--opt", "context:file=HTTP/f.txt"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ref := fmt.Sprintf("type=registry,ref=%s/sources/cache:%d", env.registry, i)
			build := func(addr string, more ...string) (map[string]string, string) {
				out := filepath.Join(t.TempDir(), "image.tar")
				args := []string{"--addr", addr, "build", "--progress=plain", "--frontend", "dockerfile.v0", "--output", "type=oci,dest=" + out}
				if c.dockerfile != "" {
					dir := files{"Dockerfile": r.in(c.dockerfile)}.write(t)
					args = append(args, "--local", "context="+dir, "--local", "dockerfile="+dir)
				}
				for _, a := range c.args {
					args = append(args, r.in(a))
				}
				log := runCommand(t, exec.Command(filepath.Join(env.peer, "buildctl"), append(args, more...)...)).must(t).stderr
				l, _ := readArchive(t, out)
				all := flatten(t, l)
				maps.DeleteFunc(all, func(name, _ string) bool {
					return strings.Contains(name+"/", "/.git/") || strings.HasPrefix(name+"/", ".git/")
				})
				return all, log
			}
			theirs, _ := build(peer, "--export-cache", ref+",mode=max")
			_, log := build(d.addr, "--import-cache", ref)
			if steps := strings.Count(c.dockerfile, "ADD ") + strings.Count(c.dockerfile, "COPY "); strings.Count(log, " CACHED\n") < max(1, steps) {
				t.Errorf("upstream's cache was of no use:\n%s", log)
			}
			ours, _ := build(d.addr, "--no-cache")
			if len(theirs) > 0 && maps.Equal(ours, theirs) {
				return
			}
			for _, name := range slices.Sorted(maps.Keys(theirs)) {
				if ours[name] != theirs[name] {
					t.Errorf("%s\nkiln:     %s\nupstream: %s", name, ours[name], theirs[name])
				}
			}
			t.Errorf("kiln has %q and upstream %q", slices.Sorted(maps.Keys(ours)), slices.Sorted(maps.Keys(theirs)))
		})
	}
}

// The steps of a build agree on a branch that moves with every request.
//
// compat: LLB-117
func TestBranchMovesDuringBuild(t *testing.T) {
	d, r := newDaemon(t), startRemote(t)
	last := r.repo.Git("rev-parse", "main")
	var moves atomic.Int32
	r.git.Guard(func(*http.Request) int {
		to := last
		if moves.Add(1)%2 == 0 {
			to = r.first
		}
		r.repo.Git("update-ref", "refs/heads/main", to)
		return 0
	})
	out := t.TempDir()
	dir := files{"Dockerfile": r.in("FROM scratch\nADD GIT#main /a/\nADD GIT#main:sub /b/\nADD --keep-git-dir GIT#main /c/\nADD GIT?branch=main&submodules=false /d/\n")}.write(t)
	d.dockerfileIn(dir, "--output", "type=local,dest="+out).must(t)
	want := readFile(t, out+"/a/a")
	for _, name := range []string{"/c/a", "/d/a"} {
		if got := readFile(t, out+name); got != want {
			t.Errorf("after %d moves, %s is %q and /a/a is %q", moves.Load(), name, got, want)
		}
	}
	commit, ok := map[string]string{"1": r.first, "2": last}[want]
	if got := readFile(t, out+"/c/.git/refs/heads/main"); !ok || strings.TrimSpace(got) != commit {
		t.Errorf("the kept directory is of %s, the files of %s", got, commit)
	}
}

// What didn't change isn't fetched again, after a restart either; what did is
// named. With the server gone, what is pinned is still there, and the rest fails
// with its name.
//
// compat: CTL-101, X-10
func TestRemoteSourcesAgain(t *testing.T) {
	d, r := newDaemon(t), startRemote(t)
	dir := files{"Dockerfile": r.in("FROM scratch\nADD GIT#main /repo/\nADD HTTP/f.txt /f\n")}.write(t)
	build := func() result {
		t.Helper()
		return d.dockerfileIn(dir, "--opt", "kiln.explain=1").must(t)
	}
	build()
	r.taken()
	r.git.Requests()
	again := func() {
		t.Helper()
		out := build().stderr
		if sent, requests := r.taken(); sent != 0 || requests != 1 {
			t.Errorf("%d files were sent to %d requests for what is there", sent, requests)
		}
		for _, req := range r.git.Requests() {
			if body, err := req.URL.Parse(""); err != nil || strings.Contains(body.Path, "objects") {
				t.Errorf("git asked for %s", req.URL)
			}
		}
		if n := strings.Count(out, "CACHED"); n < 2 {
			t.Errorf("%d steps came from the cache:\n%s", n, out)
		}
	}
	again()
	d.stop()
	d.start()
	again()
	du := d.buildctl("du", "-v").must(t).stdout
	for _, want := range []string{"source.git.checkout", "shared git repo for " + r.repo.URL, "git snapshot for " + r.repo.URL + "#main", "http url " + r.files.URL + "/f.txt"} {
		if !strings.Contains(du, want) {
			t.Errorf("du doesn't show %q:\n%s", want, du)
		}
	}

	was := r.repo.Git("rev-parse", "HEAD")
	is := r.repo.Commit(map[string]string{"a": "3"})
	r.set("/f.txt", "two")
	build()
	out := d.kiln("explain", "--all").must(t).stdout
	for _, want := range []string{"the commit of " + r.repo.URL + " changed from " + was + " to " + is, "the file at " + r.files.URL + "/f.txt changed from sha256:"} {
		if !strings.Contains(out, want) {
			t.Errorf("explain doesn't say %q:\n%s", want, out)
		}
	}

	r.set("/g.txt", "two")
	d.dockerfile(r.in("FROM scratch\nADD GIT#FIRST /\nADD --checksum=SUM HTTP/g.txt /f\n"), nil).fails(t, "digest mismatch for "+r.files.URL+"/g.txt", "Dockerfile:3")
	out = t.TempDir()
	d.kiln("build", "-f", "sub/Dockerfile", "-o", out, r.repo.URL+"#"+r.first).must(t)
	if got := readFile(t, out, "a"); got != "1" {
		t.Errorf("kiln's own client built a = %q", got)
	}
	pinned := r.in("FROM scratch\nADD GIT#FIRST /\nADD --checksum=SUM HTTP/f.txt /f\n")
	d.dockerfile(pinned, nil).must(t)
	r.git.Close()
	r.files.Close()
	d.dockerfile(pinned, nil).must(t)
	d.dockerfile(r.in("FROM scratch\nADD GIT#main /\n"), nil).fails(t, "failed to fetch remote "+r.repo.URL, "Dockerfile:2", ">>> ADD ")
	d.dockerfile(r.in("FROM scratch\nADD HTTP/f.txt /\n"), nil).fails(t, "fetch "+r.files.URL+"/f.txt", "connection refused", "Dockerfile:2", ">>> ADD ")
	d.buildctl("prune", "--all").must(t)
	if du := d.buildctl("du").must(t).stdout; !strings.Contains(du, "0B") {
		t.Errorf("after prune there is\n%s", du)
	}
}

// Clients lend their secrets; they are told if one is wanted.
//
// compat: LLB-C19, LLB-C31, X-4
func TestRemoteSourcesWithSecrets(t *testing.T) {
	d, r := newDaemon(t), startRemote(t)
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("t0ps3cr3t"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.git.Guard(func(req *http.Request) int {
		if _, password, ok := req.BasicAuth(); !ok || password != "t0ps3cr3t" {
			return http.StatusUnauthorized
		}
		return 0
	})
	r.mu.Lock()
	r.wanted = "Bearer t0ps3cr3t"
	r.mu.Unlock()
	for line, want := range map[string]string{"ADD GIT#main /": "--secret id=GIT_AUTH_TOKEN", "ADD HTTP/f.txt /": "--secret id=HTTP_AUTH_TOKEN_127.0.0.1"} {
		d.dockerfile(r.in("FROM scratch\n"+line+"\n"), nil).fails(t, want, "Dockerfile:2")
		out := d.dockerfile(r.in("FROM scratch\n"+line+"\n"), nil, "--secret", "id=GIT_AUTH_TOKEN,src="+file, "--secret", "id=HTTP_AUTH_TOKEN_127.0.0.1,src="+file).must(t)
		if strings.Contains(out.stderr, "t0ps3cr3t") {
			t.Errorf("the secret is shown: %s", out.stderr)
		}
	}
	d.stop()
	if out, err := exec.Command("grep", "-rlaF", "-e", "t0ps3cr3t", "-e", "dDBwczNjcjN0", d.root).Output(); err == nil {
		t.Errorf("the secret is on disk: %s", out)
	}
	d.start()
}
