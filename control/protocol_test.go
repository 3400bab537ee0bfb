package control

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/frontend"
	control "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
)

// compat: CTL-005, CTL-006
func TestServicesOfTheSocket(t *testing.T) {
	d := newDaemon(t, time.Hour)
	health, err := healthpb.NewHealthClient(d.conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	must(t, err)
	if health.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health %v", health.Status)
	}
	stream, err := reflectionpb.NewServerReflectionClient(d.conn).ServerReflectionInfo(t.Context())
	must(t, err)
	must(t, stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	list, err := stream.Recv()
	must(t, err)
	var names []string
	for _, s := range list.GetListServicesResponse().Service {
		names = append(names, s.Name)
	}
	for _, want := range []string{"moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("reflection lists %v, not %s", names, want)
		}
	}
}

// A message of nearly 16 MiB is taken, a larger one refused, and the daemon
// goes on. compat: CTL-007
func TestMessageLimit(t *testing.T) {
	d := newDaemon(t, time.Hour)
	const most = 16 << 20
	solve := func(ref string, size int) error {
		def := definition(t, mkfile("/f", strings.Repeat("x", size)))
		_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: ref, Definition: def}, grpc.MaxCallSendMsgSize(2*most))
		return err
	}
	must(t, solve("fits", most-4096))
	wantCode(t, solve("too large", most+1), codes.ResourceExhausted, "larger than max")
	must(t, solve("after it", 1))
}

// The id of a build that runs can't be taken by another, and Status may ask for
// a build before its request is there. compat: CTL-010, CTL-062
func TestBuildIDs(t *testing.T) {
	d := newDaemon(t, time.Hour)
	early, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
	must(t, err)
	started := d.frontend.blocks()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := d.control().Solve(ctx, &control.SolveRequest{Ref: "r", Frontend: "fake"})
		done <- err
	}()
	<-started
	_, err = d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake"})
	wantCode(t, err, codes.AlreadyExists, "r")
	cancel()
	wantCode(t, <-done, codes.Canceled, "")
	readStatus(t, early) // to its end

	_, err = d.builds.Get(t.Context(), "nobody", time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "no such job nobody") {
		t.Errorf("error %v", err)
	}
}

// Attributes of exporters are looked at before anything is built. compat: CTL-017
func TestExportersBeforeTheBuild(t *testing.T) {
	d := newDaemon(t, time.Hour)
	d.frontend.solve = func(context.Context, frontend.Bridge, frontend.Request) (*frontend.Result, error) {
		t.Error("the build has begun")
		return nil, errors.New("unexpected")
	}
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Frontend: "fake", Exporters: []*control.Exporter{
		{Type: "image", Attrs: map[string]string{"name": "n"}}, {Type: "image", Attrs: map[string]string{"compression": "nope"}},
	}})
	wantCode(t, err, codes.Unknown, "exporter 1 (image)")
}

// A build that is somebody's internal affair isn't in the history. compat: CTL-024
func TestInternalBuildsLeaveNoHistory(t *testing.T) {
	d := newDaemon(t, time.Hour)
	def := definition(t, mkfile("/f", ""))
	for _, req := range []*control.SolveRequest{{Ref: "internal", Definition: def, Internal: true}, {Ref: "shown", Definition: def}} {
		_, err := d.control().Solve(t.Context(), req)
		must(t, err)
	}
	stream, err := d.control().ListenBuildHistory(t.Context(), &control.BuildHistoryRequest{EarlyExit: true})
	must(t, err)
	var refs []string
	for {
		ev, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		refs = append(refs, ev.Record.Ref)
	}
	if !slices.Contains(refs, "shown") || slices.Contains(refs, "internal") {
		t.Errorf("history %q", refs)
	}
}

// compat: CTL-071
func TestProgressGroups(t *testing.T) {
	d := newDaemon(t, time.Hour)
	def := definition(t, mkfile("/f", ""))
	for _, meta := range def.Metadata {
		meta.ProgressGroup = &pb.ProgressGroup{Id: "g", Name: "a group", Weak: true}
	}
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "r", Definition: def})
	must(t, err)
	stream, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
	must(t, err)
	seen := false
	for _, msg := range readStatus(t, stream) {
		for _, v := range msg.Vertexes {
			if v.Name == "make files" {
				seen = true
				if g := v.ProgressGroup; g.GetId() != "g" || g.GetName() != "a group" || !g.GetWeak() {
					t.Errorf("group %v", g)
				}
			}
		}
	}
	if !seen {
		t.Error("no such vertex")
	}
}

// run keeps s connected until the test or cancel ends it; the error that it
// ended with goes to the channel.
func (d *daemon) run(ctx context.Context, s *session.Session) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, grpchijack.Dialer(d.control())) }()
	d.t.Cleanup(func() { s.Close() })
	return ended
}

// What a session says of itself is what those see that use it; it may come
// after the one that waits for it, and with it ends what is done through it.
// compat: SES-001, SES-002, SES-007, SES-022
func TestSessionOfAClient(t *testing.T) {
	d := newDaemon(t, time.Hour)
	s, err := session.NewSession(t.Context(), "the key")
	must(t, err)
	s.Allow(echo{})
	type got struct {
		caller session.Caller
		err    error
	}
	waiting := make(chan got, 1)
	go func() { // before the session is there
		c, err := d.worker.Sessions().Get(t.Context(), s.ID(), false)
		waiting <- got{c, err}
	}()
	ended := d.run(t.Context(), s)
	g := <-waiting
	must(t, g.err)
	c := g.caller
	if c.SharedKey() != "the key" || !c.Supports("/test.Echo/Echo") || c.Supports("/test.Echo/Other") {
		t.Errorf("shared key %q, supports Echo: %v", c.SharedKey(), c.Supports("/test.Echo/Echo"))
	}
	if _, err := healthpb.NewHealthClient(c.Conn()).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil { // calls go to the client
		t.Error(err)
	}
	err = c.Conn().Invoke(t.Context(), "/test.Absent/Call", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{}) // compat: SES-006
	wantCode(t, err, codes.Unimplemented, "")
	ctx := c.Context(context.Background())
	must(t, s.Close())
	<-ctx.Done()
	<-ended
}

// echo is a service that a client advertises.
type echo struct{}

func (echo) Register(s *grpc.Server) {
	s.RegisterService(&grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{
		MethodName: "Echo", Handler: func(any, context.Context, func(any) error, grpc.UnaryServerInterceptor) (any, error) { return nil, nil },
	}}}, struct{}{})
}

// Of two connections with one id, the newer one is used. compat: SES-003
func TestSessionIDTakenOver(t *testing.T) {
	d := newDaemon(t, time.Hour)
	first, err := session.NewSession(t.Context(), "first")
	must(t, err)
	d.run(t.Context(), first)
	get := func() session.Caller {
		c, err := d.worker.Sessions().Get(t.Context(), first.ID(), false)
		must(t, err)
		return c
	}
	if key := get().SharedKey(); key != "first" {
		t.Fatalf("shared key %q", key)
	}
	second, err := session.NewSession(t.Context(), "second")
	must(t, err)
	go second.Run(t.Context(), func(ctx context.Context, proto string, meta map[string][]string) (net.Conn, error) { //nolint:errcheck // it ends with the test
		for name := range meta {
			if strings.EqualFold(name, sessionIDKey) {
				meta[name] = []string{first.ID()}
			}
		}
		return grpchijack.Dialer(d.control())(ctx, proto, meta)
	})
	defer second.Close()
	deadline := time.Now().Add(time.Minute)
	for get().SharedKey() != "second" {
		if time.Now().After(deadline) {
			t.Fatal("the first session is still used")
		}
	}
}

// compat: SES-002
func TestSessionWithoutID(t *testing.T) {
	d := newDaemon(t, time.Hour)
	stream, err := d.control().Session(t.Context())
	must(t, err)
	_, err = stream.Recv()
	wantCode(t, err, codes.InvalidArgument, sessionIDKey)
}

// compat: CTL-076
func TestWarningsWithTheirSource(t *testing.T) {
	d := newDaemon(t, time.Hour)
	dgst := digest.FromString("of another build's vertex")
	wait := d.clientDriven(t.Context(), "r")
	_, err := d.bridge().Warn(inBuild(t.Context(), "r"), &gwpb.WarnRequest{
		Digest: dgst.String(), Level: 2, Short: []byte("short"), Detail: [][]byte{[]byte("long")}, Url: "https://docs.example/rule",
		Info: &pb.SourceInfo{Filename: "Dockerfile", Data: []byte("FROM x")}, Ranges: []*pb.Range{{Start: &pb.Position{Line: 1}, End: &pb.Position{Line: 1}}},
	})
	must(t, err)
	_, err = d.bridge().Return(inBuild(t.Context(), "r"), &gwpb.ReturnRequest{Result: &gwpb.Result{}})
	must(t, err)
	must(t, wait())
	stream, err := d.control().Status(t.Context(), &control.StatusRequest{Ref: "r"})
	must(t, err)
	var warnings []*control.VertexWarning
	for _, msg := range readStatus(t, stream) {
		warnings = append(warnings, msg.Warnings...)
	}
	if len(warnings) != 1 {
		t.Fatalf("warnings %v", warnings)
	}
	w := warnings[0]
	if w.Vertex != dgst.String() || w.Level != 2 || string(w.Short) != "short" || string(w.Detail[0]) != "long" || w.Url != "https://docs.example/rule" ||
		w.Info.GetFilename() != "Dockerfile" || len(w.Ranges) != 1 || w.Ranges[0].Start.Line != 1 {
		t.Errorf("warning %v", w)
	}
}
