// Package control serves the daemon's gRPC API: moby.buildkit.v1.Control, the
// LLBBridge of client-driven builds, health and reflection; beside these,
// kiln's own kiln.v1.Explain (internal/explanation), kiln.v1.Usage and
// kiln.v1.Debug (package client). It checks requests, translates wire types, and
// leaves the work to control/build and below.
package control

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/control/explain"
	"github.com/kilnbuild/kiln/control/history"
	"github.com/kilnbuild/kiln/internal/explanation"
	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
)

// maxMessage bounds messages in both directions (CTL-007).
const maxMessage = 16 << 20

// Front is what a Server answers from before the daemon has opened its state.
type Front struct {
	Workers func() []*apitypes.WorkerRecord
	Log     *slog.Logger
}

// Config is what a Server answers from afterwards.
type Config struct {
	Builds   *build.Engine
	History  *history.Log
	Explain  *explain.Journal // nil: the service isn't there
	Cache    *cache.Manager
	Sessions *session.Manager
	GCRules  []cache.PruneOptions // of the garbage collection
}

// Server implements the services. Until Open it tells what the daemon is, and
// all other calls wait.
type Server struct {
	control.UnimplementedControlServer
	front Front

	opened chan struct{} // closed by Open and Fail, after which the fields below stay as they are
	cfg    Config
	refuse error // the reason of Fail
}

// New returns the services, of which only Front's can answer yet.
func New(front Front) *Server { return &Server{front: front, opened: make(chan struct{})} }

// Open lets calls in, those that wait first. It is called once, unless Fail is.
func (s *Server) Open(cfg Config) {
	s.cfg = cfg
	close(s.opened)
}

// Fail refuses calls because the daemon can't open its state.
func (s *Server) Fail(err error) {
	s.refuse = err
	close(s.opened)
}

// early are the calls that Front answers.
var early = map[string]bool{control.Control_ListWorkers_FullMethodName: true, control.Control_Info_FullMethodName: true}

// enter waits until method can be answered.
func (s *Server) enter(ctx context.Context, method string) error {
	if early[method] {
		return nil
	}
	select {
	case <-s.opened:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.refuse != nil {
		return status.Errorf(codes.Unavailable, "the daemon could not start: %v", s.refuse)
	}
	return nil
}

// window is how much a client may send before the daemon has read it. With a fixed
// window gRPC doesn't measure the connection: on a local socket that is a ping for
// every few messages, which the client pays for, too.
const window = 4 << 20

// Options are what the gRPC server that carries the services must be made with.
func (s *Server) Options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
	}
}

// Register adds the services to g.
func (s *Server) Register(g *grpc.Server) {
	control.RegisterControlServer(g, s)
	gwpb.RegisterLLBBridgeServer(g, &bridgeRouter{server: s})
	explanation.Register(g, explainServer{s})
	g.RegisterService(&usageService, s)
	g.RegisterService(&debugService, s)
	h := health.NewServer()
	healthpb.RegisterHealthServer(g, h)
	reflection.Register(g)
}

// unary makes errors typed for the wire and panics errors (CTL-008).
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer s.report(ctx, info.FullMethod, &err)
	if err := s.enter(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer s.report(ss.Context(), info.FullMethod, &err)
	if err := s.enter(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, ss)
}

func (s *Server) report(ctx context.Context, method string, err *error) {
	if r := recover(); r != nil {
		s.front.Log.Error("request panicked", "method", method, "panic", r, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "internal error: %s panicked: %v", method, r)
	}
	if *err == nil {
		return
	}
	if !errors.Is(*err, context.Canceled) {
		s.front.Log.Debug("request failed", "method", method, "err", (*err).Error())
	}
	*err = toGRPC(ctx, *err)
}

// toGRPC is err with its code and details as clients read them. Its text is
// made valid UTF-8, without which the details would be lost on the wire.
func toGRPC(ctx context.Context, err error) error {
	st, ok := status.FromError(grpcerrors.ToGRPC(ctx, build.WithCode(err)))
	if !ok {
		return status.Error(codes.Unknown, text(err.Error()))
	}
	p := st.Proto()
	p.Message = text(p.Message)
	return status.ErrorProto(p)
}
