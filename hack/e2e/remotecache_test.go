//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// cached is a project of three stages, two of which leave little in the result.
const cached = `FROM BASE AS a
RUN echo one > /one
COPY src /src
RUN cat /src/* > /all
FROM BASE AS b
RUN echo b > /b
FROM scratch
COPY --from=a /all /all
COPY --from=b /b /b
`

var cachedFiles = files{"src/x": "x", "src/y": "y"}

var (
	stepBegins = regexp.MustCompile(`(?m)^#(\d+) \[(.*(?:RUN|COPY) .*)$`)
	stepEnds   = regexp.MustCompile(`(?m)^#(\d+) DONE `)
)

// executed are the RUN and COPY steps that ran, as the client shows them.
func executed(r result) (out []string) {
	ended := map[string]bool{}
	for _, m := range stepEnds.FindAllStringSubmatch(r.stderr, -1) {
		ended[m[1]] = true // also what was in the cache first, and then turned out lost
	}
	for _, m := range stepBegins.FindAllStringSubmatch(r.stderr, -1) {
		if name := "[" + m[2]; ended[m[1]] && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// makes builds the project to a directory; it fails the test if the files are
// wrong.
func (d *daemon) makes(dockerfile string, ctx files, args ...string) result {
	d.t.Helper()
	out := d.t.TempDir()
	r := d.dockerfile(dockerfile, ctx, append(args, "--output", "type=local,dest="+out)...).must(d.t)
	if got := readFile(d.t, out, "all") + readFile(d.t, out, "b"); got != ctx["src/x"]+ctx["src/y"]+"b\n" {
		d.t.Errorf("the result is %q", got)
	}
	return r
}

func (d *daemon) ran(r result, want ...string) {
	d.t.Helper()
	if got := executed(r); !slices.Equal(got, want) {
		d.t.Errorf("executed %q, want %q\n%s", got, want, r.stderr)
	}
}

// manifestOf is the manifest or index of a cache in the registry.
func manifestOf(t *testing.T, name, tag string) (doc struct {
	MediaType string
	Config    *ocispec.Descriptor
	Layers    []ocispec.Descriptor
	Manifests []ocispec.Descriptor
}) {
	t.Helper()
	resp, err := env.reg.Get(name+"/manifests/"+tag, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v", resp.Status, err)
	}
	return doc
}

// What one daemon keeps in a registry, another finds, layer by layer when it is
// needed. compat: EXP-071, EXP-072, EXP-079, EXP-081, CTL-049, LLB-176, X-1
func TestCacheInRegistry(t *testing.T) {
	all := []string{"[a 2/4] RUN echo one > /one", "[a 3/4] COPY src /src", "[a 4/4] RUN cat /src/* > /all", "[b 2/2] RUN echo b > /b", "[stage-2 1/2] COPY --from=a /all /all", "[stage-2 2/2] COPY --from=b /b /b"}
	d := newDaemon(t)
	ref := env.registry + "/cache/max:1"
	d.ran(d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,ref="+ref), all...)

	watched := watch(t, env.reg)
	fresh := newDaemon(t)
	from := "type=registry,ref=" + watched.Host + "/cache/max:1"
	r := fresh.makes(cached, cachedFiles, "--import-cache", from)
	fresh.ran(r)
	if !strings.Contains(r.stderr, "importing cache manifest from registry "+watched.Host) {
		t.Errorf("nothing shows that a cache is imported:\n%s", r.stderr)
	}
	// The request and the frontend both name it.
	if n := watched.asked("HEAD /v2/cache/max/manifests/1"); n != 1 {
		t.Errorf("the cache was asked for %d times", n)
	}
	doc := manifestOf(t, "cache/max", "1")
	if doc.Config == nil || doc.Config.MediaType != "application/vnd.buildkit.cacheconfig.v0" || len(doc.Layers) < 5 { // a copied file may make the same layer as the file's own
		t.Errorf("the cache has %d layers: %+v", len(doc.Layers), doc)
	}
	// The result has two layers, and the config is a blob; nothing else is needed.
	if n := watched.asked("GET /v2/cache/max/blobs/"); n != 3 {
		t.Errorf("%d blobs were fetched: %q", n, watched.paths)
	}
	// What was used is the daemon's own; the rest is found again.
	fresh.ran(fresh.makes(cached, cachedFiles))
	changed := strings.Replace(cached, "echo b >", "printf 'b\\n' >", 1)
	fresh.ran(fresh.makes(changed, cachedFiles, "--import-cache", from), "[b 2/2] RUN printf 'b\\n' > /b")
	// The second export, of what is all from the cache, has as much in it.
	d.ran(d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,ref="+env.registry+"/cache/again:1"))
	other := newDaemon(t)
	edited := strings.Replace(cached, "echo one >", "echo  one >", 1) // the command is another, what it makes is not
	other.ran(other.makes(edited, cachedFiles, "--import-cache", "type=registry,ref="+env.registry+"/cache/again:1"),
		"[a 2/4] RUN echo  one > /one", "[a 3/4] COPY src /src", "[a 4/4] RUN cat /src/* > /all")

	t.Run("Min", func(t *testing.T) {
		ref := env.registry + "/cache/min:1"
		d.makes(cached, cachedFiles, "--export-cache", "type=registry,ref="+ref)
		if doc := manifestOf(t, "cache/min", "1"); len(doc.Layers) != 2 {
			t.Errorf("the cache has the layers %v", doc.Layers)
		}
		fresh := newDaemon(t)
		fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", "type=registry,ref="+ref))
		// What the result isn't made of isn't there.
		fresh = newDaemon(t)
		fresh.ran(fresh.makes(changed, cachedFiles, "--import-cache", "type=registry,ref="+ref), "[b 2/2] RUN printf 'b\\n' > /b")
	})
	t.Run("Index", func(t *testing.T) {
		for oci, mediaType := range map[string]string{"true": ocispec.MediaTypeImageIndex, "false": "application/vnd.docker.distribution.manifest.list.v2+json"} {
			ref := env.registry + "/cache/index:" + oci
			d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,image-manifest=false,oci-mediatypes="+oci+",ref="+ref)
			if doc := manifestOf(t, "cache/index", oci); doc.MediaType != mediaType || len(doc.Manifests) < 6 {
				t.Errorf("oci-mediatypes=%s: %d blobs, %+v", oci, len(doc.Manifests), doc)
			}
			fresh := newDaemon(t)
			fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", "type=registry,ref="+ref))
		}
	})
	t.Run("Compression", func(t *testing.T) {
		ref := env.registry + "/cache/zstd:1"
		d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,compression=zstd,compression-level=3,force-compression=true,ref="+ref)
		for _, l := range manifestOf(t, "cache/zstd", "1").Layers {
			if l.MediaType != ocispec.MediaTypeImageLayerZstd {
				t.Errorf("a layer is %s", l.MediaType)
			}
		}
		fresh := newDaemon(t)
		fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", "type=registry,ref="+ref))
	})
}

// compat: EXP-073, EXP-074, EXP-081
func TestCacheInDirectory(t *testing.T) {
	d := newDaemon(t)
	dir := filepath.Join(t.TempDir(), "cache")
	d.makes(cached, cachedFiles, "--export-cache", "type=local,mode=max,dest="+dir)
	d.makes(cached, cachedFiles, "--export-cache", "type=local,tag=two,dest="+dir)
	for _, args := range []string{"type=local,src=" + dir, "type=local,tag=two,src=" + dir} {
		fresh := newDaemon(t)
		fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", args))
	}
	// A layer that is gone costs the step that made it.
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil || len(blobs) < 10 {
		t.Fatalf("%d blobs, %v", len(blobs), err)
	}
	for _, b := range blobs {
		if !json.Valid([]byte(readFile(t, b))) {
			if err := os.Remove(b); err != nil {
				t.Fatal(err)
			}
		}
	}
	fresh := newDaemon(t)
	if r := fresh.makes(cached, cachedFiles, "--import-cache", "type=local,src="+dir); len(executed(r)) == 0 {
		t.Errorf("nothing ran, though nothing is there:\n%s", r.stderr)
	}
}

// compat: EXP-070, EXP-051
func TestCacheInImage(t *testing.T) {
	d := newDaemon(t)
	const dockerfile = "FROM BASE\nRUN echo one > /one\nCOPY src /src\nRUN cat /src/* > /all && echo b > /b\n"
	ref := env.registry + "/cache/inline:1"
	push := func(d *daemon, args ...string) result {
		return d.dockerfile(dockerfile, cachedFiles, append(args, "--output", "type=image,push=true,name="+ref)...).must(t)
	}
	push(d, "--export-cache", "type=inline")
	fresh := newDaemon(t)
	fresh.ran(fresh.makes(dockerfile, cachedFiles, "--import-cache", "type=registry,ref="+ref))
	fresh = newDaemon(t)
	fresh.ran(fresh.makes(strings.Replace(dockerfile, "cat", "cat -u", 1), cachedFiles, "--import-cache", "type=registry,ref="+ref), "[4/4] RUN cat -u /src/* > /all && echo b > /b")
	// An image without a cache is no cache, and says so.
	push(d)
	fresh = newDaemon(t)
	if r := fresh.makes(dockerfile, cachedFiles, "--import-cache", "type=registry,ref="+ref); !strings.Contains(r.stderr, "it holds no build cache") || len(executed(r)) != 3 {
		t.Errorf("executed %q:\n%s", executed(r), r.stderr)
	}
}

// An import that is of no use costs nothing but its steps, and is named by who
// explains them. compat: EXP-082, GW-030
func TestCacheThatIsOfNoUse(t *testing.T) {
	d := newDaemon(t)
	ref := env.registry + "/cache/some:1"
	d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,ref="+ref)
	for name, imported := range map[string]string{
		"connection refused":         "type=registry,ref=" + harness.Nobody + "/no:such",
		"not found":                  "type=registry,ref=" + env.registry + "/no/such:cache",
		"no cache import of type s3": "type=s3,bucket=b,region=r,name=n",
		`import of type "floppy"`:    "type=floppy,src=/dev/fd0",
	} {
		t.Run(name, func(t *testing.T) {
			fresh := newDaemon(t)
			if r := fresh.makes(cached, cachedFiles, "--import-cache", imported); len(executed(r)) != 6 || !strings.Contains(r.stderr, name) {
				t.Errorf("executed %q:\n%s", executed(r), r.stderr)
			}
			if out := fresh.kiln("explain").must(t).stdout; !strings.Contains(out, "the imported cache") || !strings.Contains(out, "could not be used") || !strings.Contains(out, name) {
				t.Errorf("explain says\n%s", out)
			}
			// Beside one that is, it changes nothing.
			fresh.buildctl("prune", "--all").must(t)
			fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", imported, "--import-cache", "type=registry,ref="+ref))
		})
	}
}

// liar passes requests on to a registry and, once it lies, gives other blobs than
// those that are asked for.
type liar struct {
	Host string
	mu   sync.Mutex // guards lie
	lie  func(w http.ResponseWriter, data []byte)
}

func newLiar(t *testing.T) *liar {
	l := &liar{}
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: env.registry})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		l.mu.Lock()
		lie := l.lie
		l.mu.Unlock()
		if lie == nil || req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
			to.ServeHTTP(w, req)
			return
		}
		resp, err := env.reg.Get(strings.TrimPrefix(req.URL.Path, "/v2/")) // though the client may have gone
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
			return
		}
		if json.Valid(data) { // a config
			w.Write(data)
			return
		}
		lie(w, data)
	}))
	t.Cleanup(srv.Close)
	l.Host = srv.Listener.Addr().String()
	return l
}

// A layer that isn't what it should be costs the steps that made it.
// compat: LLB-173
func TestCacheThatLies(t *testing.T) {
	d := newDaemon(t)
	d.makes(cached, cachedFiles, "--export-cache", "type=registry,mode=max,ref="+env.registry+"/cache/lie:1")
	for name, lie := range map[string]func(w http.ResponseWriter, data []byte){
		"BitFlipped": func(w http.ResponseWriter, data []byte) {
			data[len(data)/2] ^= 1
			w.Write(data)
		},
		"CutShort": func(w http.ResponseWriter, data []byte) { w.Write(data[:len(data)/2]) },
		"Gone":     func(w http.ResponseWriter, _ []byte) { w.WriteHeader(http.StatusNotFound) },
		"Garbage": func(w http.ResponseWriter, _ []byte) {
			io.WriteString(w, "<html>welcome to this hotel's network</html>")
		},
		"Dropped": func(http.ResponseWriter, []byte) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLiar(t)
			l.mu.Lock()
			l.lie = lie
			l.mu.Unlock()
			fresh := newDaemon(t)
			r := fresh.makes(cached, cachedFiles, "--import-cache", "type=registry,ref="+l.Host+"/cache/lie:1")
			if len(executed(r)) == 0 {
				t.Errorf("nothing ran:\n%s", r.stderr)
			}
			if out := fresh.kiln("explain").must(t).stdout; !strings.Contains(out, "its cached result could not be used: ") || !strings.Contains(out, "the imported cache registry "+l.Host) {
				t.Errorf("explain says\n%s", out)
			}
			fresh.ran(fresh.makes(cached, cachedFiles))
		})
	}
}

// compat: EXP-080
func TestCacheExportErrors(t *testing.T) {
	d := newDaemon(t)
	build := func(export ...string) result {
		var args []string
		for _, e := range export {
			args = append(args, "--export-cache", e)
		}
		return d.dockerfile(cached, cachedFiles, args...)
	}
	build("type=registry,ref="+harness.Nobody+"/x:1").fails(t, harness.Nobody, "connection refused")
	build("type=registry,ignore-error=true,ref=" + harness.Nobody + "/x:1").must(t)
	build("type=s3,bucket=b,region=r").fails(t, "no cache export of type s3", "registry, local and inline")
	build("type=floppy").fails(t, `no cache export of type "floppy"`)
	build("type=registry,mode=most,ref="+env.registry+"/x:1").fails(t, `"most" is neither min nor max`)
	build("type=registry,compression=lzma,ref="+env.registry+"/x:1").fails(t, "lzma")
	build("type=registry,oci-mediatypes=perhaps,ref="+env.registry+"/x:1").fails(t, "perhaps")
	build("type=registry,ref=UPPER CASE").fails(t, "UPPER CASE")
	build("type=registry,ref="+env.registry+"/x:1", "type=registry,mode=max,ref="+env.registry+"/x:1").fails(t, "twice")
	if r := d.dockerfile("FROM BASE\n", nil, "--export-cache", "type=registry,ref="+env.registry+"/cache/empty:1").must(t); !strings.Contains(r.stderr, "skipping cache export for empty result") {
		t.Errorf("an empty cache:\n%s", r.stderr)
	}
}

// Caches go both ways between kiln and upstream's buildkitd: what either keeps,
// the other takes, and finds everything in it.
// compat: X-8
func TestCacheFromAndToUpstream(t *testing.T) {
	peer := peerDaemon(t)
	dir := files{"Dockerfile": strings.ReplaceAll(cached, "BASE", env.base), "src/x": "x", "src/y": "y"}.write(t)
	build := func(addr string, args ...string) result {
		t.Helper()
		out := t.TempDir()
		r := runCommand(t, exec.Command(filepath.Join(env.peer, "buildctl"), append([]string{"--addr", addr, "build", "--progress=plain", "--frontend", "dockerfile.v0",
			"--local", "context=" + dir, "--local", "dockerfile=" + dir, "--output", "type=local,dest=" + out}, args...)...)).must(t)
		if got := readFile(t, out, "all"); got != "xy" {
			t.Errorf("the result is %q", got)
		}
		if strings.Contains(r.stderr, "ERROR") || strings.Contains(r.stderr, "WARN") {
			t.Errorf("something went wrong:\n%s", r.stderr)
		}
		return r
	}
	ref := func(who string) string { return fmt.Sprintf("%s/cache/of-%s:1", env.registry, who) }
	d := newDaemon(t)
	build(d.addr, "--export-cache", "type=registry,mode=max,ref="+ref("kiln"))
	build(d.addr, "--export-cache", "type=registry,image-manifest=false,ref="+ref("kiln-index"))
	for _, name := range []string{"kiln", "kiln-index"} {
		runCommand(t, exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", peer, "prune", "--all")).must(t)
		// It shows a result that it unpacks as a step that ran, so only those count
		// that would have to run first.
		if r := build(peer, "--import-cache", "type=registry,ref="+ref(name)); slices.ContainsFunc(executed(r), func(step string) bool { return strings.Contains(step, "RUN") }) {
			t.Errorf("upstream executed %q:\n%s", executed(r), r.stderr)
		}
	}
	runCommand(t, exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", peer, "prune", "--all")).must(t)
	build(peer, "--export-cache", "type=registry,mode=max,ref="+ref("upstream"))
	build(peer, "--export-cache", "type=registry,image-manifest=false,ref="+ref("upstream-index"))
	for _, name := range []string{"upstream", "upstream-index"} {
		fresh := newDaemon(t)
		fresh.ran(build(fresh.addr, "--import-cache", "type=registry,ref="+ref(name)))
	}
}

// Each build reads and writes caches with its own credentials, also what another
// build has found there before. compat: EXP-083
func TestCacheCredentials(t *testing.T) {
	reg := startRegistry(t, harness.Options{User: "ann", Password: "of-the-cache"})
	from := "type=registry,ref=" + reg.Host + "/private/cache:1"
	d := newDaemon(t)
	d.dockerfile(cached, cachedFiles, "--export-cache", from+",mode=max").fails(t, reg.Host, "credentials")
	d.login(reg.Host, "ann", "of-the-cache")
	d.makes(cached, cachedFiles, "--export-cache", from+",mode=max")

	fresh := newDaemon(t)
	fresh.login(reg.Host, "ann", "of-the-cache")
	fresh.ran(fresh.dockerfile(cached, cachedFiles, "--import-cache", from).must(t)) // fetches no layer
	if err := os.RemoveAll(fresh.dockerConfig()); err != nil {
		t.Fatal(err)
	}
	r := fresh.makes(cached, cachedFiles, "--import-cache", from)
	if len(executed(r)) == 0 || !strings.Contains(r.stderr, "credentials") {
		t.Errorf("somebody without credentials got the layers:\n%s", r.stderr)
	}
	fresh.buildctl("prune", "--all").must(t)
	fresh.login(reg.Host, "ann", "of-the-cache")
	fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", from))
}

// kiln's own client knows the same, and its directories are upstream's.
// compat: BCL-029
func TestCacheWithOwnClient(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "cache")
	project := files{"Dockerfile": strings.ReplaceAll(cached, "BASE", env.base), "src/x": "x", "src/y": "y"}.write(t)
	build := func(d *daemon, args ...string) result {
		t.Helper()
		return d.kiln(append(append([]string{"build", "--progress", "plain"}, args...), project)...).must(t)
	}
	d := newDaemon(t)
	build(d, "--import-cache", "type=local,src="+dir, "--export-cache", "type=local,mode=max,dest="+dir)
	build(d, "--export-cache", "type=registry,mode=max,ref="+env.registry+"/cache/own:1")
	for _, from := range []string{"type=local,src=" + dir, env.registry + "/cache/own:1"} {
		fresh := newDaemon(t)
		fresh.ran(build(fresh, "--import-cache", from))
	}
	fresh := newDaemon(t)
	fresh.ran(fresh.makes(cached, cachedFiles, "--import-cache", "type=local,src="+dir))
	for _, bad := range []string{"type=local,dest", "ref=x"} {
		d.kiln("build", "--export-cache", bad, project).fails(t, "export-cache", bad)
	}
}
