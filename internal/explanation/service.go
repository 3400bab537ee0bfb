package explanation

import (
	"context"
	"encoding/json"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The service stands beside the protocol's own, which clients of other makers
// know nothing of. It has one method:
//
//	service kiln.v1.Explain {
//	  // The ref of a build, or "" for the last one that ended, to a Build as JSON.
//	  rpc Explain(google.protobuf.StringValue) returns (google.protobuf.BytesValue);
//	}
const (
	service = "kiln.v1.Explain"
	method  = "/" + service + "/Explain"
)

// Server answers for the service. Explain returns a gRPC status error.
type Server interface {
	Explain(ctx context.Context, ref string) (*Build, error)
}

// Register adds the service to g.
func Register(g grpc.ServiceRegistrar, s Server) {
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: service, HandlerType: (*Server)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Explain", Handler: handle}},
	}, s)
}

func handle(srv any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
	req := &wrapperspb.StringValue{}
	if err := decode(req); err != nil {
		return nil, err
	}
	answer := func(ctx context.Context, req any) (any, error) {
		b, err := srv.(Server).Explain(ctx, req.(*wrapperspb.StringValue).Value)
		if err != nil {
			return nil, err
		}
		data, err := json.Marshal(b)
		if err != nil {
			return nil, fmt.Errorf("encode the explanation of build %s: %w", b.Ref, err)
		}
		return wrapperspb.Bytes(data), nil
	}
	if intercept == nil {
		return answer(ctx, req)
	}
	return intercept(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, answer)
}

// Ask asks a daemon for the explanation of the build named ref, or with "" of
// the last one that ended.
func Ask(ctx context.Context, conn grpc.ClientConnInterface, ref string) (*Build, error) {
	resp := &wrapperspb.BytesValue{}
	if err := conn.Invoke(ctx, method, wrapperspb.String(ref), resp); err != nil {
		return nil, err
	}
	b := &Build{}
	if err := json.Unmarshal(resp.Value, b); err != nil {
		return nil, fmt.Errorf("read the daemon's explanation: %w", err)
	}
	return b, nil
}
