package git

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/ops/source/git/gittest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/sshforward/sshprovider"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Nothing that an op says is taken for an option or leads elsewhere.
func TestHostileOps(t *testing.T) {
	d := start(t, t.TempDir())
	for _, c := range []struct{ id, full, want string }{
		{"host/r.git#-x", "", "invalid git ref"},
		{"host/r.git#a\nb", "", "invalid"},
		{"-oProxyCommand=touch/x", "", "invalid git URL"},
		{"host/r.git", "ssh://-oProxyCommand=touch/r.git", "another repository"},
		{"-oProxyCommand=touch/r.git", "ssh://-oProxyCommand=touch/r.git", "invalid git URL"},
		{"host/r.git", "ssh://-oProxyCommand=x@host/r.git", "invalid git URL"},
		{"host/--upload-pack=x", "user@host:--upload-pack=x", "invalid git URL"},
		{"host/r.git", "https://other/r.git", "another repository"},
		{"host/r.git", "https://host/other.git", "another repository"},
		{"host/r.git", "ext::sh -c touch% x", "can't be parsed"},
		{"host/r.git", "file:///etc", "can't be parsed"},
		{"host/r.git", "/etc", "another repository"},
		{"", "", "names no host"},
	} {
		o := &pb.SourceOp{Identifier: "git://" + c.id, Attrs: map[string]string{}}
		if c.full != "" {
			o.Attrs[pb.AttrFullRemoteURL] = c.full
		}
		_, err := d.Resolve(o, ocispec.Platform{})
		check(t, err, c.want)
	}
	for _, attr := range unsupported {
		_, err := d.Resolve(op("https://host/r.git", "", attrs(attr, "true")), ocispec.Platform{})
		check(t, err, attr+" is not supported")
	}
}

// compat: LLB-104
func TestSubmodules(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	inner, sub, r := srv.Repo(t, "inner.git"), srv.Repo(t, "sub.git"), srv.Repo(t, "r.git")
	inner.Commit(map[string]string{"i": "inner"})
	sub.Commit(map[string]string{"s": "1"})
	sub.Git("submodule", "--quiet", "add", "../inner.git", "in")
	sub.Git("commit", "-qm", "nested")
	r.Commit(map[string]string{"f": "1"})
	r.Git("submodule", "--quiet", "add", sub.URL, "mod")
	r.Git("commit", "-qm", "submodule")
	_, files := d.fetch(t, op(r.URL, "main", nil))
	if files["mod/s"] != "1" || files["mod/in/i"] != "inner" || files["f"] != "1" {
		t.Errorf("got %v", files)
	}
	for name := range files {
		if strings.Contains(name, ".git/") || strings.HasSuffix(name, ".git") {
			t.Errorf("%s is left", name)
		}
	}
	if _, files := d.fetch(t, op(r.URL, "main", attrs(pb.AttrGitSkipSubmodules, "true"))); files["mod/s"] != "" || files["f"] != "1" {
		t.Errorf("without submodules there is %v", files)
	}
	_, files = d.fetch(t, op(r.URL, "main", attrs(pb.AttrKeepGitDir, "true")))
	if files["mod/.git"] != "gitdir: ../.git/modules/mod\n" || files["mod/in/i"] != "inner" {
		t.Errorf("kept: %q, %q", files["mod/.git"], files["mod/in/i"])
	}
	for name, data := range files {
		if strings.Contains(name, "hooks/") || strings.Contains(data, d.root) {
			t.Errorf("%s is kept: %q", name, data)
		}
	}
}

// compat: LLB-104
func TestHostileSubmodules(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	proof := filepath.Join(t.TempDir(), "proof")
	target := srv.Repo(t, "target.git")
	c := target.Commit(map[string]string{"secret": "of this machine"})
	for name, url := range map[string]string{
		"ext":    "ext::sh -c touch% " + proof,
		"file":   "file://" + target.Dir,
		"path":   target.Dir,
		"option": "--upload-pack=touch " + proof,
		"ssh":    "ssh://-oProxyCommand=touch " + proof + "/x",
	} {
		r := srv.Repo(t, name+".git")
		r.Commit(map[string]string{".gitmodules": "[submodule \"m\"]\n\tpath = m\n\turl = " + url + "\n\tupdate = !touch " + proof + "\n"})
		r.Git("update-index", "--add", "--cacheinfo", "160000,"+c+",m")
		r.Git("commit", "-qm", "gitlink")
		_, files, err := d.try(t, op(r.URL, "main", nil))
		if err == nil {
			t.Errorf("%s: got %v", name, files)
		}
	}
	// Without a command of its own, so that it is the protocol that is refused.
	r := srv.Repo(t, "plain.git")
	r.Commit(map[string]string{".gitmodules": "[submodule \"m\"]\n\tpath = m\n\turl = file://" + target.Dir + "\n"})
	r.Git("update-index", "--add", "--cacheinfo", "160000,"+c+",m")
	r.Git("commit", "-qm", "gitlink")
	_, _, err := d.try(t, op(r.URL, "main", nil))
	check(t, err, "only http, https, git and ssh are fetched from")
	if _, err := os.Stat(proof); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a hostile submodule ran a command: %v", err)
	}
}

// Links are checked out as they are, and lead nobody out.
func TestHostileLinks(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	outside := t.TempDir()
	must(t, os.WriteFile(filepath.Join(outside, "f"), []byte("outside"), 0o644))
	must(t, os.Symlink(outside, filepath.Join(r.Dir, "link")))
	must(t, os.Mkdir(filepath.Join(r.Dir, "d"), 0o755))
	must(t, os.Symlink("../link", filepath.Join(r.Dir, "d/again")))
	r.Git("add", ".")
	r.Git("commit", "-qm", "links")
	if _, files := d.fetch(t, op(r.URL, "main", nil)); files["link"] != "->"+outside {
		t.Errorf("got %v", files)
	}
	for _, dir := range []string{"link", "d/again", "link/x"} {
		_, _, err := d.try(t, op(r.URL, "main:"+dir, nil))
		check(t, err, "is not a directory")
	}
	if _, files := d.fetch(t, op(r.URL, "main:../../../d/../d", nil)); files["again"] != "->../link" {
		t.Errorf("got %v", files)
	}
}

// Nothing of what the machine has configured is used, nor hooks.
func TestForeignConfiguration(t *testing.T) {
	proof := filepath.Join(t.TempDir(), "proof")
	home := t.TempDir()
	hooks := filepath.Join(home, "hooks")
	must(t, os.Mkdir(hooks, 0o755))
	for _, hook := range []string{"post-checkout", "reference-transaction", "post-index-change"} {
		must(t, os.WriteFile(filepath.Join(hooks, hook), []byte("#!/bin/sh\ntouch "+proof+"\n"), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(home, ".gitconfig"),
		[]byte("[core]\n\thooksPath = "+hooks+"\n[credential]\n\thelper = \"!touch "+proof+" #\"\n[url \"ext::false\"]\n\tinsteadOf = http://\n"), 0o644))
	for _, name := range []string{"HOME", "XDG_CONFIG_HOME"} {
		t.Setenv(name, home)
	}
	t.Setenv("GIT_CONFIG_GLOBAL", filepath.Join(home, ".gitconfig"))
	t.Setenv("GIT_DIR", "/nowhere")
	t.Setenv("GIT_ASKPASS", "touch "+proof)
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	r.Commit(map[string]string{"f": "1"})
	if _, files := d.fetch(t, op(r.URL, "main", attrs(pb.AttrKeepGitDir, "true"))); files["f"] != "1" {
		t.Errorf("got %v", files)
	}
	srv.Guard(func(*http.Request) int { return http.StatusUnauthorized })
	_, _, err := d.try(t, op(r.URL, "main", nil))
	check(t, err, "give a token with --secret id=GIT_AUTH_TOKEN")
	if _, err := os.Stat(proof); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program that the machine has configured ran: %v", err)
	}
}

// Secrets go to their repository alone, and nowhere else: not in arguments, logs,
// or on the disk.
//
// compat: LLB-101
func TestCredentials(t *testing.T) {
	d, srv, other := start(t, t.TempDir()), gittest.NewServer(t), gittest.NewServer(t)
	sub := other.Repo(t, "sub.git")
	sub.Commit(map[string]string{"s": "1"})
	r := srv.Repo(t, "r.git")
	r.Commit(map[string]string{"f": "1"})
	r.Git("submodule", "--quiet", "add", sub.URL, "mod")
	r.Git("commit", "-qm", "submodule")
	host := strings.TrimPrefix(srv.URL, "http://")
	secrets := attrs(pb.AttrAuthHeaderSecret, "HEADER", pb.AttrAuthTokenSecret, "TOKEN")
	for _, c := range []struct {
		name    string
		secrets sessiontest.Secrets
		url     string
		want    string
	}{
		{"token", sessiontest.Secrets{"TOKEN": "s3cr3t\n"}, r.URL, "basic eC1hY2Nlc3MtdG9rZW46czNjcjN0"},
		{"header", sessiontest.Secrets{"HEADER": "Bearer s3cr3t"}, r.URL, "Bearer s3cr3t"},
		{"of the host", sessiontest.Secrets{"HEADER": "Bearer wrong", "TOKEN." + host: "s3cr3t"}, r.URL, "basic eC1hY2Nlc3MtdG9rZW46czNjcjN0"},
		{"of the URL", nil, strings.Replace(r.URL, "http://", "http://me:s3cr3t@", 1), "Basic bWU6czNjcjN0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := sessiontest.Connect(t, d.sm, "", c.secrets.Service())
			srv.Guard(func(req *http.Request) int {
				if req.Header.Get("Authorization") != c.want {
					return http.StatusUnauthorized
				}
				noSecret(t)
				return 0
			})
			other.Requests()
			var log strings.Builder
			ctx := progress.With(t.Context(), progress.NewScope(writer(func(e progress.Event) {
				if e.Log != nil {
					log.Write(e.Log.Data)
				}
			}), "sha256:x"))
			o := op(c.url, "main", secrets)
			o.Attrs[pb.AttrKeepGitDir] = "true"
			i := d.resolve(t, o)
			ref, err := i.Fetch(ctx, session.NewGroup(id))
			must(t, err)
			defer ref.Release()
			if files := list(t, ref); files["mod/s"] != "1" {
				t.Errorf("got %v", files)
			}
			for _, req := range other.Requests() {
				if v := req.Header.Get("Authorization"); v != "" {
					t.Errorf("another server was told %q", v)
				}
			}
			for _, secret := range []string{"s3cr3t", strings.Fields(c.want)[1]} {
				if strings.Contains(log.String(), secret) {
					t.Errorf("the log shows %q: %s", secret, log.String())
				}
				out, err := exec.Command("grep", "-rlaF", secret, d.root).Output()
				if err == nil || len(out) > 0 {
					t.Errorf("%q is on disk: %s", secret, out)
				}
			}
			for _, f := range i.(*instance).Facets() {
				if strings.Contains(f.Value, "s3cr3t") {
					t.Errorf("explanations show %v", f)
				}
			}
		})
	}
	// A server that repeats what it was told isn't shown.
	id := sessiontest.Connect(t, d.sm, "", sessiontest.Secrets{"TOKEN": "s3cr3t"}.Service())
	srv.Replace(func(http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "no: "+req.Header.Get("Authorization")+" s3cr3t\n")
		}
	})
	_, _, err := d.try(t, op(r.URL, "main", secrets), id)
	if err == nil || strings.Contains(err.Error(), "s3cr3t") || strings.Contains(err.Error(), "eC1hY2Nlc3M") {
		t.Errorf("got %v", err)
	}
}

type writer func(progress.Event)

func (w writer) Write(e progress.Event) { w(e) }

// noSecret checks the arguments of all processes.
func noSecret(t *testing.T) {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Error(err)
	}
	for _, name := range lines {
		data, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		if args := string(data); strings.Contains(args, "git") && (strings.Contains(args, "s3cr3t") || strings.Contains(args, "czNjcjN0")) {
			t.Errorf("arguments hold the secret: %q", args)
		}
	}
}

// A redirect doesn't take the credentials to another host; one within the host is
// followed with them.
func TestRedirects(t *testing.T) {
	d, front, srv := start(t, t.TempDir()), gittest.NewServer(t), gittest.NewServer(t)
	r := srv.Repo(t, "moved/r.git")
	r.Commit(map[string]string{"f": "1"})
	to := strings.Replace(srv.URL, "127.0.0.1", "localhost", 1)
	front.Replace(func(http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			http.Redirect(w, req, to+"/moved"+req.URL.String(), http.StatusFound)
		}
	})
	secret, id := attrs(pb.AttrAuthTokenSecret, "TOKEN"), sessiontest.Connect(t, d.sm, "", sessiontest.Secrets{"TOKEN": "s3cr3t"}.Service())
	_, _, err := d.try(t, op(front.URL+"/r.git", "main", secret), id)
	check(t, err, "it redirects to another host, "+to+", which the credentials are not for")
	if got := srv.Requests(); len(got) != 0 {
		t.Errorf("the other host got %d requests", len(got))
	}
	if _, files := d.fetch(t, op(front.URL+"/r.git", "main", nil), id); files["f"] != "1" {
		t.Errorf("without credentials: %v", files)
	}

	srv.Guard(func(req *http.Request) int {
		if req.Header.Get("Authorization") != "basic eC1hY2Nlc3MtdG9rZW46czNjcjN0" {
			return http.StatusUnauthorized
		}
		return 0
	})
	srv.Replace(func(backend http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, req *http.Request) {
			if p, ok := strings.CutPrefix(req.URL.String(), "/old/"); ok {
				http.Redirect(w, req, "/moved/"+p, http.StatusMovedPermanently)
				return
			}
			backend.ServeHTTP(w, req)
		}
	})
	if _, files := d.fetch(t, op(srv.URL+"/old/r.git", "", secret), id); files["f"] != "1" {
		t.Errorf("within the host: %v", files)
	}
}

// A server that says nothing, or is gone, is named.
func TestDeadServers(t *testing.T) {
	d := start(t, t.TempDir())
	d.opts.Stall = 200 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var conns sync.WaitGroup
	accepted := make(chan bool, 10)
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- true
			conns.Go(func() {
				io.Copy(io.Discard, c) // until the client has had enough
				c.Close()
			})
		}
	})
	_, _, err = d.try(t, op("git://"+l.Addr().String()+"/r.git", "main", nil))
	check(t, err, "failed to fetch remote git://"+l.Addr().String()+"/r.git: the server sent nothing for 200ms")

	ctx, cancel := context.WithCancelCause(t.Context())
	left := errors.New("the client left")
	d.opts.Stall = time.Hour
	i := d.resolve(t, op("http://"+l.Addr().String()+"/r.git", "main", nil))
	<-accepted // of the silent server above
	var leaving sync.WaitGroup
	leaving.Go(func() {
		<-accepted
		cancel(left)
	})
	if _, _, err := i.CacheKey(ctx, nil, 0); !errors.Is(err, left) {
		t.Errorf("got %v", err)
	}
	leaving.Wait()
	must(t, l.Close())
	conns.Wait()
	_, _, err = d.try(t, op("http://"+l.Addr().String()+"/r.git", "main", nil))
	check(t, err, "failed to fetch remote http://"+l.Addr().String()+"/r.git")
}

func TestVersions(t *testing.T) {
	for said, want := range map[string]string{
		"git version 2.39.5": "", "git version 2.31.0": "", "git version 3.0.0": "", "git version 2.50.1 (Apple Git-155)": "",
		"git version 2.30.2": "too old: it is git version 2.30.2, and 2.31 is needed", "git version 1.99.1": "too old", "hub 2": "where its version is expected",
	} {
		if err := checkVersion(said); want != "" {
			check(t, err, want)
		} else if err != nil {
			t.Errorf("%s: %v", said, err)
		}
	}
}

func TestNoGit(t *testing.T) {
	d := start(t, t.TempDir())
	t.Setenv("PATH", t.TempDir())
	_, _, err := d.try(t, op("https://host/r.git", "main", nil))
	check(t, err, "install the package git")
}

// ssh gets the client's agent and known hosts, and nothing of the machine.
//
// compat: LLB-102, LLB-C20, LLB-C21
func TestSSH(t *testing.T) {
	d := start(t, t.TempDir())
	bin := t.TempDir()
	// It stands in for ssh, so that no server is needed: it tells what it was given.
	must(t, os.WriteFile(filepath.Join(bin, "ssh"), []byte(`#!/bin/sh
for a; do case $a in UserKnownHostsFile=*) echo "known: $(cat "${a#*=}")" >&2;; esac; done
test -S "$SSH_AUTH_SOCK" && echo "agent is there" >&2
echo "args: $*" >&2
exit 255
`), 0o755))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	o := op("git@host.invalid:r.git", "main", attrs(pb.AttrMountSSHSock, "default", pb.AttrKnownSSHHosts, "host.invalid ssh-ed25519 AAAA\n"))
	o.Identifier = "git://host.invalid/r.git#main"
	_, _, err := d.try(t, o, sessiontest.Connect(t, d.sm, ""))
	check(t, err, `no SSH key "default" forwarded from the client; it is with --ssh default`)

	dir, err := os.MkdirTemp("", "agent")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", dir+"/s")
	must(t, err)
	defer l.Close()
	agent, err := sshprovider.NewSSHAgentProvider([]sshprovider.AgentConfig{{ID: "default", Paths: []string{dir + "/s"}}})
	must(t, err)
	id := sessiontest.Connect(t, d.sm, "", agent)
	_, _, err = d.try(t, o, id)
	for _, want := range []string{"failed to fetch remote git@host.invalid:r.git", "known: host.invalid ssh-ed25519 AAAA", "agent is there", "-F /dev/null", "IdentityFile=none", "StrictHostKeyChecking=yes"} {
		check(t, err, want)
	}
	delete(o.Attrs, pb.AttrKnownSSHHosts)
	_, _, err = d.try(t, o, id)
	check(t, err, "StrictHostKeyChecking=no")
}

// One of many that want the same fetches it, and they all get the same.
func TestAtTheSameTime(t *testing.T) {
	d, srv := start(t, t.TempDir()), gittest.NewServer(t)
	r := srv.Repo(t, "r.git")
	c := r.Commit(map[string]string{"d/f": "1"})
	var all sync.WaitGroup
	refs := make([]string, 8)
	for n := range refs {
		all.Go(func() {
			ref, err := d.resolve(t, op(r.URL, c+[]string{"", ":d"}[n%2], nil)).Fetch(t.Context(), nil)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(ref.Release)
			refs[n] = ref.ID()
		})
	}
	all.Wait()
	slices.Sort(refs)
	if got := slices.Compact(refs); len(got) != 2 {
		t.Errorf("two checkouts became the records %v", got)
	}
	posts := 0
	for _, req := range srv.Requests() {
		if req.Method == http.MethodPost && req.ContentLength > 400 {
			posts++
		}
	}
	if posts > 1 {
		t.Errorf("the pack was asked for %d times", posts)
	}
}
