package client

import (
	"context"
	"fmt"

	"github.com/kilnbuild/kiln/internal/explanation"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Explanation says why the steps of a build ran.
type Explanation = explanation.Build

// Explain asks why the steps of the build named ref ran, or with "" those of
// the last one that ended. Only kiln's daemon knows.
func (c *Client) Explain(ctx context.Context, ref string) (*Explanation, error) {
	b, err := explanation.Ask(ctx, c.conn, ref)
	if status.Code(err) == codes.Unimplemented {
		return nil, fmt.Errorf("the daemon at %s can't explain builds: it is not kilnd, or an older one", c.addr)
	}
	if err != nil {
		return nil, fmt.Errorf("explain: %w", err)
	}
	return b, nil
}
