package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	fstypes "github.com/tonistiigi/fsutil/types"
)

func solveText(t *testing.T, bridge frontend.Bridge, opts map[string]string) (*frontend.Result, error) {
	t.Helper()
	return Frontend{}.Solve(t.Context(), bridge, frontend.Request{SessionID: "session", Opts: opts})
}

// compat: GW-085
func TestUnknownSubrequest(t *testing.T) {
	bridge := newBridge(t, map[string]string{"Dockerfile": "FROM busybox\n"})
	_, err := solveText(t, bridge, map[string]string{"requestid": "frontend.nope"})
	var unsupported *errdefs.UnsupportedSubrequestError
	if !errors.As(err, &unsupported) || unsupported.Name != "frontend.nope" {
		t.Errorf("got %v", err)
	}
}

// compat: DF-011
func TestErrorsCarryTheDockerfile(t *testing.T) {
	text := "FROM busybox\nRUN x\nCOPY --chmod=9 a b\n"
	_, err := solveText(t, newBridge(t, map[string]string{"Dockerfile": text}), nil)
	sources := errdefs.Sources(err)
	if len(sources) != 1 {
		t.Fatalf("%d sources in %v", len(sources), err)
	}
	info := sources[0].Info
	if info.Filename != "Dockerfile" || info.Language != "Dockerfile" || string(info.Data) != text || len(info.Definition.GetDef()) == 0 {
		t.Errorf("source %v", info)
	}
	if got := showRanges(sources[0].Ranges); got != "3-3" {
		t.Errorf("lines %s", got)
	}
}

// A policy that keeps replacing a context is stopped.
//
// compat: DF-127
func TestContextRedirects(t *testing.T) {
	bridge := &policyBridge{fakeBridge: newBridge(t, map[string]string{"Dockerfile": "FROM base\nRUN x\n"})}
	bridge.replace = func(ref string) string {
		if ref == "docker-image://docker.io/library/one:latest" {
			return "https://example.com/two"
		}
		return ref
	}
	res, err := solveText(t, bridge, map[string]string{"context:base": "docker-image://one"})
	if err != nil {
		t.Fatal(err)
	}
	if src := firstSource(t, res.Ref.Definition()); src != "https://example.com/two" {
		t.Errorf("base is %s", src)
	}

	bridge.replace = func(ref string) string { return "redirect://again" }
	_, err = solveText(t, bridge, map[string]string{"context:base": "docker-image://one"})
	if err == nil || !strings.Contains(err.Error(), "unsupported context source redirect") {
		t.Errorf("got %v", err)
	}
	_, err = solveText(t, bridge, nil)
	if err == nil || !strings.Contains(err.Error(), "is no image") {
		t.Errorf("got %v", err)
	}
	circle := &namedContext{b: &build{cfg: &config{opts: map[string]string{}}}, key: "base", input: "docker-image://one"}
	circle.b.metas.bridge = circleBridge{bridge}
	if _, _, err := circle.load(t.Context()); err == nil || !strings.Contains(err.Error(), "form a circle") {
		t.Errorf("got %v", err)
	}
}

func firstSource(t *testing.T, def *pb.Definition) string {
	t.Helper()
	var op pb.Op
	if err := op.UnmarshalVT(def.Def[0]); err != nil {
		t.Fatal(err)
	}
	return op.GetSource().GetIdentifier()
}

// policyBridge replaces sources.
type policyBridge struct {
	*fakeBridge
	replace func(string) string
}

func (b *policyBridge) ResolveSourceMeta(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	meta, err := b.fakeBridge.ResolveSourceMeta(ctx, op, opt)
	if err == nil {
		meta.Op = &pb.SourceOp{Identifier: b.replace(op.Identifier)}
	}
	return meta, err
}

// circleBridge answers as if the image were elsewhere, always as a context
// that must be looked up again.
type circleBridge struct{ frontend.Bridge }

func (circleBridge) ResolveSourceMeta(_ context.Context, op *pb.SourceOp, _ frontend.MetaOptions) (*frontend.SourceMeta, error) {
	return &frontend.SourceMeta{Op: &pb.SourceOp{Identifier: strings.Replace(op.Identifier, "://", ":", 1)}}, nil
}

// What can't be read is an error, not a missing file.
func TestUnreadableFiles(t *testing.T) {
	broken := errors.New("disk on fire")
	for name, text := range map[string]string{
		"Dockerfile":              "failed to read dockerfile",
		"Dockerfile.dockerignore": "read Dockerfile.dockerignore",
		".dockerignore":           "read .dockerignore",
		"@dir/.dockerignore":      "context files",
	} {
		bridge := newBridge(t, map[string]string{"Dockerfile": "FROM busybox\nCOPY --from=files a /a\n", "@dir/x": ""})
		failing := &readBridge{fakeBridge: bridge, fail: map[string]error{name: broken}}
		_, err := solveText(t, failing, map[string]string{"context:files": "local:dir"})
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q", name, err, text)
		}
	}
	// As large as a file may be, and larger.
	for size, fails := range map[int]bool{maxFileSize: false, maxFileSize + 1: true} {
		bridge := newBridge(t, map[string]string{"Dockerfile": "FROM busybox\n", ".dockerignore": strings.Repeat("\n", size)})
		if _, err := solveText(t, bridge, nil); (err != nil) != fails {
			t.Errorf("ignore file of %d bytes: %v", size, err)
		}
	}
}

// readBridge fails to read some files.
type readBridge struct {
	*fakeBridge
	fail map[string]error
}

func (b *readBridge) Solve(ctx context.Context, req frontend.SolveRequest) (*frontend.Result, error) {
	res, err := b.fakeBridge.Solve(ctx, req)
	if err != nil || res.Ref == nil {
		return res, err
	}
	prefix := ""
	if strings.Contains(fmt.Sprint(req.Definition.Metadata), "[context files]") {
		prefix = "@dir/"
	}
	return &frontend.Result{Ref: &readRef{res.Ref, prefix, b.fail}}, nil
}

type readRef struct {
	frontend.Ref
	prefix string
	fail   map[string]error
}

func (r *readRef) ReadFile(ctx context.Context, name string, rng *gwpb.FileRange) ([]byte, error) {
	if err := r.fail[r.prefix+name]; err != nil {
		return nil, err
	}
	return r.Ref.ReadFile(ctx, name, rng)
}

func (r *readRef) StatFile(ctx context.Context, name string) (*fstypes.Stat, error) {
	if err := r.fail[r.prefix+name]; err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return r.Ref.StatFile(ctx, name)
}

// Words that double each other end in an error before they fill memory.
func TestExpansionIsBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("FROM busybox\nENV a=xxxxxxxx\n")
	for range 30 {
		text.WriteString("ENV a=$a$a\n")
	}
	_, err := solveText(t, newBridge(t, map[string]string{"Dockerfile": text.String()}), nil)
	if !errors.Is(err, errTooLong) || len(errdefs.Sources(err)) != 1 {
		t.Errorf("got %v", err)
	}
	global := "ARG a=xxxxxxxx\n" + strings.Repeat("ARG a=$a$a\n", 30) + "FROM busybox\n"
	if _, err := solveText(t, newBridge(t, map[string]string{"Dockerfile": global}), nil); !errors.Is(err, errTooLong) {
		t.Errorf("got %v", err)
	}
}

// The same source is asked for once, though many stages and platforms want it.
func TestSourcesAreResolvedOnce(t *testing.T) {
	files := map[string]string{"Dockerfile": "FROM --platform=$BUILDPLATFORM busybox AS a\nFROM --platform=$BUILDPLATFORM busybox\nCOPY --from=a / /\nCOPY --from=busybox / /x\n"}
	bridge := &countingBridge{fakeBridge: newBridge(t, files)}
	if _, err := solveText(t, bridge, map[string]string{"platform": "linux/amd64,linux/arm64,linux/s390x"}); err != nil {
		t.Fatal(err)
	}
	// The image that --from names is for each target platform.
	if n := bridge.asked.Load(); n != 3 {
		t.Errorf("asked %d times, want 3", n)
	}
}

type countingBridge struct {
	*fakeBridge
	asked atomic.Int32
}

func (b *countingBridge) ResolveSourceMeta(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	b.asked.Add(1)
	return b.fakeBridge.ResolveSourceMeta(ctx, op, opt)
}

// A cancelled request ends, even while a source is being looked up.
func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("client went away")
	bridge := &cancelBridge{fakeBridge: newBridge(t, map[string]string{"Dockerfile": "FROM busybox\nRUN x\n"}), cancel: func() { cancel(gone) }}
	_, err := Frontend{}.Solve(ctx, bridge, frontend.Request{SessionID: "session"})
	if !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

type cancelBridge struct {
	*fakeBridge
	cancel func()
}

func (b *cancelBridge) ResolveSourceMeta(ctx context.Context, _ *pb.SourceOp, _ frontend.MetaOptions) (*frontend.SourceMeta, error) {
	b.cancel()
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

func TestCommitTime(t *testing.T) {
	for object, want := range map[string]int64{
		"tree x\ncommitter A B <a@b> 1400000001 +0200\n\nmsg": 1400000001,
		"tree x\n\ncommitter in the message 5 +0000":          -1,
		"committer short\n":        -1,
		"committer A <a> nan +0\n": -1,
		"":                         -1,
	} {
		got, err := commitTime([]byte(object))
		if want < 0 != (err != nil) || err == nil && got.Unix() != want {
			t.Errorf("%q: got %v, %v", object, got, err)
		}
	}
}
