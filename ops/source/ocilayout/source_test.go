package ocilayout

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

func start(t *testing.T) *Source {
	t.Helper()
	c := cachetest.Open(t, t.TempDir())
	sm, err := session.NewManager()
	must(t, err)
	return New(Options{Cache: c.Manager, Sessions: sm})
}

// layout is a client's store.
type layout struct {
	content.Store
	t *testing.T
}

func newLayout(t *testing.T) layout {
	t.Helper()
	s, err := contentlocal.NewStore(t.TempDir())
	must(t, err)
	return layout{s, t}
}

func (l layout) put(_ string, data []byte) {
	l.t.Helper()
	desc := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	must(l.t, content.WriteBlob(context.Background(), l, desc.Digest.String(), bytes.NewReader(data), desc))
}

// connect opens a session that offers stores by name.
func connect(t *testing.T, sm *session.Manager, stores map[string]content.Store) string {
	t.Helper()
	return sessiontest.Connect(t, sm, "", sessioncontent.NewAttachable(stores))
}

// compat: LLB-096, SES-027, SES-073, GW-021
func TestImage(t *testing.T) {
	src, l := start(t), newLayout(t)
	big := strings.Repeat("0123456789abcdef", 100_000)
	raw, desc := registrytest.Make(t, registrytest.Image{
		Platform: amd64, Env: []string{"A=B"}, Put: l.put,
		Layers: []map[string]string{{"one": "1"}, {"two": big}},
	})
	l.put("", raw)
	has := connect(t, src.opts.Sessions, map[string]content.Store{"oci:mine": l})
	lacks := connect(t, src.opts.Sessions, nil)
	ref := "mine@" + desc.Digest.String()

	for name, tt := range map[string]struct {
		attrs map[string]string
		group []string
		files int
	}{
		"named":     {map[string]string{pb.AttrOCILayoutSessionID: has, pb.AttrOCILayoutStoreID: "mine"}, nil, 2},
		"any":       {map[string]string{pb.AttrOCILayoutStoreID: "mine"}, []string{lacks, has}, 2},
		"one layer": {map[string]string{pb.AttrOCILayoutStoreID: "mine", pb.AttrOCILayoutLayerLimit: "1"}, []string{has}, 1},
	} {
		i, err := src.Resolve(&pb.SourceOp{Identifier: "oci-layout://" + ref, Attrs: tt.attrs}, amd64)
		must(t, err)
		g := session.NewGroup(tt.group...)
		key, _, err := i.CacheKey(t.Context(), g, 0)
		must(t, err)
		limit := ""
		if tt.files == 1 {
			limit = `,"Limit":1`
		}
		if want := digest.FromString(fmt.Sprintf(`{"Digest":%q,"OS":"linux","Arch":"amd64"%s}`, desc.Digest, limit)).String(); key != want {
			t.Errorf("%s: key %s, want %s", name, key, want)
		}
		r, err := i.Fetch(t.Context(), g)
		must(t, err)
		view, err := r.Open(t.Context())
		must(t, err)
		entries, err := os.ReadDir(view.Path())
		must(t, err)
		if len(entries) != tt.files {
			t.Errorf("%s: %d files", name, len(entries))
		}
		if got, err := os.ReadFile(filepath.Join(view.Path(), "two")); tt.files == 2 && (err != nil || string(got) != big) {
			t.Errorf("%s: wrong content, %v", name, err)
		}
		view.Close()
		r.Release()
	}

	m, err := src.ResolveMeta(t.Context(), MetaRequest{Ref: ref, StoreID: "mine", Platform: amd64, Group: session.NewGroup(has)})
	must(t, err)
	if m.Digest != desc.Digest || !strings.Contains(string(m.Config), "A=B") {
		t.Errorf("got %s %s", m.Digest, m.Config)
	}
}

func TestRefused(t *testing.T) {
	src, l := start(t), newLayout(t)
	has := connect(t, src.opts.Sessions, map[string]content.Store{"oci:mine": l})
	gone := digest.FromString("gone")
	for ref, want := range map[string]string{
		"mine:tag":       "must have a digest",
		"mine":           "must have a digest",
		"mine@sha256:12": "invalid checksum digest length",
	} {
		_, err := src.Resolve(&pb.SourceOp{Identifier: "oci-layout://" + ref}, amd64)
		check(t, err, want)
	}
	_, err := src.Resolve(&pb.SourceOp{Identifier: "oci-layout://mine@" + gone.String(), Attrs: map[string]string{pb.AttrOCILayoutLayerLimit: "0"}}, amd64)
	check(t, err, "invalid layer limit")

	ask := func(store string, g session.Group) error {
		_, err := src.ResolveMeta(t.Context(), MetaRequest{Ref: "mine@" + gone.String(), StoreID: store, Platform: amd64, Group: g})
		return err
	}
	err = ask("mine", session.NewGroup(has))
	check(t, err, fmt.Sprintf("the client's layout %q has no blob %s", "mine", gone))
	if !errdefs.IsNotFound(err) {
		t.Errorf("%v isn't a not-found error", err)
	}
	check(t, ask("other", session.NewGroup(has)), "other")
	check(t, ask("mine", nil), "no client session")
}

// compat: LLB-097
func TestBlob(t *testing.T) {
	src, l := start(t), newLayout(t)
	l.put("", []byte("content"))
	dgst := digest.FromString("content")
	id := connect(t, src.opts.Sessions, map[string]content.Store{"oci:mine": l})
	op := &pb.SourceOp{Identifier: "oci-layout+blob://mine@" + dgst.String(), Attrs: map[string]string{pb.AttrOCILayoutStoreID: "mine"}}
	i, err := src.Resolve(op, amd64)
	must(t, err)
	r, err := i.Fetch(t.Context(), session.NewGroup(id))
	must(t, err)
	defer r.Release()
	view, err := r.Open(t.Context())
	must(t, err)
	defer view.Close()
	f, err := os.Open(filepath.Join(view.Path(), dgst.Encoded()))
	must(t, err)
	defer f.Close()
	if got, err := io.ReadAll(f); err != nil || string(got) != "content" {
		t.Errorf("got %q, %v", got, err)
	}
	op.Attrs = nil
	_, err = src.Resolve(op, amd64)
	check(t, err, pb.AttrOCILayoutStoreID)
}
