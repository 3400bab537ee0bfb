package control

import (
	"context"
	"time"

	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/frontend/gateway"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// buildIDKey is the request metadata that names the build a call belongs to
// (CTL-050).
const buildIDKey = "buildkit-controlapi-buildid"

// registerWait is how long calls wait for their build to be registered: clients
// send them beside Solve, not after it.
const registerWait = 3 * time.Second

// bridgeRouter passes LLBBridge calls on to the build they name.
type bridgeRouter struct {
	gwpb.UnimplementedLLBBridgeServer
	server *Server
}

// route returns the build that ctx names, which its client drives, and ctx bound
// to the build's life.
func (r *bridgeRouter) route(ctx context.Context) (*build.Build, context.Context, func(), error) {
	md, _ := metadata.FromIncomingContext(ctx)
	ids := md.Get(buildIDKey)
	if len(ids) == 0 || ids[0] == "" {
		return nil, nil, nil, status.Errorf(codes.InvalidArgument, "no buildid: the request metadata lacks %s", buildIDKey)
	}
	b, err := r.server.cfg.Builds.Get(ctx, ids[0], registerWait)
	if err != nil {
		return nil, nil, nil, err
	}
	switch err := b.Refused(); {
	case err != nil:
		return nil, nil, nil, &build.RefusedError{Why: err}
	case b.Ended():
		return nil, nil, nil, errdefs.NewUnknownJobError(ids[0])
	case b.Gateway() == nil:
		return nil, nil, nil, status.Errorf(codes.FailedPrecondition, "build %s is not driven by its client", ids[0])
	}
	bound, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(b.Context(), func() { cancel(context.Cause(b.Context())) })
	return b, bound, func() { stop(); cancel(nil) }, nil
}

// call routes one unary call.
func call[Req, Resp any](ctx context.Context, r *bridgeRouter, req Req, method func(*gateway.Server, context.Context, Req) (Resp, error)) (resp Resp, err error) {
	b, ctx, done, err := r.route(ctx)
	if err != nil {
		return resp, err
	}
	defer done()
	resp, err = method(b.Gateway(), ctx, req)
	if err != nil && b.Context().Err() != nil {
		// What it was in the midst of may know that the build has ended, but not why.
		err = context.Cause(b.Context())
	}
	return resp, err
}

func (r *bridgeRouter) Ping(ctx context.Context, req *gwpb.PingRequest) (*gwpb.PongResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Ping)
}

func (r *bridgeRouter) Inputs(ctx context.Context, req *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Inputs)
}

func (r *bridgeRouter) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Solve)
}

func (r *bridgeRouter) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ResolveImageConfig)
}

func (r *bridgeRouter) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ResolveSourceMeta)
}

func (r *bridgeRouter) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Evaluate)
}

func (r *bridgeRouter) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ReadFile)
}

func (r *bridgeRouter) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ReadDir)
}

func (r *bridgeRouter) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return call(ctx, r, req, (*gateway.Server).StatFile)
}

func (r *bridgeRouter) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Warn)
}

func (r *bridgeRouter) Return(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	return call(ctx, r, req, (*gateway.Server).Return)
}

func (r *bridgeRouter) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	return call(ctx, r, req, (*gateway.Server).NewContainer)
}

func (r *bridgeRouter) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ReleaseContainer)
}

func (r *bridgeRouter) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error {
	b, ctx, done, err := r.route(stream.Context())
	if err != nil {
		return err
	}
	defer done()
	return b.Gateway().ExecProcess(boundStream{stream, ctx})
}

// boundStream is a stream that ends with the build, too.
type boundStream struct {
	gwpb.LLBBridge_ExecProcessServer
	ctx context.Context
}

func (s boundStream) Context() context.Context { return s.ctx }

func (r *bridgeRouter) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ReadFileContainer)
}

func (r *bridgeRouter) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return call(ctx, r, req, (*gateway.Server).ReadDirContainer)
}

func (r *bridgeRouter) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return call(ctx, r, req, (*gateway.Server).StatFileContainer)
}
