package client

import (
	"context"
	"errors"
	"fmt"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// buildIDKey is the request metadata that names the build a call belongs to.
const buildIDKey = "buildkit-controlapi-buildid"

// Gateway is a build that this client drives: what a frontend may ask of the
// daemon, the client may, too. All methods are safe for concurrent use.
type Gateway struct {
	ref    string
	bridge gwpb.LLBBridgeClient
}

// Drive makes the result of a build.
type Drive func(ctx context.Context, g *Gateway) (*gwpb.Result, error)

// Build is Solve for a build that drive drives. What drive returns is exported,
// or is the build's error. Of opts, the definition, the frontend and its inputs
// are drive's to use.
func (c *Client) Build(ctx context.Context, opts SolveOptions, drive Drive, status Status) (Response, error) {
	return c.build(ctx, opts, drive, status)
}

// Gateway returns the build named ref, which a client drives: this one or
// another.
func (c *Client) Gateway(ref string) *Gateway {
	return &Gateway{ref: ref, bridge: gwpb.NewLLBBridgeClient(c.conn)}
}

// drive runs fn and tells the daemon how it ended.
func (g *Gateway) drive(ctx context.Context, fn Drive) error {
	req := &gwpb.ReturnRequest{}
	res, err := fn(ctx, g)
	switch {
	case err != nil:
		req.Error = status.Convert(grpcerrors.ToGRPC(ctx, err)).Proto()
	case res == nil:
		req.Result = &gwpb.Result{}
	default:
		req.Result = res
	}
	if _, rerr := g.bridge.Return(g.named(ctx), req); rerr != nil {
		return fmt.Errorf("return the result of build %s: %w", g.ref, errors.Join(rerr, err))
	}
	return nil // the daemon ends the build with err
}

func (g *Gateway) named(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, buildIDKey, g.ref)
}

// Solve solves a definition, or what a frontend makes, to references.
func (g *Gateway) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
	req.AllowResultReturn, req.AllowResultArrayRef = true, true
	resp, err := g.bridge.Solve(g.named(ctx), req)
	if err != nil {
		return nil, err
	}
	return resp.Result, nil
}
