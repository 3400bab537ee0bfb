package git

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/ops"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
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
	return &daemon{cache: c.Manager, close: c.Shut, sm: sm, root: root, Source: New(Options{Cache: c.Manager, Sessions: sm, Stall: time.Minute})}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// attrs are name, value, name, value.
func attrs(pairs ...string) map[string]string {
	out := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

// op is a source of url#fragment.
func op(url, fragment string, more map[string]string) *pb.SourceOp {
	_, name, ok := strings.Cut(url, "://")
	if !ok {
		name = url
	}
	if i := strings.Index(name, "@"); i >= 0 {
		name = name[i+1:]
	}
	o := &pb.SourceOp{Identifier: "git://" + name, Attrs: map[string]string{pb.AttrFullRemoteURL: url}}
	if fragment != "" {
		o.Identifier += "#" + fragment
	}
	for k, v := range more {
		o.Attrs[k] = v
	}
	return o
}

func (d *daemon) resolve(t testing.TB, o *pb.SourceOp) ops.SourceInstance {
	t.Helper()
	i, err := d.Resolve(o, ocispec.Platform{})
	must(t, err)
	return i
}

// fetch gives the key and the files, by path, of a source.
func (d *daemon) fetch(t testing.TB, o *pb.SourceOp, sessions ...string) (string, map[string]string) {
	t.Helper()
	key, files, err := d.try(t, o, sessions...)
	must(t, err)
	return key, files
}

func (d *daemon) try(t testing.TB, o *pb.SourceOp, sessions ...string) (string, map[string]string, error) {
	t.Helper()
	i, err := d.Resolve(o, ocispec.Platform{})
	if err != nil {
		return "", nil, err
	}
	g := session.NewGroup(sessions...)
	key, _, err := i.CacheKey(t.Context(), g, 0)
	if err != nil {
		return "", nil, err
	}
	ref, err := i.Fetch(t.Context(), g)
	if err != nil {
		return "", nil, err
	}
	defer ref.Release()
	return key, list(t, ref), nil
}

// list gives contents by path; those of links start with ->.
func list(t testing.TB, ref *cache.Ref) map[string]string {
	t.Helper()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	out := map[string]string{}
	root := view.Path() + "/"
	must(t, filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		name := strings.TrimPrefix(p, root)
		if e.Type() == fs.ModeSymlink {
			to, err := os.Readlink(p)
			out[name] = "->" + to
			return err
		}
		data, err := os.ReadFile(p)
		out[name] = string(data)
		return err
	}))
	return out
}

func check(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

// TestMain takes away proxies, which servers on this machine aren't behind.
func TestMain(m *testing.M) {
	for _, name := range []string{"http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"} {
		if err := os.Unsetenv(name); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}
