package control

import (
	"context"

	"github.com/kilnbuild/kiln/client"
	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// debugService tells of failed steps: see client.Failed.
var debugService = grpc.ServiceDesc{
	ServiceName: client.DebugService,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: client.FailedMethod,
		Handler: func(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
			var ref wrapperspb.StringValue
			if err := decode(&ref); err != nil {
				return nil, err
			}
			handle := func(ctx context.Context, req any) (any, error) {
				return srv.(*Server).failed(ctx, req.(*wrapperspb.StringValue).Value)
			}
			if intercept == nil {
				return handle(ctx, &ref)
			}
			info := &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + client.DebugService + "/" + client.FailedMethod}
			return intercept(ctx, &ref, info, handle)
		},
	}},
}

func (s *Server) failed(ctx context.Context, ref string) (*errdefs.Solve, error) {
	b, err := s.cfg.Builds.Get(ctx, ref, 0)
	switch {
	case err != nil:
		return nil, err
	case b.Ended():
		return nil, status.Errorf(codes.FailedPrecondition, "build %s has ended, and nothing is kept of its steps; build with --on-error=shell to have it wait", ref)
	case b.Gateway() == nil:
		return nil, status.Errorf(codes.FailedPrecondition, "build %s is driven by the daemon, which doesn't wait when a step fails; build with --on-error=shell", ref)
	}
	failed := b.Failed()
	if failed == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "no step of build %s has failed", ref)
	}
	return failed, nil
}
