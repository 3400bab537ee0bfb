package gateway

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/progress"
	apitypes "github.com/moby/buildkit/api/types"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// fakeBridge answers with what a test put into it.
type fakeBridge struct {
	result   *frontend.Result
	meta     *frontend.SourceMeta
	solved   frontend.SolveRequest
	resolved *pb.SourceOp
	options  frontend.MetaOptions
	warnings []progress.Warning

	container func(frontend.ContainerRequest) (frontend.Container, error)
}

func (b *fakeBridge) NewContainer(_ context.Context, req frontend.ContainerRequest) (frontend.Container, error) {
	return b.container(req)
}

func (b *fakeBridge) Solve(_ context.Context, req frontend.SolveRequest) (*frontend.Result, error) {
	b.solved = req
	if b.result == nil {
		return nil, errors.New("nothing to solve")
	}
	return b.result, nil
}

func (b *fakeBridge) ResolveSourceMeta(_ context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	b.resolved, b.options = op, opt
	return b.meta, nil
}

func (b *fakeBridge) Warn(_ context.Context, w progress.Warning) { b.warnings = append(b.warnings, w) }
func (b *fakeBridge) Platforms() []ocispec.Platform              { return nil }

type fakeRef struct {
	name      string
	evaluated int
}

func (r *fakeRef) Definition() *pb.Definition     { return &pb.Definition{Def: [][]byte{[]byte(r.name)}} }
func (r *fakeRef) Evaluate(context.Context) error { r.evaluated++; return nil }
func (r *fakeRef) ReadFile(_ context.Context, path string, rng *gwpb.FileRange) ([]byte, error) {
	return fmt.Appendf(nil, "%s %d %d", path, rng.GetOffset(), rng.GetLength()), nil
}
func (r *fakeRef) ReadDir(_ context.Context, path, include string) ([]*fstypes.Stat, error) {
	return []*fstypes.Stat{{Path: path + include}}, nil
}
func (r *fakeRef) StatFile(_ context.Context, path string) (*fstypes.Stat, error) {
	return &fstypes.Stat{Path: path}, nil
}

func newServer(b *fakeBridge) *Server {
	return NewServer(Config{Bridge: b, Inputs: map[string]*pb.Definition{"in": {Def: [][]byte{{1}}}}, Workers: []*apitypes.WorkerRecord{{ID: "w"}}})
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("error %v, want %s and %q", err, code, text)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// compat: GW-020, GW-036
func TestPingAndInputs(t *testing.T) {
	s := newServer(&fakeBridge{})
	for range 2 { // the lists aren't shared
		pong, err := s.Ping(t.Context(), nil)
		must(t, err)
		enabled := 0
		for _, c := range pong.FrontendAPICaps {
			if c.Enabled {
				enabled++
			} else if c.DisabledReasonMsg == "" {
				t.Errorf("%s is disabled without a reason", c.ID)
			}
			c.Enabled = false
		}
		if len(pong.FrontendAPICaps) != 27 || enabled != 27-len(disabledCaps) || pong.Workers[0].ID != "w" {
			t.Errorf("%d caps, %d enabled", len(pong.FrontendAPICaps), enabled)
		}
	}
	in, err := s.Inputs(t.Context(), nil)
	must(t, err)
	if len(in.Definitions) != 1 || in.Definitions["in"] == nil {
		t.Errorf("inputs %v", in)
	}
}

// compat: GW-028, GW-029, GW-043
func TestShapesOfResults(t *testing.T) {
	one := &frontend.Result{Ref: &fakeRef{name: "one"}, Metadata: map[string][]byte{"k": []byte("v")}}
	many := &frontend.Result{Refs: map[string]frontend.Ref{"a": &fakeRef{name: "a"}, "b": nil}}
	for _, c := range []struct {
		name  string
		res   *frontend.Result
		req   *gwpb.SolveRequest
		shape string
	}{
		{"Bare", one, &gwpb.SolveRequest{}, "bare"},
		{"Old", one, &gwpb.SolveRequest{AllowResultReturn: true}, "*moby_buildkit_v1_frontend.Result_RefDeprecated"},
		{"New", one, &gwpb.SolveRequest{AllowResultReturn: true, AllowResultArrayRef: true}, "*moby_buildkit_v1_frontend.Result_Ref"},
		{"OldMap", many, &gwpb.SolveRequest{AllowResultReturn: true}, "*moby_buildkit_v1_frontend.Result_RefsDeprecated"},
		{"NewMap", many, &gwpb.SolveRequest{AllowResultReturn: true, AllowResultArrayRef: true}, "*moby_buildkit_v1_frontend.Result_Refs"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(&fakeBridge{result: c.res})
			resp, err := s.Solve(t.Context(), c.req)
			must(t, err)
			if c.shape == "bare" {
				if ref, err := s.ref(resp.Ref); err != nil || ref != c.res.Ref || resp.Result != nil {
					t.Errorf("response %v", resp)
				}
				return
			}
			if shape := fmt.Sprintf("%T", resp.Result.Result); shape != c.shape {
				t.Errorf("shape %s", shape)
			}
			back, err := s.resultFromProto(resp.Result)
			must(t, err)
			if back.Ref != c.res.Ref || len(back.Refs) != len(c.res.Refs) || string(back.Metadata["k"]) != string(c.res.Metadata["k"]) {
				t.Errorf("came back as %+v", back)
			}
			for k, r := range c.res.Refs {
				if back.Refs[k] != r {
					t.Errorf("ref %s came back as %v", k, back.Refs[k])
				}
			}
		})
	}
}

func TestSolveRequests(t *testing.T) {
	b := &fakeBridge{}
	s := newServer(b)
	_, err := s.Solve(t.Context(), &gwpb.SolveRequest{Definition: &pb.Definition{Def: [][]byte{{1}, {}}}})
	wantCode(t, err, codes.InvalidArgument, "Definition.def[1]")
	if _, err := s.Solve(t.Context(), &gwpb.SolveRequest{}); err == nil {
		t.Error("the bridge's error is lost")
	}
	b.result = &frontend.Result{}
	_, err = s.Solve(t.Context(), &gwpb.SolveRequest{Frontend: "f", FrontendOpt: map[string]string{"k": "v"}, Evaluate: true})
	must(t, err)
	if b.solved.Frontend != "f" || b.solved.Opts["k"] != "v" || !b.solved.Evaluate {
		t.Errorf("passed on %+v", b.solved)
	}
}

// compat: GW-037
func TestReturnOnce(t *testing.T) {
	for _, c := range []struct {
		name string
		req  *gwpb.ReturnRequest
		want string
	}{
		{"Nothing", &gwpb.ReturnRequest{}, "neither"},
		{"Both", &gwpb.ReturnRequest{Result: &gwpb.Result{}, Error: &statuspb.Status{Code: 2}}, "both"},
		{"NoError", &gwpb.ReturnRequest{Error: &statuspb.Status{}}, "code OK"},
	} {
		_, err := newServer(&fakeBridge{}).Return(t.Context(), c.req)
		wantCode(t, err, codes.InvalidArgument, c.want)
	}
	b := &fakeBridge{}
	s := newServer(b)
	_, err := s.Return(t.Context(), &gwpb.ReturnRequest{Result: &gwpb.Result{Result: &gwpb.Result_RefDeprecated{RefDeprecated: "nope"}}})
	wantCode(t, err, codes.NotFound, "no such ref: nope") // and it may be tried again
	result := &gwpb.ReturnRequest{Result: &gwpb.Result{Metadata: map[string][]byte{"k": []byte("v")}, Attestations: map[string]*gwpb.Attestations{"a": {}}}}
	_, err = s.Return(t.Context(), result)
	must(t, err)
	_, err = s.Return(t.Context(), result)
	wantCode(t, err, codes.FailedPrecondition, "already")
	if len(b.warnings) != 1 {
		t.Errorf("%d warnings of attestations", len(b.warnings))
	}
	got, err := s.Wait(t.Context())
	must(t, err)
	if got.Ref != nil || string(got.Metadata["k"]) != "v" {
		t.Errorf("result %+v", got)
	}
}

func TestReturnedError(t *testing.T) {
	s := newServer(&fakeBridge{})
	_, err := s.Return(t.Context(), &gwpb.ReturnRequest{Error: &statuspb.Status{Code: int32(codes.Aborted), Message: "m"}})
	must(t, err)
	if _, err := s.Wait(t.Context()); grpcerrors.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "m") {
		t.Errorf("error %v", err)
	}
}

func TestWaitEndsWithItsContext(t *testing.T) {
	cause := errors.New("client gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := newServer(&fakeBridge{}).Wait(ctx); err != cause {
		t.Errorf("error %v", err)
	}
}

// compat: GW-035
func TestScratchAndUnknownRefs(t *testing.T) {
	s := newServer(&fakeBridge{})
	known := s.addRef(&fakeRef{})
	read := func(ref, path string) [3]error {
		_, e1 := s.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: ref, FilePath: path})
		_, e2 := s.ReadDir(t.Context(), &gwpb.ReadDirRequest{Ref: ref, DirPath: path})
		_, e3 := s.StatFile(t.Context(), &gwpb.StatFileRequest{Ref: ref, Path: path})
		return [3]error{e1, e2, e3}
	}
	for i, err := range read("", "/x") {
		if err == nil || !strings.Contains(err.Error(), "file does not exist") {
			t.Errorf("read %d of scratch: %v", i, err)
		}
	}
	for i, err := range read("", "/") {
		if (err == nil) != (i > 0) { // a directory is no file
			t.Errorf("read %d of the root of scratch: %v", i, err)
		}
	}
	for _, err := range read("nope", "/") {
		wantCode(t, err, codes.NotFound, "no such ref: nope, all ["+known+"]")
	}
	for _, err := range read(known, "") {
		wantCode(t, err, codes.InvalidArgument, "missing")
	}
	_, err := s.Evaluate(t.Context(), &gwpb.EvaluateRequest{})
	must(t, err)
	_, err = s.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: "nope"})
	wantCode(t, err, codes.NotFound, "nope")
}

func TestReadsReachTheRef(t *testing.T) {
	s := newServer(&fakeBridge{})
	r := &fakeRef{}
	id := s.addRef(r)
	file, err := s.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: id, FilePath: "/f", Range: &gwpb.FileRange{Offset: 1, Length: 2}})
	must(t, err)
	dir, err := s.ReadDir(t.Context(), &gwpb.ReadDirRequest{Ref: id, DirPath: "/d", IncludePattern: "*"})
	must(t, err)
	st, err := s.StatFile(t.Context(), &gwpb.StatFileRequest{Ref: id, Path: "/s"})
	must(t, err)
	_, err = s.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: id})
	must(t, err)
	if string(file.Data) != "/f 1 2" || dir.Entries[0].Path != "/d*" || st.Stat.Path != "/s" || r.evaluated != 1 {
		t.Errorf("%s, %v, %v, evaluated %d times", file.Data, dir, st, r.evaluated)
	}
}

// compat: GW-038
func TestWarn(t *testing.T) {
	b := &fakeBridge{}
	s := newServer(b)
	dgst := digest.FromString("v").String()
	pos := &pb.Position{Line: 1}
	for _, req := range []*gwpb.WarnRequest{
		{}, {Digest: "x"}, {Digest: dgst, Ranges: []*pb.Range{nil}},
		{Digest: dgst, Ranges: []*pb.Range{{Start: pos, End: pos}, {Start: pos}}}, {Digest: dgst, Ranges: []*pb.Range{{End: pos}}},
	} {
		_, err := s.Warn(t.Context(), req)
		wantCode(t, err, codes.InvalidArgument, "Warn")
	}
	_, err := s.Warn(t.Context(), &gwpb.WarnRequest{Digest: dgst, Level: 2, Short: []byte("s"), Url: "u", Ranges: []*pb.Range{{Start: pos, End: pos}}})
	must(t, err)
	if w := b.warnings; len(w) != 1 || w[0].Vertex.String() != dgst || w[0].Level != 2 || string(w[0].Short) != "s" || w[0].URL != "u" {
		t.Errorf("warnings %+v", w)
	}
}

func TestResolve(t *testing.T) {
	b := &fakeBridge{meta: &frontend.SourceMeta{Op: &pb.SourceOp{Identifier: "docker-image://docker.io/library/x:1"}, Digest: digest.FromString("x"), Config: []byte("{}")}}
	s := newServer(b)
	cfg, err := s.ResolveImageConfig(t.Context(), &gwpb.ResolveImageConfigRequest{Ref: "x:1", Platform: &pb.Platform{OS: "linux", Architecture: "aarch64"}, LogName: "l", ResolveMode: "pull"})
	must(t, err)
	if cfg.Ref != "docker.io/library/x:1" || cfg.Digest != b.meta.Digest.String() || b.resolved.Identifier != "docker-image://x:1" ||
		b.options.Platform.Architecture != "arm64" || b.options.LogName != "l" || b.options.ResolveMode != "pull" {
		t.Errorf("%v, asked for %v with %+v", cfg, b.resolved, b.options)
	}
	_, err = s.ResolveImageConfig(t.Context(), &gwpb.ResolveImageConfigRequest{Ref: "x@sha256:0", ResolverType: 1, SessionID: "s", StoreID: "i"})
	must(t, err)
	if b.resolved.Identifier != "oci-layout://x@sha256:0" || b.resolved.Attrs[pb.AttrOCILayoutSessionID] != "s" || b.resolved.Attrs[pb.AttrOCILayoutStoreID] != "i" {
		t.Errorf("asked for %v", b.resolved)
	}
	meta, err := s.ResolveSourceMeta(t.Context(), &gwpb.ResolveSourceMetaRequest{Source: &pb.SourceOp{Identifier: "docker-image://x"}, Image: &gwpb.ResolveSourceImageRequest{NoConfig: true}})
	must(t, err)
	if meta.Image.Digest != b.meta.Digest.String() || !b.options.NoConfig {
		t.Errorf("%v", meta)
	}
	for _, req := range []*gwpb.ResolveSourceMetaRequest{{}, {Source: &pb.SourceOp{}}} {
		_, err := s.ResolveSourceMeta(t.Context(), req)
		wantCode(t, err, codes.InvalidArgument, "Source.Identifier")
	}
	_, err = s.ResolveImageConfig(t.Context(), &gwpb.ResolveImageConfigRequest{})
	wantCode(t, err, codes.InvalidArgument, "Ref")
}

// A server whose build has ended knows no refs any more.
func TestClose(t *testing.T) {
	s := newServer(&fakeBridge{})
	id := s.addRef(&fakeRef{name: "r"})
	if _, err := s.ref(id); err != nil {
		t.Fatal(err)
	}
	s.Close()
	_, err := s.ref(id)
	wantCode(t, err, codes.NotFound, "no such ref: "+id)
}
