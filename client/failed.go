package client

import (
	"context"
	"fmt"

	"github.com/moby/buildkit/solver/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Kiln's own service beside the protocol's. Its one method takes a build's id
// as google.protobuf.StringValue and answers with an errdefs.Solve.
const (
	DebugService = "kiln.v1.Debug"
	FailedMethod = "Failed"
)

// Failed asks for the step that failed last in a build which is driven by a
// client, this one or another, and hasn't ended. Containers of the build can be
// made from what it left. Only kiln's daemon knows.
func (c *Client) Failed(ctx context.Context, ref string) (*errdefs.Solve, error) {
	var out errdefs.Solve
	err := c.conn.Invoke(ctx, "/"+DebugService+"/"+FailedMethod, wrapperspb.String(ref), &out)
	if status.Code(err) == codes.Unimplemented {
		return nil, fmt.Errorf("the daemon at %s doesn't tell of failed steps: it is not kilnd, or an older one", c.addr)
	}
	if err != nil {
		return nil, fmt.Errorf("ask for the failed step of build %s: %w", ref, err)
	}
	return &out, nil
}
