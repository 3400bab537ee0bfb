//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// guarded passes requests on to a registry from users with their passwords. What
// is below NAME/ there is that user's alone, what is below both/ is everybody's
// who has a name.
type guarded struct {
	Host    string
	mu      sync.Mutex // guards what follows
	allowed map[string]int
	denied  []string // what users asked for that is another's
}

func guard(t *testing.T, reg *harness.Registry, passwords map[string]string) *guarded {
	t.Helper()
	g := &guarded{allowed: map[string]int{}}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Host})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, ok := r.BasicAuth()
		if !ok || passwords[user] == "" || passwords[user] != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
			return
		}
		owner, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
		may := slices.Contains([]string{"", "both", user}, owner)
		g.mu.Lock()
		if may {
			g.allowed[user]++
		} else {
			g.denied = append(g.denied, user+" "+r.Method+" "+r.URL.Path)
		}
		g.mu.Unlock()
		if !may {
			http.Error(w, `{"errors":[{"code":"DENIED"}]}`, http.StatusForbidden)
			return
		}
		r.Host = g.Host // of the addresses in answers
		to.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	g.Host = srv.Listener.Addr().String()
	return g
}

// asked is how often a user was allowed something since the last call, and
// everything that was denied.
func (g *guarded) asked(user string) (allowed int, denied []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	allowed, denied = g.allowed[user], g.denied
	g.allowed, g.denied = map[string]int{}, nil
	return allowed, denied
}

// person is somebody with credentials and an agent, or without.
type person struct {
	d      *daemon
	config string // directory of docker's config
	args   []string
}

func (d *daemon) person(args ...string) *person {
	d.t.Helper()
	return &person{d, d.t.TempDir(), args}
}

func (p *person) build(dir string, args ...string) result {
	p.d.t.Helper()
	cmd := p.d.client(filepath.Join(env.peer, "buildctl"), slices.Concat([]string{"build", "--frontend", "dockerfile.v0", "--local", "context=" + dir, "--local", "dockerfile=" + dir}, p.args, args)...)
	cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+p.config)
	return runCommand(p.d.t, cmd)
}

// Two people build the same Dockerfile at the same time, each with an agent and
// credentials of his own: nobody gets what comes of the other's, or may do with
// the registry what only the other may, then or later.
// compat: X-2, DMN-103, LLB-048
func TestClientsWithTheirOwn(t *testing.T) {
	passwords := map[string]string{"ann": "of-ann", "bob": "of-bob"}
	reg := startRegistry(t, harness.Options{})
	g := guard(t, reg, passwords)
	d := newDaemon(t)
	people, agents := map[string]*person{}, map[string]agent{}
	for name, password := range passwords {
		agents[name] = startAgent(t)
		people[name] = d.person("--ssh", "default="+agents[name].socket)
		writeLogin(t, people[name].config, g.Host, name, password)
	}
	stranger := d.person()

	app := files{"Dockerfile": "FROM scratch\nCOPY f /f\n", "f": "for both\n"}.write(t)
	people["ann"].build(app, "--output", "type=image,push=true,name="+g.Host+"/both/app:1").must(t)
	d.buildctl("prune", "--all").must(t)

	dir := files{"Dockerfile": "FROM " + g.Host + "/both/app:1 AS app\nFROM " + env.base + " AS b\nCOPY tools /\nCOPY --from=app /f /f\n" +
		// Each waits until the other's step runs, too.
		"RUN --mount=type=ssh,required=true --mount=type=cache,target=/c ssh-add -L > /key && touch /c/$(md5sum < /key | cut -c 1-32) && " +
		"n=0; until [ $(ls /c | wc -l) = 2 ]; do n=$((n+1)); [ $n -lt 1200 ] || exit 1; sleep 0.05; done\n" +
		"FROM scratch\nCOPY --from=b /key /f /\n"}.write(t)
	copyProgram(t, filepath.Join(dir, "tools"), "ssh-add")
	outs, ended := map[string]string{}, map[string]chan result{}
	for name, p := range people {
		outs[name], ended[name] = t.TempDir(), make(chan result, 1)
		go func() {
			ended[name] <- p.build(dir, "--output", "type=local,dest="+outs[name], "--output", fmt.Sprintf("type=image,push=true,name=%s/%s/out:1", g.Host, name))
		}()
	}
	for name := range people {
		(<-ended[name]).must(t)
		if got, want := readFile(t, outs[name], "key"), readFile(t, agents[name].public); got != want {
			t.Errorf("%s has what came of the key %q, want %q", name, got, want)
		}
		if got := readFile(t, outs[name], "f"); got != "for both\n" {
			t.Errorf("%s: f = %q", name, got)
		}
		if l := readImageOf(t, reg, name+"/out", "1"); len(l.manifest.Layers) == 0 {
			t.Errorf("%s has pushed an image without layers", name)
		}
	}
	if _, denied := g.asked(""); len(denied) > 0 {
		t.Errorf("asked for with somebody else's credentials: %q", denied)
	}

	stranger.build(dir).fails(t, g.Host, "both/app", "credentials")
	of := func(name string) string {
		return files{"Dockerfile": "FROM " + g.Host + "/" + name + "/out:1\n"}.write(t)
	}
	for name, p := range people {
		// All of it is here, and its owner needs nobody for it.
		p.build(of(name), "--output", "type=local,dest="+t.TempDir()).must(t)
		g.asked("")
		out := t.TempDir()
		p.build(of(name), "--opt", "image-resolve-mode=local", "--output", "type=local,dest="+out).must(t)
		if n, denied := g.asked(name); n+len(denied) > 0 || readFile(t, out, "f") != "for both\n" {
			t.Errorf("%s prefers what is here, and the registry was asked %d times", name, n)
		}
		for _, mode := range []string{"default", "pull", "local"} {
			other := map[string]string{"ann": "bob", "bob": "ann"}[name]
			people[other].build(of(name), "--opt", "image-resolve-mode="+mode).fails(t, name+"/out")
			stranger.build(of(name), "--opt", "image-resolve-mode="+mode).fails(t, name+"/out", "credentials")
		}
	}
	people["ann"].build(app, "--output", "type=image,push=true,name="+g.Host+"/bob/out:1").fails(t, "bob/out")
	stranger.build(app, "--output", "type=image,push=true,name="+g.Host+"/both/app:1").fails(t, "both/app", "credentials")
}
