package ops

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// compat: LLB-150, LLB-021
// What a key must not depend on, and what it must.
func TestExecKeyIgnores(t *testing.T) {
	cacheAt := func(id string, sharing pb.CacheSharingOpt) func(e *pb.ExecOp) {
		return func(e *pb.ExecOp) {
			e.Mounts = append(e.Mounts, &pb.Mount{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: id, Sharing: sharing}})
		}
	}
	host := func(name, ip string) func(e *pb.ExecOp) {
		return func(e *pb.ExecOp) { e.Meta.ExtraHosts = []*pb.HostIP{{Host: name, IP: ip}} }
	}
	for _, c := range []struct {
		name string
		a, b func(e *pb.ExecOp)
		same bool
	}{
		{"proxies", func(*pb.ExecOp) {}, func(e *pb.ExecOp) { e.Meta.ProxyEnv = &pb.ProxyEnv{HttpProxy: "p"} }, true},
		{"address of an extra host", host("h", "10.0.0.1"), host("h", "10.0.0.2"), true},
		{"name of an extra host", host("h", "10.0.0.1"), host("i", "10.0.0.1"), false},
		{"id of a cache mount", cacheAt("a", pb.CacheSharingOpt_SHARED), cacheAt("b", pb.CacheSharingOpt_SHARED), true},
		{"sharing of a cache mount", cacheAt("a", pb.CacheSharingOpt_SHARED), cacheAt("a", pb.CacheSharingOpt_LOCKED), true},
		{"environment", func(*pb.ExecOp) {}, func(e *pb.ExecOp) { e.Meta.Env = []string{"A=1"} }, false},
		{"network", func(*pb.ExecOp) {}, func(e *pb.ExecOp) { e.Network = pb.NetMode_NONE }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := execOf(&pb.ExecOp{}), execOf(&pb.ExecOp{})
			c.a(a.GetExec())
			c.b(b.GetExec())
			ka, kb := cacheMapOf(t, onSource(t, a)), cacheMapOf(t, onSource(t, b))
			if same := ka.Digest == kb.Digest; same != c.same {
				t.Errorf("same key: %v, want %v", same, c.same)
			}
		})
	}
}

func TestExecKeyLeavesTheOpAlone(t *testing.T) {
	op := execOf(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, ProxyEnv: &pb.ProxyEnv{HttpProxy: "p"}}})
	before := op.CloneVT()
	edge, err := newTestLoader(t, Config{}).Load(onSource(t, op), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := edge.Vertex.Op.CacheMap(context.Background(), asker{}, 0); err != nil {
		t.Fatal(err)
	}
	if got := edge.Vertex.Op.(*execOp).op; !got.EqualVT(before.GetExec()) {
		t.Errorf("making the key changed the op to %v", got)
	}
}

// One mount that the step can write through makes its input unfit for content
// keys, wherever it stands.
func TestUnsafeMountForbidsContent(t *testing.T) {
	ro := &pb.Mount{Input: 0, Dest: "/ro", Output: -1, Readonly: true}
	rw := &pb.Mount{Input: 0, Dest: "/rw", Output: 1, Selector: "sub"}
	root := &pb.Mount{Input: -1, Dest: "/", Output: 0}
	for _, mounts := range [][]*pb.Mount{{root, ro, rw}, {root, rw, ro}} {
		if deps := mountDeps(&pb.ExecOp{Mounts: mounts}, 1); !deps[0].noContent {
			t.Errorf("mounts %v allow a content key", mounts)
		}
	}
	if deps := mountDeps(&pb.ExecOp{Mounts: []*pb.Mount{root, ro}}, 1); deps[0].noContent {
		t.Error("a read-only mount forbids a content key")
	}
}

// The content digest is that of the digests of what is mounted, in the order
// of the paths, each path once.
//
// compat: LLB-151
func TestExecContent(t *testing.T) {
	b := newExecBench(t, nil)
	ref := b.ref(nil, fileSet{"a/x": "1", "b": "2", "c": "3"})
	sum := func(path string, follow bool) string {
		d, err := contenthash.Checksum(context.Background(), ref, path, contenthash.Options{FollowLinks: follow})
		if err != nil {
			t.Fatal(err)
		}
		return string(d)
	}
	for _, c := range []struct {
		name      string
		selectors []string
		want      []string
	}{
		{"whole", []string{""}, []string{sum("/", false)}},
		{"part", []string{"a"}, []string{sum("/a", true)}},
		{"parts", []string{"/b", "a", "b"}, []string{sum("/a", true), sum("/b", true)}},
		{"part and whole", []string{"/b", "/"}, []string{sum("/", false)}},
		{"part of a part", []string{"/a/x", "/a"}, []string{sum("/a", true)}},
	} {
		op := execOf(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}})
		for i, sel := range c.selectors {
			op.GetExec().Mounts = append(op.GetExec().Mounts, &pb.Mount{Dest: fmt.Sprint("/m", i), Output: -1, Readonly: true, Selector: sel})
		}
		got, err := cacheMapOf(t, onSource(t, op)).Deps[0].Content(context.Background(), asker{}, Result{ref})
		if err != nil {
			t.Fatal(err)
		}
		if want := digest.FromString(strings.Join(c.want, "\x00")); got != want {
			t.Errorf("%s: digest is %s, want %s", c.name, got, want)
		}
	}
	op := execOf(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}, {Dest: "/m", Output: -1, Readonly: true, Selector: "missing"}}})
	_, err := cacheMapOf(t, onSource(t, op)).Deps[0].Content(context.Background(), asker{}, Result{ref})
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a part that isn't there: %v", err)
	}
}

// Content and Prepare report a lost input as such.
func TestLostContent(t *testing.T) {
	b := newExecBench(t, nil)
	ref := b.ref(nil, fileSet{"gone": "1"})
	b.removeFiles("gone")
	dep := cacheMapOf(t, onSource(t, execOf(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}, {Dest: "/m", Output: -1, Readonly: true}}}))).Deps[0]
	var lost *solver.LostError
	if _, err := dep.Content(context.Background(), asker{}, Result{ref}); !errors.As(err, &lost) || !slices.Equal(lost.Inputs, []int{0}) {
		t.Errorf("content of a lost input: %v", err)
	}
}

func TestOutermost(t *testing.T) {
	for _, c := range []struct{ in, want []string }{
		{[]string{"/a"}, []string{"/a"}},
		{[]string{"/b", "/a", "/b"}, []string{"/a", "/b"}},
		{[]string{"/a/b", "/a", "/ab"}, []string{"/a", "/ab"}},
		{[]string{"/a", "/"}, []string{"/"}},
	} {
		if got := outermost(c.in); !slices.Equal(got, c.want) {
			t.Errorf("outermost(%q) = %q, want %q", c.in, got, c.want)
		}
	}
}

// The digests are upstream's for these keys; see goldenCases.
//
// compat: LLB-158
func TestSourceKeys(t *testing.T) {
	keys := []string{"sha256:abc", "session:xyz:abc"}
	src := &fakeSource{key: func(i int) (string, bool, error) { return keys[i], i+1 < len(keys), nil }}
	edge, err := newTestLoader(t, Config{Sources: []Source{src}}).Load(single(t, sourceOf("test://x")), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{
		"sha256:1c7a753980af062a9eb2370b18f773d79ddeb316d688aec386f9b6f04fbffbb9",
		"random:51363bb0b65b5027732d169223ee5272befe27167cb594c587128d8daff725df",
	} {
		m, more, err := edge.Vertex.Op.CacheMap(context.Background(), asker{}, i)
		if err != nil {
			t.Fatal(err)
		}
		if string(m.Digest) != want || more != (i == 0) || m.Transient != (i == 1) {
			t.Errorf("key %d is %s, transient %v, more %v; want %s", i, m.Digest, m.Transient, more, want)
		}
	}
}

// sharedSource is fetched by any client for any other that is of the same kind.
type sharedSource struct{ SourceInstance }

func (sharedSource) SharingKey(_ context.Context, g session.Group) (string, error) {
	return session.AllSessionIDs(g)[0][:1], nil
}

// A fetch reads what the client has, or with its credentials: unless the source
// can tell that another's would be the same, it is shared within the same
// sessions only.
func TestSourceSharing(t *testing.T) {
	builds := map[string]asker{
		"a1": {&Build{SessionIDs: []string{"a1"}}}, "a2": {&Build{SessionIDs: []string{"a2"}}}, "b1": {&Build{SessionIDs: []string{"b1"}}},
		"a1 again": {&Build{SessionIDs: []string{"a1"}}}, "a1 and a2": {&Build{SessionIDs: []string{"a2", "a1"}}},
	}
	src := &fakeSource{}
	instance, err := src.Resolve(sourceOf("test://x").GetSource(), amd64)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		source SourceInstance
		a, b   string
		share  bool
	}{
		{instance, "a1", "a1 again", true},
		{instance, "a1", "a2", false},
		{instance, "a1", "a1 and a2", false},
		{sharedSource{instance}, "a1", "a2", true},
		{sharedSource{instance}, "a1", "b1", false},
	} {
		s := &sourceOp{instance: tt.source}
		a, err := s.SharingKey(t.Context(), builds[tt.a])
		if err != nil {
			t.Fatal(err)
		}
		b, err := s.SharingKey(t.Context(), builds[tt.b])
		if err != nil {
			t.Fatal(err)
		}
		if (a == b) != tt.share {
			t.Errorf("%T: %s and %s share: %v", tt.source, tt.a, tt.b, a == b)
		}
	}
}

func TestSourceExec(t *testing.T) {
	boom := errors.New("boom")
	src := &fakeSource{fetch: func(context.Context) (*cache.Ref, error) { return nil, nil }}
	edge, err := newTestLoader(t, Config{Cache: cachetest.Open(t, t.TempDir()).Manager, Sources: []Source{src}}).Load(single(t, sourceOf("test://x")), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	who := asker{&Build{SessionIDs: []string{"a", "b"}}, &Build{SessionIDs: []string{"c"}}}
	out, err := edge.Vertex.Op.Exec(context.Background(), who, nil)
	if err != nil || len(out) != 1 || out[0].ID() != scratchID {
		t.Errorf("an empty source gives %v, %v", out, err)
	}
	if got := src.groups[0]; !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("Fetch was given sessions %q", got)
	}
	src.fetch = func(context.Context) (*cache.Ref, error) { return nil, boom }
	if _, err := edge.Vertex.Op.Exec(context.Background(), who, nil); !errors.Is(err, boom) {
		t.Errorf("error is %v, want %v", err, boom)
	}
}

// compat: LLB-083, LLB-014, LLB-C81
func TestPassthrough(t *testing.T) {
	p := &passthroughOp{op: &pb.PassthroughOp{Id: "p", Outputs: []int64{1, 0, 1}}}
	x := newExecBench(t, nil).ref(nil, fileSet{"x": ""})
	out, err := p.Exec(context.Background(), asker{}, results(nil, x))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, r := range out {
		ids = append(ids, r.ID())
		r.Release()
	}
	if want := []string{x.ID(), scratchID, x.ID()}; !slices.Equal(ids, want) {
		t.Errorf("outputs are %q, want %q", ids, want)
	}
}
