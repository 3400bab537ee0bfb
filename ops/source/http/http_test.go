package http

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdhttp "net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/upload/uploadprovider"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// daemon is what a source works with, on a state directory.
type daemon struct {
	*Source
	cache *cache.Manager
	sm    *session.Manager
	root  string
	close func()
}

func start(t testing.TB, root string) *daemon {
	t.Helper()
	c := cachetest.Open(t, root)
	sm, err := session.NewManager()
	must(t, err)
	return &daemon{cache: c.Manager, close: c.Shut, sm: sm, root: root, Source: New(Options{Cache: c.Manager, Sessions: sm})}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

// server counts what is asked of it.
type server struct {
	*httptest.Server
	mu   sync.Mutex // guards the fields below
	got  []*stdhttp.Request
	sent int // bytes
}

func serve(t testing.TB, fn stdhttp.HandlerFunc) *server {
	s := &server{}
	s.Server = httptest.NewServer(stdhttp.HandlerFunc(func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		s.mu.Lock()
		s.got = append(s.got, r)
		s.mu.Unlock()
		fn(&counted{w, s}, r)
	}))
	t.Cleanup(s.Close)
	return s
}

type counted struct {
	stdhttp.ResponseWriter
	s *server
}

func (c *counted) Write(p []byte) (int, error) {
	c.s.mu.Lock()
	c.s.sent += len(p)
	c.s.mu.Unlock()
	return c.ResponseWriter.Write(p)
}

// taken is what was asked since the last call, and how much was answered.
func (s *server) taken() ([]*stdhttp.Request, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	got, sent := s.got, s.sent
	s.got, s.sent = nil, 0
	return got, sent
}

// fetch gives key, name, mode and content of a download.
func (d *daemon) fetch(t testing.TB, url string, attrs map[string]string, sessions ...string) file {
	t.Helper()
	f, err := d.try(t, url, attrs, sessions...)
	must(t, err)
	return f
}

type file struct {
	key, name, data string
	info            os.FileInfo
	record          string
}

func (d *daemon) try(t testing.TB, url string, attrs map[string]string, sessions ...string) (file, error) {
	t.Helper()
	return d.fetchFor(t, session.NewGroup(sessions...), url, attrs)
}

func (d *daemon) fetchFor(t testing.TB, g session.Group, url string, attrs map[string]string) (f file, err error) {
	t.Helper()
	i, err := d.Resolve(&pb.SourceOp{Identifier: url, Attrs: attrs}, ocispec.Platform{})
	if err != nil {
		return f, err
	}
	if f.key, _, err = i.CacheKey(t.Context(), g, 0); err != nil {
		return f, err
	}
	ref, err := i.Fetch(t.Context(), g)
	if err != nil {
		return f, err
	}
	defer ref.Release()
	f.record = ref.ID()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	entries, err := os.ReadDir(view.Path())
	must(t, err)
	if len(entries) != 1 {
		t.Fatalf("%d files", len(entries))
	}
	f.name = entries[0].Name()
	f.info, err = entries[0].Info()
	must(t, err)
	data, err := os.ReadFile(view.Path() + "/" + f.name)
	must(t, err)
	f.data = string(data)
	return f, nil
}

const modified = "Tue, 14 Nov 2023 22:13:20 GMT"

// compat: LLB-112, LLB-114, LLB-C35
func TestFile(t *testing.T) {
	d := start(t, t.TempDir())
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		if v := r.URL.Query().Get("as"); v != "" {
			w.Header().Set("Content-Disposition", v)
		}
		if r.URL.Path == "/dated/f" {
			w.Header().Set("Last-Modified", modified)
		}
		io.WriteString(w, r.Header.Get("Accept")+r.Header.Get("User-Agent")+r.Header.Get("Cookie"))
	})
	for _, c := range []struct {
		url   string
		attrs map[string]string
		name  string
		mode  os.FileMode
		data  string
	}{
		{"/a/b.txt?q", nil, "b.txt", 0o600, "kiln/0.1.0-dev"},
		{"/", nil, "download", 0o600, "kiln/0.1.0-dev"},
		{"", nil, "download", 0o600, "kiln/0.1.0-dev"},
		{"/dated/f", nil, "f", 0o600, "kiln/0.1.0-dev"},
		{"/x?as=attachment%3B+filename=%22../../etc/c.tar%22", nil, "c.tar", 0o600, "kiln/0.1.0-dev"},
		{"/x?as=attachment%3B+filename=%22..%22", nil, "download", 0o600, "kiln/0.1.0-dev"},
		{"/x?as=junk%22", nil, "x", 0o600, "kiln/0.1.0-dev"},
		{"/x?as=attachment%3B+filename=c", map[string]string{pb.AttrHTTPFilename: "../n", pb.AttrHTTPPerm: "04755"}, "n", 0o755 | os.ModeSetuid, "kiln/0.1.0-dev"},
		{"/h", map[string]string{pb.AttrHTTPHeaderPrefix + "accept": "text/x", pb.AttrHTTPHeaderPrefix + "user-agent": "me", pb.AttrHTTPHeaderPrefix + "cookie": "c"}, "h", 0o600, "text/xme"},
	} {
		f := d.fetch(t, s.URL+c.url, c.attrs)
		want := time.Unix(0, 0)
		if c.url == "/dated/f" {
			want = time.Unix(1700000000, 0)
		}
		if f.name != c.name || f.info.Mode() != c.mode || f.data != c.data || !f.info.ModTime().Equal(want) {
			t.Errorf("%s gave %s %s %s %q", c.url, f.name, f.info.Mode(), f.info.ModTime(), f.data)
		}
	}
	for _, c := range []struct{ url, attr, value, want string }{
		{"http://", "", "", "names no host"},
		{"http://h/%zz", "", "", "can't be parsed"},
		{"http://h/f", pb.AttrHTTPChecksum, "sha256:12", "http.checksum"},
		{"http://h/f", pb.AttrHTTPUID, "-1", "http.uid"},
		{"http://h/f", pb.AttrHTTPPerm, "rwx", "http.perm"},
		{"http://h/f", pb.AttrHTTPSignatureVerify, "x", pb.AttrHTTPSignatureVerify + " is not supported by this daemon"},
		{"http://h/f", pb.AttrHTTPSignatureVerifyPubKey, "x", pb.AttrHTTPSignatureVerifyPubKey + " is not supported by this daemon"},
	} {
		_, err := d.try(t, c.url, map[string]string{c.attr: c.value})
		check(t, err, c.want)
	}
}

// The keys are upstream's.
//
// compat: LLB-157
func TestKey(t *testing.T) {
	d := start(t, t.TempDir())
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		w.Header().Set("Last-Modified", modified)
		io.WriteString(w, "data")
	})
	sum := digest.FromString("data").String()
	for _, c := range []struct {
		attrs map[string]string
		json  string
	}{
		{nil, `{"Filename":"f","Perm":0,"UID":0,"GID":0,"Checksum":"` + sum + `","LastModTime":"` + modified + `"}`},
		{map[string]string{pb.AttrHTTPChecksum: sum}, `{"Filename":"f","Perm":0,"UID":0,"GID":0,"Checksum":"` + sum + `"}`},
		{map[string]string{pb.AttrHTTPFilename: "g", pb.AttrHTTPPerm: "0644", pb.AttrHTTPUID: "1", pb.AttrHTTPGID: "2", pb.AttrHTTPHeaderPrefix + "accept": "a"},
			`{"Filename":"g","Perm":420,"UID":1,"GID":2,"Checksum":"` + sum + `","LastModTime":"` + modified + `","Header":[{"Name":"Accept","Value":"a"}]}`},
	} {
		if f := d.fetch(t, s.URL+"/f", c.attrs); f.key != digest.FromString(c.json).String() {
			t.Errorf("the key with %v isn't of %s", c.attrs, c.json)
		}
	}
}

// What didn't change isn't sent again, after a restart either.
//
// compat: LLB-110
func TestRevalidation(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(w stdhttp.ResponseWriter, r *stdhttp.Request, version string)
	}{
		{"ETag", func(w stdhttp.ResponseWriter, r *stdhttp.Request, version string) {
			w.Header().Set("ETag", `W/"`+version+`"`)
			if strings.Contains(r.Header.Get("If-None-Match"), `"`+version+`"`) {
				w.WriteHeader(stdhttp.StatusNotModified)
				return
			}
			io.WriteString(w, "data "+version)
		}},
		{"ETag that isn't repeated", func(w stdhttp.ResponseWriter, r *stdhttp.Request, version string) {
			if r.Header.Get("If-None-Match") == `"`+version+`"` {
				w.WriteHeader(stdhttp.StatusNotModified)
				return
			}
			w.Header().Set("ETag", `"`+version+`"`)
			io.WriteString(w, "data "+version)
		}},
		{"time", func(w stdhttp.ResponseWriter, r *stdhttp.Request, version string) {
			at := time.Unix(1700000000+int64(version[0]), 0).UTC().Format(stdhttp.TimeFormat)
			w.Header().Set("Last-Modified", at)
			if r.Header.Get("If-Modified-Since") == at {
				w.WriteHeader(stdhttp.StatusNotModified)
				return
			}
			io.WriteString(w, "data "+version)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			version := "1"
			s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) { c.answer(w, r, version) })
			root := t.TempDir()
			d := start(t, root)
			first := d.fetch(t, s.URL+"/f", nil)
			s.taken()
			again := d.fetch(t, s.URL+"/f", nil)
			d.close()
			d = start(t, root)
			restarted := d.fetch(t, s.URL+"/f", nil)
			if got, sent := s.taken(); len(got) != 2 || sent != 0 {
				t.Errorf("%d requests and %d bytes for what is there", len(got), sent)
			}
			if again.record != first.record || restarted.record != first.record || restarted.key != first.key || restarted.data != "data 1" {
				t.Errorf("got %v, %v, %v", first, again, restarted)
			}
			version = "2"
			if f := d.fetch(t, s.URL+"/f", nil); f.data != "data 2" || f.key == first.key {
				t.Errorf("got %v", f)
			}
		})
	}
	// A server that ignores the condition isn't listened to to the end.
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		w.Header().Set("ETag", `"x"`)
		io.WriteString(w, "data")
	})
	d := start(t, t.TempDir())
	first, second := d.fetch(t, s.URL, nil), d.fetch(t, s.URL, nil)
	if first.record != second.record {
		t.Errorf("the same ETag gave the records %s and %s", first.record, second.record)
	}
}

// A build sees one state of a URL, whatever its steps make of it, and asks for it
// once. Another build sees what is there then.
//
// compat: LLB-117
func TestOnce(t *testing.T) {
	d := start(t, t.TempDir())
	version := 0
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		version++
		w.Header().Set("Content-Disposition", "attachment; filename=offered")
		fmt.Fprintf(w, "%s %d", r.Header.Get("Accept"), version)
	})
	first, second := (&ops.Build{}).Group(), (&ops.Build{}).Group()
	for _, c := range []struct {
		build      session.Group
		attrs      map[string]string
		name, data string
		mode       os.FileMode
	}{
		{first, map[string]string{pb.AttrHTTPFilename: "named", pb.AttrHTTPPerm: "0644"}, "named", " 1", 0o644},
		{first, nil, "offered", " 1", 0o600},
		{first, nil, "offered", " 1", 0o600},
		{first, map[string]string{pb.AttrHTTPPerm: "0755"}, "offered", " 1", 0o755},
		{first, map[string]string{pb.AttrHTTPHeaderPrefix + "accept": "text"}, "offered", "text 2", 0o600},
		{second, nil, "offered", " 3", 0o600},
	} {
		f, err := d.fetchFor(t, c.build, s.URL+"/f", c.attrs)
		must(t, err)
		if f.name != c.name || f.data != c.data || f.info.Mode() != c.mode {
			t.Errorf("%v gave %s %s %q, want %s %s %q", c.attrs, f.name, f.info.Mode(), f.data, c.name, c.mode, c.data)
		}
	}
	m, err := d.ResolveMeta(t.Context(), MetaRequest{Op: &pb.SourceOp{Identifier: s.URL + "/f"}, Group: first})
	if err != nil || m.Digest != digest.FromString(" 1") {
		t.Errorf("asked about it, its digest is %s: %v", m.Digest, err)
	}
	if got, _ := s.taken(); len(got) != 3 {
		t.Errorf("%d requests for three questions", len(got))
	}
	// A file that is known by its digest is no answer to who wants what is there.
	sum := map[string]string{pb.AttrHTTPChecksum: digest.FromString(" 1").String()}
	third := (&ops.Build{}).Group()
	if f, err := d.fetchFor(t, third, s.URL+"/f", sum); err != nil || f.data != " 1" {
		t.Errorf("by its digest: %q, %v", f.data, err)
	}
	if f, err := d.fetchFor(t, third, s.URL+"/f", nil); err != nil || f.data != " 4" {
		t.Errorf("after it was taken by its digest: %q, %v", f.data, err)
	}
}

// What another step of the build got isn't needed any more when it is gone.
//
// compat: LLB-117
func TestOnceIsLost(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, d *daemon, f file){
		"pruned": func(t *testing.T, d *daemon, f file) { must(t, d.cache.Remove(f.record)) },
		"changed": func(t *testing.T, d *daemon, f file) {
			found, err := filepath.Glob(d.root + "/snapshots/*/fs/" + f.name)
			must(t, err)
			for _, path := range found {
				must(t, os.WriteFile(path, []byte("other"), 0o600))
			}
			if len(found) != 1 {
				t.Fatalf("the file is at %q", found)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := start(t, t.TempDir())
			s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) { io.WriteString(w, "data") })
			build := (&ops.Build{}).Group()
			f, err := d.fetchFor(t, build, s.URL+"/f", nil)
			must(t, err)
			lose(t, d, f)
			if f, err = d.fetchFor(t, build, s.URL+"/f", map[string]string{pb.AttrHTTPFilename: "g"}); err != nil || f.name != "g" || f.data != "data" {
				t.Errorf("got %s %q, %v", f.name, f.data, err)
			}
		})
	}
}

// compat: LLB-111
func TestChecksum(t *testing.T) {
	d := start(t, t.TempDir())
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) { io.WriteString(w, "data") })
	for _, algorithm := range []digest.Algorithm{digest.SHA256, digest.SHA512} {
		attrs := map[string]string{pb.AttrHTTPChecksum: algorithm.FromString("data").String()}
		i, err := d.Resolve(&pb.SourceOp{Identifier: s.URL + "/f", Attrs: attrs}, ocispec.Platform{})
		must(t, err)
		if _, _, err := i.CacheKey(t.Context(), nil, 0); err != nil {
			t.Error(err)
		}
		if got, _ := s.taken(); len(got) != 0 {
			t.Errorf("%d requests for a key that is known", len(got))
		}
		if f := d.fetch(t, s.URL+"/f", attrs); f.data != "data" {
			t.Errorf("got %v", f)
		}
		d.fetch(t, s.URL+"/f", attrs)
		if got, _ := s.taken(); len(got) != 1 {
			t.Errorf("%d requests for a file that is there the second time", len(got))
		}
	}
	_, err := d.try(t, s.URL+"/f", map[string]string{pb.AttrHTTPChecksum: digest.FromString("other").String()})
	check(t, err, "digest mismatch for "+s.URL+"/f: "+digest.FromString("data").String()+" (expected: "+digest.FromString("other").String()+")")
}

// compat: LLB-113
func TestCredentials(t *testing.T) {
	d := start(t, t.TempDir())
	told := func(w stdhttp.ResponseWriter, r *stdhttp.Request) { io.WriteString(w, r.Header.Get("Authorization")) }
	other := serve(t, told)
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		if to := r.URL.Query().Get("to"); to != "" {
			stdhttp.Redirect(w, r, to, stdhttp.StatusFound)
			return
		}
		if r.URL.Path == "/none" {
			stdhttp.NotFound(w, r)
			return
		}
		told(w, r)
	})
	named := map[string]string{pb.AttrHTTPAuthHeaderSecret: "MINE"}
	for _, c := range []struct {
		name    string
		secrets sessiontest.Secrets
		url     string
		attrs   map[string]string
		want    string
	}{
		{"named", sessiontest.Secrets{"MINE": "Bearer s3cr3t"}, s.URL, named, "Bearer s3cr3t"},
		{"token of the host", sessiontest.Secrets{"HTTP_AUTH_TOKEN_127.0.0.1": "s3cr3t\n"}, s.URL, nil, "Bearer s3cr3t"},
		{"header of the host", sessiontest.Secrets{"HTTP_AUTH_HEADER_127.0.0.1": "Basic s3cr3t"}, s.URL, nil, "Basic s3cr3t"},
		{"of the URL", nil, strings.Replace(s.URL, "http://", "http://me:s3cr3t@", 1), nil, "Basic bWU6czNjcjN0"},
		{"within the host", sessiontest.Secrets{"MINE": "Bearer s3cr3t"}, s.URL + "/?to=/elsewhere", named, "Bearer s3cr3t"},
		{"to another port", sessiontest.Secrets{"MINE": "Bearer s3cr3t"}, s.URL + "/?to=" + other.URL, named, ""},
		{"to another host", sessiontest.Secrets{"MINE": "Bearer s3cr3t"}, s.URL + "/?to=" + strings.Replace(other.URL, "127.0.0.1", "localhost", 1), named, ""},
		{"there and back", sessiontest.Secrets{"MINE": "Bearer s3cr3t"}, s.URL + "/?to=" + other.URL + "/", named, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := sessiontest.Connect(t, d.sm, "", c.secrets.Service())
			i, err := d.Resolve(&pb.SourceOp{Identifier: c.url, Attrs: c.attrs}, ocispec.Platform{})
			must(t, err)
			if f := d.fetch(t, c.url, c.attrs, id); f.data != c.want {
				t.Errorf("the server was told %q, want %q", f.data, c.want)
			}
			for _, f := range i.(*instance).Facets() {
				if strings.Contains(f.Value, "s3cr3t") {
					t.Errorf("explanations show %v", f)
				}
			}
		})
	}
	id := sessiontest.Connect(t, d.sm, "", sessiontest.Secrets{}.Service())
	_, err := d.try(t, s.URL, named, id)
	check(t, err, "failed to retrieve HTTP auth secret MINE")
	_, err = d.try(t, strings.Replace(s.URL, "http://", "http://me:s3cr3t@", 1)+"/none", nil, id)
	check(t, err, "me:xxxxx@127.0.0.1")
	if strings.Contains(err.Error(), "s3cr3t") {
		t.Errorf("the error shows a password: %v", err)
	}
	d.close()
	// What servers repeated is content; what the daemon keeps beside it is in its database.
	if out, err := exec.Command("grep", "-rlaF", "s3cr3t", d.root, "--exclude-dir=snapshots").Output(); err == nil {
		t.Errorf("a password is on disk: %s", out)
	}
}

func TestHostileServers(t *testing.T) {
	d := start(t, t.TempDir())
	d.opts.MaxSize, d.opts.Stall = 1000, 200*time.Millisecond
	gone := make(chan struct{})
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		switch r.URL.Path {
		case "/404":
			stdhttp.NotFound(w, r)
		case "/401":
			w.WriteHeader(stdhttp.StatusUnauthorized)
		case "/304":
			w.WriteHeader(stdhttp.StatusNotModified)
		case "/long":
			w.Header().Set("Content-Length", "1001")
			w.WriteHeader(stdhttp.StatusOK)
		case "/endless":
			for range 100 {
				io.WriteString(w, strings.Repeat("x", 100))
				w.(*counted).ResponseWriter.(stdhttp.Flusher).Flush()
			}
		case "/short":
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "x")
		case "/loop":
			stdhttp.Redirect(w, r, "/loop", stdhttp.StatusFound)
		case "/file":
			stdhttp.Redirect(w, r, "file:///etc/passwd", stdhttp.StatusFound)
		case "/mine":
			stdhttp.Redirect(w, r, "http://buildkit-session/x", stdhttp.StatusFound)
		case "/silent":
			<-gone
		case "/stops":
			io.WriteString(w, "x")
			w.(*counted).ResponseWriter.(stdhttp.Flusher).Flush()
			<-gone
		}
	})
	for path, want := range map[string]string{
		"/404":     "invalid response status 404 Not Found",
		"/401":     "invalid response status 401 Unauthorized; give a token with --secret id=HTTP_AUTH_TOKEN_127.0.0.1",
		"/304":     "invalid response status 304",
		"/long":    "it has 1001 bytes, more than the 1000 that are downloaded",
		"/endless": "it has more than the 1000 bytes that are downloaded",
		"/short":   "unexpected EOF",
		"/loop":    "stopped after 10 redirects",
		"/file":    `unsupported protocol scheme "file"`,
		"/mine":    "it redirects to the client's own files",
		"/silent":  "the server sent nothing for 200ms",
		"/stops":   "the server sent nothing for 200ms",
	} {
		if path != "/silent" && path != "/stops" {
			d.opts.Stall = time.Hour
		} else {
			d.opts.Stall = 200 * time.Millisecond
		}
		_, err := d.try(t, s.URL+path, nil)
		check(t, err, "fetch "+s.URL+path)
		check(t, err, want)
	}
	close(gone)
	usage, err := d.cache.DiskUsage(t.Context(), nil, 0)
	must(t, err)
	if len(usage) != 0 {
		t.Errorf("failed downloads left %v", usage)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	left := errors.New("the client left")
	cancel(left)
	i, err := d.Resolve(&pb.SourceOp{Identifier: s.URL + "/f"}, ocispec.Platform{})
	must(t, err)
	if _, _, err := i.CacheKey(ctx, nil, 0); !errors.Is(err, left) {
		t.Errorf("got %v", err)
	}
	s.Close()
	_, err = d.try(t, s.URL+"/f", nil)
	check(t, err, "fetch "+s.URL+"/f")
	check(t, err, "connection refused")
}

// compat: SES-072, LLB-116
func TestUpload(t *testing.T) {
	d := start(t, t.TempDir())
	up := uploadprovider.New()
	id := sessiontest.Connect(t, d.sm, "", up)
	url := up.Add(io.NopCloser(strings.NewReader("uploaded")))
	if f := d.fetch(t, url, map[string]string{pb.AttrHTTPFilename: "context"}, id); f.data != "uploaded" || f.name != "context" {
		t.Errorf("got %v", f)
	}
	_, err := d.try(t, "http://buildkit-session/none", nil, id)
	check(t, err, "fetch http://buildkit-session/none")
	// Without a client nobody else is asked, such as a host of that name.
	_, err = d.try(t, url, nil)
	check(t, err, "no active sessions")
}

func TestMeta(t *testing.T) {
	d := start(t, t.TempDir())
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		w.Header().Set("Last-Modified", modified)
		io.WriteString(w, "data")
	})
	m, err := d.ResolveMeta(t.Context(), MetaRequest{
		Op: &pb.SourceOp{Identifier: s.URL + "/f"}, Checksum: &ChecksumRequest{Algorithm: digest.SHA384, Suffix: []byte("+more")},
	})
	must(t, err)
	if m.Digest != digest.FromString("data") || m.Filename != "f" || !m.LastModified.Equal(time.Unix(1700000000, 0)) || m.Checksum != digest.SHA384.FromString("data+more") {
		t.Errorf("got %+v", m)
	}
	_, err = d.ResolveMeta(t.Context(), MetaRequest{Op: &pb.SourceOp{Identifier: s.URL + "/f"}, Checksum: &ChecksumRequest{Algorithm: digest.SHA384, Suffix: make([]byte, 5000)}})
	check(t, err, "suffix exceeds max size 4096")
}

// Many that want the same at the same time share one download.
func TestAtTheSameTime(t *testing.T) {
	d := start(t, t.TempDir())
	s := serve(t, func(w stdhttp.ResponseWriter, r *stdhttp.Request) {
		w.Header().Set("ETag", `"x"`)
		if r.Header.Get("If-None-Match") != "" {
			w.WriteHeader(stdhttp.StatusNotModified)
			return
		}
		io.WriteString(w, "data")
	})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if f, err := d.try(t, s.URL+"/f", nil); err != nil || f.data != "data" {
				t.Errorf("got %v, %v", f, err)
			}
		})
	}
	all.Wait()
	if _, sent := s.taken(); sent != 4 {
		t.Errorf("%d bytes were sent for a file of 4", sent)
	}
}
