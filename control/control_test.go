package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/progress"
	control "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if grpcstatus.Code(err) != code || !strings.Contains(fmt.Sprint(err), text) {
		t.Errorf("error %v, want %s and %q", err, code, text)
	}
}

// compat: CTL-011, CTL-012, CTL-023
func TestRefusedRequests(t *testing.T) {
	d := newDaemon(t, time.Hour)
	def := definition(t, mkfile("/f", ""))
	for _, c := range []struct {
		req  *control.SolveRequest
		code codes.Code
		want string
	}{
		{&control.SolveRequest{}, codes.InvalidArgument, "Ref is missing"},
		{&control.SolveRequest{Ref: strings.Repeat("x", 1000)}, codes.InvalidArgument, "1000 bytes"},
		{&control.SolveRequest{Ref: "1", Definition: def, Frontend: "fake"}, codes.InvalidArgument, "exclude"},
		{&control.SolveRequest{Ref: "2", Frontend: "nope"}, codes.InvalidArgument, `"nope"; there are dockerfile.v0, fake`},
		{&control.SolveRequest{Ref: "3", Exporters: []*control.Exporter{{}}}, codes.InvalidArgument, "Exporters[0].Type"},
		{&control.SolveRequest{Ref: "4", Definition: def, Exporters: []*control.Exporter{{Type: "nope"}}}, codes.Unknown, "exporter 0 (nope)"},
		{&control.SolveRequest{Ref: "5", Entitlements: []string{"root"}}, codes.InvalidArgument, `unknown entitlement "root"`},
		{&control.SolveRequest{Ref: "6", Entitlements: []string{"security.insecure"}}, codes.InvalidArgument, "not allowed"},
		{&control.SolveRequest{Ref: "7", Entitlements: []string{"network.host=x"}}, codes.InvalidArgument, "unknown entitlement"},
		{&control.SolveRequest{Ref: "8", CompatibilityVersion: 40}, codes.Unimplemented, "upgrade"},
		{&control.SolveRequest{Ref: "9", CompatibilityVersion: 7}, codes.InvalidArgument, "not one of"},
		{&control.SolveRequest{Ref: "10", Definition: &pb.Definition{Def: [][]byte{{0xff}}}}, codes.InvalidArgument, "definition"},
	} {
		_, err := d.control().Solve(t.Context(), c.req)
		wantCode(t, err, c.code, c.want)
	}
	if _, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "11", Definition: def, Entitlements: []string{"device=gpu", "network.host"}}); err != nil {
		t.Errorf("entitlements that are allowed: %v", err)
	}
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "11", Definition: def})
	wantCode(t, err, codes.AlreadyExists, "11")
}

// Nor is one that is registered before it turns out that it may not be done.
func TestDriverOfARefusedBuild(t *testing.T) {
	d := newDaemon(t, time.Hour)
	for field, req := range map[string]*control.SolveRequest{
		"Entitlements": {Ref: "e", Entitlements: []string{"all"}},
		"exporter":     {Ref: "x", Exporters: []*control.Exporter{{Type: "nonesuch"}}},
	} {
		_, err := d.control().Solve(t.Context(), req)
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("error %v", err)
		}
		_, driven := d.bridge().Ping(inBuild(t.Context(), req.Ref), &gwpb.PingRequest{})
		if driven == nil || driven.Error() != err.Error() {
			t.Errorf("who drives it hears %v, who asked for it %v", driven, err)
		}
	}
}

// A build that was refused is not waited for, and has nothing to tell beside
// the answer to Solve. Who wants to drive it hears why.
func TestStatusOfARefusedRequest(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", CompatibilityVersion: 7})
	wantCode(t, err, codes.InvalidArgument, "CompatibilityVersion")
	stream, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
	must(t, err)
	if all := readStatus(t, stream); len(all) != 0 {
		t.Errorf("a refused build tells %v", all)
	}
	_, err = d.bridge().Ping(inBuild(t.Context(), "r"), &gwpb.PingRequest{})
	wantCode(t, err, codes.InvalidArgument, "CompatibilityVersion")
	// The id is free for a request that is good.
	_, err = d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Definition: definition(t, mkfile("/f", ""))})
	must(t, err)
}

func readStatus(t *testing.T, stream control.Control_StatusClient) (all []*control.StatusResponse) {
	t.Helper()
	for {
		msg, err := stream.Recv()
		if err == io.EOF {
			return all
		}
		must(t, err)
		all = append(all, msg)
	}
}

// compat: CTL-060, CTL-063, CTL-066
func TestStatusFromTheBeginning(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Definition: definition(t, mkfile("/f", ""))})
	must(t, err)
	for range 2 { // late, and twice
		stream, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
		must(t, err)
		header, err := stream.Header()
		must(t, err)
		if _, err := time.Parse(time.RFC3339Nano, header.Get("buildkit-current-timestamp")[0]); err != nil {
			t.Error(err)
		}
		var announced, started, completed bool
		for _, msg := range readStatus(t, stream) {
			for _, v := range msg.Vertexes {
				if v.Name != "make files" {
					continue
				}
				announced = announced || v.Started == nil
				started = started || v.Started != nil && v.Completed == nil
				completed = completed || v.Completed != nil
			}
		}
		if !announced || !started || !completed {
			t.Errorf("announced %v, started %v, completed %v", announced, started, completed)
		}
	}
	stream, err := d.control().Status(t.Context(), &control.StatusRequest{})
	must(t, err)
	_, err = stream.Recv()
	wantCode(t, err, codes.InvalidArgument, "Ref is missing")
}

// compat: CTL-092
func TestForgottenBuilds(t *testing.T) {
	d := newDaemon(t, 0)
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake"})
	must(t, err)
	for {
		if _, err := d.builds.Get(t.Context(), "r", 0); err != nil {
			wantCode(t, grpcerrors.ToGRPC(t.Context(), err), codes.NotFound, "no such job r")
			break
		}
	}
	if _, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake"}); err != nil {
		t.Errorf("the id is not free again: %v", err)
	}
}

func TestClientThatGoesAwayCancelsItsBuild(t *testing.T) {
	d := newDaemon(t, time.Hour)
	started := d.frontend.blocks()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := d.control().Solve(ctx, &control.SolveRequest{Ref: "r", Frontend: "fake"})
		done <- err
	}()
	<-started
	b, err := d.builds.Get(t.Context(), "r", 0)
	must(t, err)
	cancel()
	wantCode(t, <-done, codes.Canceled, "")
	readAll(t, b.Events())
	if err := b.Outcome().Err; grpcerrors.Code(err) != codes.Canceled {
		t.Errorf("outcome %v", err)
	}
	stream, err := d.control().ListenBuildHistory(t.Context(), &control.BuildHistoryRequest{EarlyExit: true, Ref: "r"})
	must(t, err)
	for {
		ev, err := stream.Recv()
		if err == io.EOF {
			break
		}
		must(t, err)
		if ev.Type == control.BuildHistoryEventType_COMPLETE && codes.Code(ev.Record.Error.GetCode()) != codes.Canceled {
			t.Errorf("history error %v", ev.Record.Error)
		}
	}
}

func readAll(t *testing.T, r *progress.Reader) (out []progress.Event) {
	t.Helper()
	for {
		events, err := r.Next(t.Context())
		if err == io.EOF {
			return out
		}
		must(t, err)
		out = append(out, events...)
	}
}

func TestDrain(t *testing.T) {
	d := newDaemon(t, time.Hour)
	started := d.frontend.blocks()
	done := make(chan error, 1)
	go func() {
		_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake"})
		done <- err
	}()
	<-started
	ctx, cancel := context.WithCancelCause(t.Context())
	drained := make(chan struct{})
	go func() { d.builds.Drain(ctx); close(drained) }()
	cancel(errors.New("the grace period is over"))
	<-drained
	wantCode(t, <-done, codes.Unavailable, "shutting down: the grace period is over")
	if n := len(d.builds.Running()); n > 0 {
		t.Errorf("%d builds run", n)
	}
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "s", Frontend: "fake"})
	wantCode(t, err, codes.Unavailable, "takes no new builds")
}

func TestFrontendThatPanics(t *testing.T) {
	d := newDaemon(t, time.Hour)
	d.frontend.solve = func(context.Context, frontend.Bridge, frontend.Request) (*frontend.Result, error) { panic("oh") }
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake"})
	wantCode(t, err, codes.Internal, "panicked: oh")
	stream, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
	must(t, err)
	readStatus(t, stream) // ends
}

func TestResponse(t *testing.T) {
	d := newDaemon(t, time.Hour)
	d.frontend.solve = func(context.Context, frontend.Bridge, frontend.Request) (*frontend.Result, error) {
		return &frontend.Result{Metadata: map[string][]byte{"frontend.x": []byte("1"), "other": []byte("2")}}, nil
	}
	resp, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake", Exporters: []*control.Exporter{{Type: "image", Attrs: map[string]string{"name": "n"}}}})
	must(t, err)
	r := resp.ExporterResponse
	if r["frontend.x"] != "1" || r["image.name"] != "docker.io/library/n:latest" || r["containerimage.digest"] == "" || r["other"] != "" {
		t.Errorf("response %v", r)
	}
}

// compat: CTL-081, CTL-082, LLB-008, LLB-C74
func TestErrorDetails(t *testing.T) {
	d := newDaemon(t, time.Hour)
	def := definition(t, mkdir("/a"), mkfile("/missing/f", ""))
	dgst := digest.FromBytes(def.Def[0])
	def.Source = &pb.Source{
		Infos: []*pb.SourceInfo{{Filename: "Dockerfile", Data: []byte("one\ntwo\n")}},
		Locations: map[string]*pb.Locations{dgst.String(): {Locations: []*pb.Location{
			{SourceIndex: 0, Ranges: []*pb.Range{{Start: &pb.Position{Line: 2}, End: &pb.Position{Line: 2}}}},
		}}},
	}
	_, err := d.client().Solve(t.Context(), client.SolveOptions{Definition: def}, nil)
	if err == nil {
		t.Fatal("no error")
	}
	var ve *errdefs.VertexError
	if !errors.As(err, &ve) || ve.Digest != dgst.String() {
		t.Errorf("vertex %v", ve)
	}
	if src := errdefs.Sources(err); len(src) != 1 || src[0].Info.Filename != "Dockerfile" || src[0].Ranges[0].Start.Line != 2 {
		t.Errorf("sources %v", src)
	}
	var se *errdefs.SolveError
	if !errors.As(err, &se) {
		t.Fatalf("no solve detail: %v", err)
	}
	if len(se.Op.GetFile().GetActions()) != 2 || se.Description["llb.customname"] != "make files" || se.GetFile().GetIndex() != 1 {
		t.Errorf("solve detail %v", se.Solve)
	}
}

// compat: CTL-083, GW-012
func TestFrontendDetail(t *testing.T) {
	d := newDaemon(t, time.Hour)
	d.frontend.solve = func(context.Context, frontend.Bridge, frontend.Request) (*frontend.Result, error) {
		return nil, errors.New("can't")
	}
	_, err := d.client().Solve(t.Context(), client.SolveOptions{Frontend: "fake", Attrs: map[string]string{"source": "img"}}, nil)
	if f := errdefs.Frontends(err); len(f) != 1 || f[0].Name != "fake" || f[0].Source != "img" {
		t.Errorf("error %v, frontends %v", err, f)
	}
}

// Names and errors that are no UTF-8 must not break a stream.
func TestTextThatIsNoUTF8(t *testing.T) {
	d := newDaemon(t, time.Hour)
	d.frontend.solve = func(ctx context.Context, b frontend.Bridge, _ frontend.Request) (*frontend.Result, error) {
		b.Warn(ctx, progress.Warning{URL: "\xff", Short: []byte("\xff")})
		return nil, &os.PathError{Op: "open", Path: "bad\xff\xfename", Err: os.ErrNotExist}
	}
	var n int
	_, err := d.client().Solve(t.Context(), client.SolveOptions{Ref: "r", Frontend: "fake"}, func(msg *control.StatusResponse) { n += len(msg.Warnings) })
	if err == nil || !strings.Contains(err.Error(), "bad\uFFFDname") || len(errdefs.Frontends(err)) != 1 {
		t.Errorf("error %v", err)
	}
	if n != 1 {
		t.Errorf("%d warnings", n)
	}
}

// compat: CTL-002, CTL-050
func TestBridgeRouting(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.bridge().Ping(t.Context(), &gwpb.PingRequest{})
	wantCode(t, err, codes.InvalidArgument, "no buildid")
	wait := d.clientDriven(t.Context(), "r")
	pong, err := d.bridge().Ping(inBuild(t.Context(), "r"), &gwpb.PingRequest{})
	must(t, err)
	if len(pong.LLBCaps) == 0 || len(pong.FrontendAPICaps) != 27 || len(pong.Workers) != 1 {
		t.Errorf("pong: %d, %d caps, %d workers", len(pong.LLBCaps), len(pong.FrontendAPICaps), len(pong.Workers))
	}
	inFlight := make(chan error)
	started := d.frontend.blocks()
	go func() {
		_, err := d.bridge().Solve(inBuild(t.Context(), "r"), &gwpb.SolveRequest{Frontend: "fake"})
		inFlight <- err
	}()
	<-started
	_, err = d.bridge().Return(inBuild(t.Context(), "r"), &gwpb.ReturnRequest{Error: &status.Status{Code: int32(codes.Aborted), Message: "enough"}})
	must(t, err)
	wantCode(t, wait(), codes.Aborted, "enough")
	wantCode(t, <-inFlight, codes.Canceled, "enough")
	_, err = d.bridge().Ping(inBuild(t.Context(), "r"), &gwpb.PingRequest{})
	wantCode(t, err, codes.NotFound, "no such job r")

	started = d.frontend.blocks()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go d.control().Solve(ctx, &control.SolveRequest{Ref: "s", Frontend: "fake"})
	<-started
	_, err = d.bridge().Ping(inBuild(t.Context(), "s"), &gwpb.PingRequest{})
	wantCode(t, err, codes.FailedPrecondition, "not driven by its client")
}

// compat: GW-032, GW-033, GW-034
func TestReadingInsideRefs(t *testing.T) {
	d := newDaemon(t, time.Hour)
	wait := d.clientDriven(t.Context(), "r")
	ctx := inBuild(t.Context(), "r")
	b := d.bridge()
	res, err := b.Solve(ctx, &gwpb.SolveRequest{AllowResultReturn: true, AllowResultArrayRef: true, Definition: definition(t,
		mkdir("/etc"), mkfile("/etc/hostname", "0123456789"), mkfile("/etc/b.txt", ""), mkfile("/etc/a.txt", ""),
		symlink("/etc/hostname", "/abs"), symlink("../../../../etc", "/up"), symlink("/nowhere", "/etc/dangling"))})
	must(t, err)
	id := res.Result.GetRef().Id
	if _, err := b.Evaluate(ctx, &gwpb.EvaluateRequest{Ref: id}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		rng  *gwpb.FileRange
		want string
		code codes.Code
	}{
		{"/etc/hostname", nil, "0123456789", 0}, {"etc/hostname", nil, "0123456789", 0}, {"abs", nil, "0123456789", 0}, {"/up/hostname", nil, "0123456789", 0},
		{"../../etc/hostname", &gwpb.FileRange{Offset: 3, Length: 4}, "3456", 0},
		{"/abs", &gwpb.FileRange{Offset: 8, Length: 1 << 62}, "89", 0},
		{"/abs", &gwpb.FileRange{Offset: 1 << 62, Length: 1 << 62}, "", 0},
		{"/abs", &gwpb.FileRange{Offset: 2}, "", 0},
		{"/abs", &gwpb.FileRange{Offset: -1}, "", codes.InvalidArgument},
		{"/abs", &gwpb.FileRange{Length: -1}, "", codes.InvalidArgument},
		{"/etc", nil, "", codes.InvalidArgument},
		{"/etc/dangling", nil, "", codes.Unknown}, {"/nope", nil, "", codes.Unknown}, {"", nil, "", codes.InvalidArgument},
	} {
		got, err := b.ReadFile(ctx, &gwpb.ReadFileRequest{Ref: id, FilePath: c.path, Range: c.rng})
		if grpcstatus.Code(err) != c.code || string(got.GetData()) != c.want {
			t.Errorf("ReadFile %q %v: %q, %v", c.path, c.rng, got.GetData(), err)
		}
		if err != nil && strings.Contains(err.Error(), "/proc/") {
			t.Errorf("an error tells the daemon's own path: %v", err)
		}
	}
	for _, c := range []struct{ path, include, want string }{
		{"/etc", "", "a.txt b.txt dangling hostname"}, {"/up", "*.txt", "a.txt b.txt"}, {"etc", "nope", ""}, {"/", "", "abs etc up"},
	} {
		got, err := b.ReadDir(ctx, &gwpb.ReadDirRequest{Ref: id, DirPath: c.path, IncludePattern: c.include})
		must(t, err)
		var names []string
		for _, st := range got.Entries {
			names = append(names, st.Path)
			// The file of this machine has the same name and another size.
			if st.Path == "hostname" && st.Size != 10 {
				t.Errorf("hostname has %d bytes", st.Size)
			}
			if st.Path == "dangling" && st.Linkname != "/nowhere" {
				t.Errorf("link to %q", st.Linkname)
			}
		}
		if strings.Join(names, " ") != c.want {
			t.Errorf("ReadDir %q %q: %q", c.path, c.include, names)
		}
	}
	for _, path := range []string{"/abs", "/nope", ""} {
		if _, err := b.ReadDir(ctx, &gwpb.ReadDirRequest{Ref: id, DirPath: path}); err == nil {
			t.Errorf("ReadDir %q: no error", path)
		}
	}
	_, err = b.ReadDir(ctx, &gwpb.ReadDirRequest{Ref: id, DirPath: "/", IncludePattern: "[a-"})
	wantCode(t, err, codes.InvalidArgument, "[a-")
	for path, size := range map[string]int64{"/etc/hostname": 10, "/abs": 10, "/up/hostname": 10} {
		got, err := b.StatFile(ctx, &gwpb.StatFileRequest{Ref: id, Path: path})
		if err != nil || got.Stat.Size != size || os.FileMode(got.Stat.Mode) != 0o644 {
			t.Errorf("StatFile %q: %v, %v", path, got, err)
		}
	}
	for _, path := range []string{"/", "etc", "/up", "/etc/.."} {
		if got, err := b.StatFile(ctx, &gwpb.StatFileRequest{Ref: id, Path: path}); err != nil || !os.FileMode(got.Stat.Mode).IsDir() {
			t.Errorf("StatFile %q: %v, %v", path, got, err)
		}
	}
	if _, err := b.StatFile(ctx, &gwpb.StatFileRequest{Ref: id, Path: "/etc/dangling"}); err == nil {
		t.Error("StatFile of a dangling link: no error")
	}
	_, err = b.Return(ctx, &gwpb.ReturnRequest{Result: &gwpb.Result{Result: &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: id}}}})
	must(t, err)
	must(t, wait())
}

func TestUsageRequests(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.control().DiskUsage(t.Context(), &control.DiskUsageRequest{Filter: []string{"=="}})
	wantCode(t, err, codes.InvalidArgument, "filter")
	_, err = d.control().DiskUsage(t.Context(), &control.DiskUsageRequest{AgeLimit: -1})
	wantCode(t, err, codes.InvalidArgument, "ageLimit")
	for _, req := range []*control.PruneRequest{{KeepDuration: -1}, {ReservedSpace: -1}, {MaxUsedSpace: -1}, {MinFreeSpace: -1}, {Filter: []string{"=="}}} {
		stream, err := d.control().Prune(t.Context(), req)
		must(t, err)
		_, err = stream.Recv()
		wantCode(t, err, codes.InvalidArgument, "")
	}
	_, err = d.control().ListWorkers(t.Context(), &control.ListWorkersRequest{Filter: []string{"=="}})
	wantCode(t, err, codes.InvalidArgument, "filter")
	session, err := d.control().Session(t.Context())
	must(t, err)
	_, err = session.Recv()
	wantCode(t, err, codes.InvalidArgument, "x-docker-expose-session-uuid")
}

func TestUnsupportedFeaturesAreRefused(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", ProxyNetwork: true})
	wantCode(t, err, codes.Unimplemented, "ProxyNetwork")
}

// compat: CTL-075, CTL-077
func TestStatusMessages(t *testing.T) {
	late, early := time.Unix(20, 0), time.Unix(10, 0)
	dgst := digest.FromString("v")
	events := []progress.Event{
		{Vertex: &progress.Vertex{Digest: dgst, Name: "late", Started: &late}},
		{Vertex: &progress.Vertex{Digest: dgst, Name: "early", Started: &early}},
		{Vertex: &progress.Vertex{Digest: dgst, Name: "unstarted"}},
		{Status: &progress.Status{ID: "2", Timestamp: late}}, {Status: &progress.Status{ID: "1", Timestamp: early}},
		{Log: &progress.Log{Vertex: dgst, Stream: 2, Data: []byte("b"), Timestamp: late}},
		{Log: &progress.Log{Vertex: dgst, Stream: 1, Data: []byte("a"), Timestamp: early}},
	}
	out := slices.Collect(statusMessages(events))
	if len(out) != 1 {
		t.Fatalf("%d messages", len(out))
	}
	m := out[0]
	if m.Vertexes[0].Name != "unstarted" || m.Vertexes[1].Name != "early" || m.Statuses[0].ID != "1" || string(m.Logs[0].Msg) != "a" || m.Logs[0].Stream != 1 {
		t.Errorf("message %v", m)
	}

	events = []progress.Event{{Log: &progress.Log{Data: make([]byte, 5*maxPart/2)}}}
	for range 100_000 {
		events = append(events, progress.Event{Vertex: &progress.Vertex{Digest: dgst, Inputs: slices.Repeat([]digest.Digest{dgst}, 2)}})
	}
	logs, vertices := 0, 0
	for m := range statusMessages(events) {
		if n := proto.Size(m); n > 2*maxPart {
			t.Errorf("a message of %d bytes", n)
		}
		for _, l := range m.Logs {
			logs += len(l.Msg)
		}
		vertices += len(m.Vertexes)
	}
	if logs != 5*maxPart/2 || vertices != 100_000 {
		t.Errorf("%d bytes of logs, %d vertices", logs, vertices)
	}
}

// Details that a frontend's error carries and this daemon doesn't know pass
// through. compat: CTL-094
func TestUnknownDetails(t *testing.T) {
	d := newDaemon(t, time.Hour)
	wait := d.clientDriven(t.Context(), "r")
	details := []*anypb.Any{{TypeUrl: "unknown/type", Value: []byte("{}")}}
	_, err := d.bridge().Return(inBuild(t.Context(), "r"), &gwpb.ReturnRequest{Error: &status.Status{Code: int32(codes.DataLoss), Message: "m", Details: details}})
	must(t, err)
	got := grpcstatus.Convert(wait()).Proto()
	if got.Code != int32(codes.DataLoss) || len(got.Details) == 0 || !proto.Equal(got.Details[0], details[0]) {
		t.Errorf("status %v", got)
	}
}

func TestRecordLeavesOutCredentials(t *testing.T) {
	in := []*control.Exporter{{Type: "image", Attrs: map[string]string{"name": "n", "secret_access_key": "s", "token": "t"}}}
	out := withoutSecrets(in)
	if len(out[0].Attrs) != 1 || out[0].Attrs["name"] != "n" || len(in[0].Attrs) != 3 {
		t.Errorf("recorded %v of %v", out, in)
	}
}
