package git

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/git/gittest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// compat: LLB-099, LLB-103, LLB-156
func TestRefs(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "a/r.git")
	first := r.Commit(map[string]string{"f": "1", "sub/dir/g": "g"})
	r.Git("tag", "light")
	r.Git("tag", "-a", "-m", "annotated", "v1")
	tag := r.Git("rev-parse", "v1")
	r.Git("tag", "both")
	r.Git("checkout", "-q", "-b", "both")
	branch := r.Commit(map[string]string{"f": "branch"})
	r.Git("update-ref", "refs/pull/7/head", branch)
	r.Git("checkout", "-q", "main")
	last := r.Commit(map[string]string{"f": "2"})
	one := map[string]string{"f": "1", "sub/dir/g": "g"}
	git := attrs(pb.AttrKeepGitDir, "true")
	for _, c := range []struct {
		name, fragment string
		attrs          map[string]string
		key            string
		files          map[string]string
	}{
		{"default branch", "", nil, last, map[string]string{"f": "2"}},
		{"branch", "main", nil, last, map[string]string{"f": "2"}},
		{"full name", "refs/heads/main", nil, last, map[string]string{"f": "2"}},
		{"partial name", "heads/main", nil, last, map[string]string{"f": "2"}},
		{"branch before tag", "both", nil, branch, map[string]string{"f": "branch"}},
		{"that tag", "refs/tags/both", nil, first, one},
		{"other refs", "pull/7/head", nil, branch, map[string]string{"f": "branch"}},
		{"tag", "light", nil, first, one},
		{"annotated tag", "v1", nil, first, one},
		{"kept tag", "v1", git, tag + ".git#refs/tags/v1", one},
		{"kept branch", "main", git, last + ".git#refs/heads/main", map[string]string{"f": "2"}},
		{"kept commit", first, git, first + ".git#" + first, one},
		{"commit", first, nil, first, one},
		{"tag object", tag, nil, tag, one},
		{"subdirectory", "v1:sub", nil, first + ":sub", map[string]string{"dir/g": "g"}},
		{"subdirectory of commit", first + ":/sub/./dir/", nil, first + ":sub/dir", map[string]string{"g": "g"}},
		{"kept subdirectory", "v1:sub", git, tag + ".git#refs/tags/v1:sub", map[string]string{"dir/g": "g"}},
		{"options", "main", attrs(pb.AttrGitSkipSubmodules, "true", pb.AttrGitMTime, "commit"), last + "(skip-submodules)(mtime=commit)", map[string]string{"f": "2"}},
		{"checksum", "v1", attrs(pb.AttrGitChecksum, first[:8]), first, one},
		{"checksum of the tag", "v1", attrs(pb.AttrGitChecksum, tag[:8]), first, one},
		{"by commit", "main", attrs(pb.AttrGitFetchByCommit, "true", pb.AttrGitChecksum, first), first, one},
		{"by commit alone", "", attrs(pb.AttrGitFetchByCommit, "true", pb.AttrGitChecksum, first), first, one},
	} {
		t.Run(c.name, func(t *testing.T) {
			key, files := d.fetch(t, op(r.URL, c.fragment, c.attrs))
			maps.DeleteFunc(files, func(name, _ string) bool { return strings.HasPrefix(name, ".git/") })
			if key != c.key || !maps.Equal(files, c.files) {
				t.Errorf("key %s and files %v, want %s and %v", key, files, c.key, c.files)
			}
		})
	}
	for _, c := range []struct{ fragment, checksum, want string }{
		{"none", "", "repository does not contain ref none"},
		{"main:none/x", "", "there is no none in the repository"},
		{"main:f", "", "f is not a directory"},
		{"main", "abcd", "expected checksum to match abcd, got " + last},
		{"main", "xyz", "expected hex commit hash"},
		{strings.Repeat("0", 39) + "1", "", r.URL},
		{first, last, "expected checksum to match " + last + ", got " + first},
		{"-x", "", `invalid git ref "-x"`},
		{"--upload-pack=touch", "", "invalid git ref"},
		{"a..b", "", "invalid git ref"},
		{"*", "", "invalid git ref"},
	} {
		_, _, err := d.try(t, op(r.URL, c.fragment, attrs(pb.AttrGitChecksum, c.checksum)))
		check(t, err, c.want)
	}
}

// A build sees one state of a branch, whatever its steps make of it, and asks for
// it once. Another build sees what is there then.
//
// compat: LLB-117
func TestOnce(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	old := r.Commit(map[string]string{"f": "1", "sub/g": "g"})
	build := (&ops.Build{}).Group()
	key := func(g session.Group, fragment string, more map[string]string) string {
		t.Helper()
		key, _, err := d.resolve(t, op(r.URL, fragment, more)).CacheKey(t.Context(), g, 0)
		must(t, err)
		return key
	}
	if got := key(build, "main", nil); got != old {
		t.Errorf("key %s, want %s", got, old)
	}
	srv.Requests()
	last := r.Commit(map[string]string{"f": "2"})
	for _, c := range []struct {
		fragment string
		attrs    map[string]string
		want     string
	}{
		{"main:sub", nil, old + ":sub"},
		{"main", attrs(pb.AttrKeepGitDir, "true"), old + ".git#refs/heads/main"},
		{"main", attrs(pb.AttrGitChecksum, old[:7]), old},
		{"main", attrs(pb.AttrGitSkipSubmodules, "true"), old + "(skip-submodules)"},
	} {
		if got := key(build, c.fragment, c.attrs); got != c.want {
			t.Errorf("%s with %v: key %s, want %s", c.fragment, c.attrs, got, c.want)
		}
	}
	m, err := d.ResolveMeta(t.Context(), MetaRequest{Op: op(r.URL, "main", nil), Group: build})
	if err != nil || m.Object != old {
		t.Errorf("asked about it, it is %s: %v", m.Object, err)
	}
	i, err := d.Resolve(op(r.URL, "main", attrs(pb.AttrGitChecksum, last)), ocispec.Platform{})
	must(t, err)
	_, _, err = i.CacheKey(t.Context(), build, 0)
	check(t, err, "expected checksum to match "+last+", got "+old)
	if got := srv.Requests(); len(got) != 0 {
		t.Errorf("%d requests for what the build was told", len(got))
	}
	ref, err := d.resolve(t, op(r.URL, "main:sub", nil)).Fetch(t.Context(), build)
	must(t, err)
	defer ref.Release()
	if got := list(t, ref); !maps.Equal(got, map[string]string{"g": "g"}) {
		t.Errorf("got %v", got)
	}
	if got := key((&ops.Build{}).Group(), "main", nil); got != last {
		t.Errorf("another build: key %s, want %s", got, last)
	}

	names := []string{"", "main", "heads/main", "refs/heads/main"} // of one branch
	for n, first := range names {
		build := (&ops.Build{}).Group()
		want := key(build, first, nil)
		r.Commit(map[string]string{"f": fmt.Sprint("moved ", n)})
		for _, name := range names {
			if got := key(build, name, nil); got != want {
				t.Errorf("after %q, %q is %s, want %s", first, name, got, want)
			}
		}
	}
}

// A kept directory has the one commit, the remote's name without credentials, and
// nothing of this machine.
//
// compat: LLB-100
func TestKeepGitDir(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	r.Commit(map[string]string{"f": "1"})
	last := r.Commit(map[string]string{"f": "2"})
	url := strings.Replace(r.URL, "http://", "http://user:password@", 1)
	i := d.resolve(t, op(url, "main", attrs(pb.AttrKeepGitDir, "true")))
	ref, err := i.Fetch(t.Context(), nil)
	must(t, err)
	defer ref.Release()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	// git doesn't work in what is attached nowhere.
	dir := filepath.Join(t.TempDir(), "copy")
	out, err := exec.Command("cp", "-a", fmt.Sprintf("/proc/%d/fd/%s/.", os.Getpid(), filepath.Base(view.Path())), dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := func(args ...string) string {
		out, err := command{args: args, dir: dir}.run(t.Context())
		must(t, err)
		return strings.TrimSpace(string(out))
	}
	for _, c := range []struct{ got, want string }{
		{got("log", "--format=%H"), last},
		{got("status", "--porcelain"), ""},
		{got("config", "remote.origin.url"), r.URL},
		{got("rev-parse", "refs/heads/main"), last},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
	for name, data := range list(t, ref) {
		if strings.Contains(data, "password") || strings.Contains(data, d.root) || strings.Contains(name, "hooks") || strings.Contains(name, "logs") {
			t.Errorf("%s is there: %q", name, data)
		}
	}
}

// compat: LLB-105
func TestCommitTimes(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	r.Commit(map[string]string{"d/f": "1"})
	ref, err := d.resolve(t, op(r.URL, "", attrs(pb.AttrGitMTime, "commit"))).Fetch(t.Context(), nil)
	must(t, err)
	defer ref.Release()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	for _, name := range []string{".", "d", "d/f"} {
		fi, err := os.Lstat(view.Path() + "/" + name)
		must(t, err)
		if !fi.ModTime().Equal(time.Unix(1700000000, 0)) {
			t.Errorf("%s has the time %s", name, fi.ModTime())
		}
	}
}

// What was fetched once isn't fetched again, by other checkouts and after a
// restart; what has changed since is.
//
// compat: LLB-106
func TestMirror(t *testing.T) {
	root := t.TempDir()
	d, srv := start(t, root), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	first := r.Commit(map[string]string{"d/f": "1"})
	d.fetch(t, op(r.URL, first, nil))
	d.close()
	srv.Requests()
	d = start(t, root)
	if _, files := d.fetch(t, op(r.URL, first+":d", nil)); files["f"] != "1" {
		t.Errorf("got %v", files)
	}
	if got := srv.Requests(); len(got) != 0 {
		t.Errorf("%d requests for a commit that is there", len(got))
	}
	r.Commit(map[string]string{"f": "2"})
	r.Git("reset", "-q", "--hard", first)
	r.Git("commit", "-q", "--amend", "-m", "history is rewritten")
	r.Commit(map[string]string{"f": "3"})
	if _, files := d.fetch(t, op(r.URL, "main", nil)); files["f"] != "3" {
		t.Errorf("got %v", files)
	}
	usage, err := d.cache.DiskUsage(t.Context(), nil, 0)
	must(t, err)
	var got []string
	for _, u := range usage {
		got = append(got, u.Description)
	}
	if want := "shared git repo for " + r.URL; len(got) != 1 || got[0] != want {
		t.Errorf("du shows %q, want %q alone", got, want)
	}
	// A damaged mirror is made anew.
	packs, err := filepath.Glob(root + "/snapshots/*/fs/objects/[0-9a-f][0-9a-f]/*")
	must(t, err)
	if len(packs) == 0 {
		t.Fatal("the mirror has no objects")
	}
	for _, p := range packs {
		must(t, os.Chmod(p, 0o600))
		must(t, os.WriteFile(p, []byte("damaged"), 0o600))
	}
	if _, files := d.fetch(t, op(r.URL, "main", attrs(pb.AttrKeepGitDir, "true"))); files["f"] != "3" {
		t.Errorf("got %v", files)
	}
}

// A commit that no ref names any more, on a server that sends by refs alone, is
// found if a branch leads to it.
func TestServerOfRefsAlone(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	first := r.Commit(map[string]string{"f": "1"})
	r.Commit(map[string]string{"f": "2"})
	r.Git("config", "protocol.version", "0")
	srv.Guard(func(req *http.Request) int { req.Header.Del("Git-Protocol"); return 0 })
	if _, files := d.fetch(t, op(r.URL, first, nil)); files["f"] != "1" {
		t.Errorf("got %v", files)
	}
	_, _, err := d.try(t, op(r.URL, strings.Repeat("1", 40), nil))
	check(t, err, "no branch or tag leads to 1111")
	_, _, err = d.try(t, op(r.URL, "", attrs(pb.AttrGitFetchByCommit, "true", pb.AttrGitChecksum, r.Git("rev-parse", first+"^{tree}"))))
	check(t, err, "failed to fetch remote")
}

// Which hashes a repository has is found out; all others have SHA-1.
//
// compat: LLB-109
func TestSHA256(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git", "--object-format=sha256")
	c := r.Commit(map[string]string{"f": "1"})
	for _, a := range []map[string]string{nil, attrs(pb.AttrKeepGitDir, "true")} {
		if key, files := d.fetch(t, op(r.URL, "main", a)); files["f"] != "1" || !strings.HasPrefix(key, c) {
			t.Errorf("got %s %v", key, files)
		}
	}
}

func TestMeta(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	c := r.Commit(map[string]string{"f": "1"})
	r.Git("tag", "-a", "-m", "message of the tag", "v1")
	tag := r.Git("rev-parse", "v1")
	for _, fragment := range []string{"v1", tag} {
		m, err := d.ResolveMeta(t.Context(), MetaRequest{Op: op(r.URL, fragment, nil), Objects: true, Group: session.NewGroup()})
		must(t, err)
		if m.Object != tag || m.Commit != c || !strings.Contains(string(m.TagObject), "message of the tag") ||
			!strings.Contains(string(m.CommitObject), "committer a <a@example.com> 1700000000") {
			t.Errorf("got %+v", m)
		}
	}
	m, err := d.ResolveMeta(t.Context(), MetaRequest{Op: op(r.URL, "", nil)})
	must(t, err)
	if m.Ref != "refs/heads/main" || m.Object != c || m.Commit != "" || m.CommitObject != nil {
		t.Errorf("got %+v", m)
	}
}

// What isn't there is refused by its name, in place of less than was asked for.
func TestUnsupported(t *testing.T) {
	d := start(t, t.TempDir())
	for _, attr := range []string{
		pb.AttrGitSignatureVerifyPubKey, pb.AttrGitSignatureVerifyRejectExpired, pb.AttrGitSignatureVerifyRequireSignedTag,
		pb.AttrGitSignatureVerifyIgnoreSignedTag, pb.AttrGitBundle, pb.AttrGitCheckoutBundle,
	} {
		_, err := d.Resolve(op("https://h/r.git", "main", attrs(attr, "x")), ocispec.Platform{})
		check(t, err, attr+" is not supported by this daemon")
	}
}
