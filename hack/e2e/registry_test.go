//go:build e2e

package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// startRegistry runs a registry of the test's own.
func startRegistry(t *testing.T, o harness.Options) *harness.Registry {
	t.Helper()
	reg, err := o.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	return reg
}

func newCA(t *testing.T, name string) *harness.CA {
	t.Helper()
	ca, err := harness.NewCA(t.TempDir(), name)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *harness.CA, name string) harness.KeyPair {
	t.Helper()
	pair, err := ca.Issue(name)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// push builds an image with one file that says text, and pushes it.
func (d *daemon) push(ref, text string) result {
	d.t.Helper()
	return d.dockerfile("FROM scratch\nCOPY f /f\n", files{"f": text}, "--output", "type=image,push=true,name="+ref)
}

// pull returns the file that the pushed image holds.
func (d *daemon) pull(ref string, args ...string) string {
	d.t.Helper()
	return readFile(d.t, d.local("FROM "+ref+"\n", nil, args...), "f")
}

// roundTrip pushes to the registry, looks at what arrived there, and builds
// from it with a daemon that has none of it.
func roundTrip(t *testing.T, reg *harness.Registry, config string) {
	t.Helper()
	ref := reg.Host + "/private/app:1"
	newDaemonWithConfig(t, config).push(ref, "there and back").must(t)
	l := readImageOf(t, reg, "private/app", "1")
	if got := l.entries(t, 0); len(got) != 1 || got[0] != "f" {
		t.Errorf("the registry got a layer with %q", got)
	}
	if got := newDaemonWithConfig(t, config).pull(ref); got != "there and back" {
		t.Errorf("f = %q", got)
	}
}

// compat: DMN-047, DMN-102
func TestRegistryOverTLS(t *testing.T) {
	ca := newCA(t, "ca")
	reg := startRegistry(t, harness.Options{TLS: ca})
	section := func(text string) string { return fmt.Sprintf("[registry.%q]\n%s\n", reg.Host, text) }
	t.Run("UnknownCA", func(t *testing.T) {
		newDaemon(t).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "unknown authority", "ca = [...]", "registry.")
	})
	t.Run("OtherCA", func(t *testing.T) {
		other := newCA(t, "other")
		newDaemonWithConfig(t, section(fmt.Sprintf("ca = [%q]", other.File))).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "unknown authority")
	})
	t.Run("MissingCA", func(t *testing.T) {
		newDaemonWithConfig(t, section(`ca = ["/no/such/ca.pem"]`)).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "/no/such/ca.pem")
	})
	t.Run("PlainHTTP", func(t *testing.T) {
		newDaemonWithConfig(t, section("http = true")).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "speaks HTTPS", "http = true")
	})
	t.Run("CA", func(t *testing.T) { roundTrip(t, reg, section(fmt.Sprintf("ca = [%q]", ca.File))) })
	t.Run("Insecure", func(t *testing.T) { roundTrip(t, reg, section("insecure = true")) })
	t.Run("Directory", func(t *testing.T) {
		dir := files{"ca.crt": readFile(t, ca.File)}.write(t)
		roundTrip(t, reg, section(fmt.Sprintf("tlsconfigdir = [%q, \"/no/such/dir\"]", dir)))
	})
}

// compat: DMN-047, DMN-102
func TestRegistryWantsClientCertificate(t *testing.T) {
	ca := newCA(t, "ca")
	reg := startRegistry(t, harness.Options{TLS: ca, ClientCerts: true})
	pair := issue(t, ca, "client")
	section := fmt.Sprintf("[registry.%q]\nca = [%q]\n", reg.Host, ca.File)
	keypair := func(p harness.KeyPair) string {
		return section + fmt.Sprintf("[[registry.%q.keypair]]\ncert = %q\nkey = %q\n", reg.Host, p.Cert, p.Key)
	}
	t.Run("None", func(t *testing.T) {
		newDaemonWithConfig(t, section).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "certificate")
	})
	t.Run("OfAnotherCA", func(t *testing.T) {
		newDaemonWithConfig(t, keypair(issue(t, newCA(t, "other"), "client"))).push(reg.Host+"/x:1", "x").fails(t, reg.Host, "certificate")
	})
	t.Run("MissingKey", func(t *testing.T) {
		newDaemonWithConfig(t, keypair(harness.KeyPair{Cert: pair.Cert, Key: "/no/such.key"})).push(reg.Host+"/x:1", "x").fails(t, "/no/such.key")
	})
	t.Run("KeyPair", func(t *testing.T) { roundTrip(t, reg, keypair(pair)) })
	t.Run("Directory", func(t *testing.T) {
		dir := files{"ca.crt": readFile(t, ca.File), "client.cert": readFile(t, pair.Cert), "client.key": readFile(t, pair.Key)}.write(t)
		roundTrip(t, reg, fmt.Sprintf("[registry.%q]\ntlsconfigdir = [%q]\n", reg.Host, dir))
	})
}

// compat: DMN-047, DMN-101
func TestRegistryOverPlainHTTP(t *testing.T) {
	section := func(http bool) string { return fmt.Sprintf("[registry.%q]\nhttp = %t\n", env.registry, http) }
	newDaemonWithConfig(t, section(false)).push(env.registry+"/x:1", "x").fails(t, env.registry, "HTTP without TLS", "http = true")
	roundTrip(t, env.reg, section(true))
	roundTrip(t, env.reg, "")
}

// login writes the client's docker config.
func (d *daemon) login(host, user, password string) {
	d.t.Helper()
	writeLogin(d.t, d.dockerConfig(), host, user, password)
}

// writeLogin writes docker's config to a directory.
func writeLogin(t *testing.T, dir, host, user, password string) {
	t.Helper()
	type entry struct {
		Auth string `json:"auth"`
	}
	auths := map[string]map[string]entry{"auths": {host: {base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}}}
	data, err := json.Marshal(auths)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Credentials come from the client alone, for each build anew.
// compat: SES-060, DMN-103, BCL-040, X-4
func TestRegistryCredentials(t *testing.T) {
	const password = "hunter2-of-the-registry"
	reg := startRegistry(t, harness.Options{User: "ann", Password: password})
	ref := reg.Host + "/private/app:1"
	d := newDaemon(t)
	d.push(ref, "secret layer").fails(t, reg.Host, "credentials")
	d.login(reg.Host, "ann", "wrong")
	d.push(ref, "secret layer").fails(t, reg.Host, "access denied", "are refused")
	d.login(reg.Host, "ann", password)
	d.push(ref, "secret layer").must(t)
	if l := readImageOf(t, reg, "private/app", "1"); len(l.manifest.Layers) != 1 {
		t.Errorf("the registry got %d layers", len(l.manifest.Layers))
	}
	if got := d.pull(ref); got != "secret layer" {
		t.Errorf("f = %q", got)
	}

	t.Run("Pull", func(t *testing.T) {
		d := newDaemon(t)
		build := func() result { return d.dockerfile("FROM "+ref+"\n", nil, "--output", "type=local,dest="+t.TempDir()) }
		build().fails(t, reg.Host, "private/app", "credentials")
		d.login(reg.Host, "ann", "wrong")
		build().fails(t, reg.Host, "private/app", "access denied", "are refused")
		d.login(reg.Host, "ann", password)
		if got := d.pull(ref); got != "secret layer" {
			t.Errorf("f = %q", got)
		}
		// What one client may read, another may not, though it is all here.
		if err := os.RemoveAll(d.dockerConfig()); err != nil {
			t.Fatal(err)
		}
		build().fails(t, reg.Host, "private/app", "credentials")
		history := d.buildctl("debug", "histories", "--format", "{{json .}}").must(t).stdout
		d.stop()
		defer d.start()
		// As it is, and as it is sent.
		for _, text := range []string{password, base64.StdEncoding.EncodeToString([]byte("ann:" + password))} {
			if strings.Contains(d.log.String(), text) {
				t.Error("the daemon's log has the password")
			}
			if strings.Contains(history, text) {
				t.Error("the history has the password")
			}
			assertNowhere(t, d.root, text)
		}
	})
}

// assertNowhere fails the test if a file below dir holds text.
func assertNowhere(t *testing.T, dir, text string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		if strings.Contains(readFile(t, path), text) {
			t.Errorf("%s holds %q", path, text)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// watched passes requests on to a registry and keeps their paths.
type watched struct {
	Host  string
	mu    sync.Mutex // guards paths
	paths []string
}

func watch(t *testing.T, reg *harness.Registry) *watched {
	t.Helper()
	w := &watched{}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Host})
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.paths = append(w.paths, r.Method+" "+r.URL.Path)
		w.mu.Unlock()
		to.ServeHTTP(rw, r)
	}))
	t.Cleanup(srv.Close)
	w.Host = srv.Listener.Addr().String()
	return w
}

// asked counts the requests for paths with part in them.
func (w *watched) asked(part string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, p := range w.paths {
		if strings.Contains(p, part) {
			n++
		}
	}
	return n
}

// compat: DMN-100, DMN-047
func TestMirrors(t *testing.T) {
	const from = "FROM %s AS b\nFROM scratch\nCOPY --from=b /etc/group /f\n"
	mirrors := func(host string, list ...string) string {
		data, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("[registry.%q]\nmirrors = %s\n", host, data)
	}
	check := func(t *testing.T, d *daemon, ref string) {
		t.Helper()
		if got := readFile(t, d.local(fmt.Sprintf(from, ref), nil), "f"); !strings.Contains(got, "wheel:x:10") {
			t.Errorf("f = %q", got)
		}
	}
	t.Run("HasIt", func(t *testing.T) {
		mirror, origin := watch(t, env.reg), watch(t, env.reg)
		check(t, newDaemonWithConfig(t, mirrors(origin.Host, mirror.Host)), origin.Host+"/library/busybox:latest")
		if mirror.asked("/blobs/") == 0 || origin.asked("/") != 0 {
			t.Errorf("the mirror was asked %d times for blobs, the origin %d times", mirror.asked("/blobs/"), origin.asked("/"))
		}
	})
	t.Run("Prefix", func(t *testing.T) {
		if err := env.layout.Push(env.registry, "hub/cache/library/busybox", "latest"); err != nil {
			t.Fatal(err)
		}
		mirror := watch(t, env.reg)
		check(t, newDaemonWithConfig(t, mirrors("docker.io", mirror.Host+"/hub/cache")), "busybox")
		if mirror.asked("GET /v2/hub/cache/library/busybox/blobs/") == 0 {
			t.Errorf("the mirror was asked only for %q", mirror.paths)
		}
	})
	t.Run("Down", func(t *testing.T) {
		origin := watch(t, env.reg)
		check(t, newDaemonWithConfig(t, mirrors(origin.Host, harness.Nobody)), origin.Host+"/library/busybox:latest")
		if origin.asked("/blobs/") == 0 {
			t.Error("the origin was not asked")
		}
	})
	t.Run("LacksIt", func(t *testing.T) {
		empty, mirror, origin := watch(t, startRegistry(t, harness.Options{})), watch(t, env.reg), watch(t, env.reg)
		check(t, newDaemonWithConfig(t, mirrors(origin.Host, empty.Host, mirror.Host)), origin.Host+"/library/busybox:latest")
		if empty.asked("/manifests/latest") == 0 || mirror.asked("/blobs/") == 0 || origin.asked("/") != 0 {
			t.Errorf("asked for: %q, then %q, then %q", empty.paths, mirror.paths, origin.paths)
		}
	})
	t.Run("NoneHasIt", func(t *testing.T) {
		mirror, origin := watch(t, env.reg), watch(t, env.reg)
		newDaemonWithConfig(t, mirrors(origin.Host, mirror.Host)).dockerfile("FROM "+origin.Host+"/no/such:image\n", nil).fails(t, origin.Host+"/no/such:image", "not found")
	})
	t.Run("PushGoesToTheOrigin", func(t *testing.T) {
		mirror, origin := watch(t, env.reg), watch(t, env.reg)
		newDaemonWithConfig(t, mirrors(origin.Host, mirror.Host)).push(origin.Host+"/mirrored/app:1", "x").must(t)
		if mirror.asked("/") != 0 {
			t.Errorf("the mirror was asked for %q", mirror.paths)
		}
		readImage(t, "mirrored/app", "1")
	})
	t.Run("OwnSectionOfAMirror", func(t *testing.T) {
		ca := newCA(t, "ca")
		reg := startRegistry(t, harness.Options{TLS: ca})
		section := fmt.Sprintf("[registry.%q]\nca = [%q]\n", reg.Host, ca.File)
		newDaemonWithConfig(t, section).push(reg.Host+"/some/app:1", "of the mirror").must(t)
		if got := newDaemonWithConfig(t, mirrors("origin.invalid", reg.Host)+section).pull("origin.invalid/some/app:1"); got != "of the mirror" {
			t.Errorf("f = %q", got)
		}
	})
}
