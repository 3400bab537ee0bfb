// Package client is what callers of the daemon link: it connects, opens the
// session that serves local files, secrets and credentials, solves, and asks
// for usage, workers and version. It works with any daemon that speaks the
// protocol.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// maxMessage bounds messages in both directions, as on the daemon's side.
const maxMessage = 16 << 20

// Client is a connection to a daemon. All methods are safe for concurrent use.
type Client struct {
	addr    string
	conn    *grpc.ClientConn
	control control.ControlClient
}

// Options qualify New.
type Options struct {
	// TLS is used on tcp:// addresses; nil is plain text.
	TLS *tls.Config
}

// New prepares a connection to addr, unix:///path or tcp://host:port. It is
// made when first used.
func New(addr string, opts Options) (*Client, error) {
	proto, rest, ok := strings.Cut(addr, "://")
	if !ok || (proto != "unix" && proto != "tcp") {
		return nil, fmt.Errorf("address %q: must be unix:///path or tcp://host:port", addr)
	}
	creds := insecure.NewCredentials()
	if opts.TLS != nil && proto == "tcp" {
		creds = credentials.NewTLS(opts.TLS)
	}
	conn, err := grpc.NewClient("passthrough:///"+rest,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, proto, rest)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithUnaryInterceptor(grpcerrors.UnaryClientInterceptor),
		grpc.WithStreamInterceptor(grpcerrors.StreamClientInterceptor),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", addr, err)
	}
	return &Client{addr: addr, conn: conn, control: control.NewControlClient(conn)}, nil
}

// Addr is the address that New was given.
func (c *Client) Addr() string { return c.addr }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Info asks for the daemon's version.
func (c *Client) Info(ctx context.Context) (*apitypes.BuildkitVersion, error) {
	resp, err := c.control.Info(ctx, &control.InfoRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", c.addr, err)
	}
	return resp.BuildkitVersion, nil
}

// ListWorkers describes the daemon's workers, the default one first.
func (c *Client) ListWorkers(ctx context.Context, filters ...string) ([]*apitypes.WorkerRecord, error) {
	resp, err := c.control.ListWorkers(ctx, &control.ListWorkersRequest{Filter: filters})
	if err != nil {
		return nil, fmt.Errorf("list workers of %s: %w", c.addr, err)
	}
	return resp.Record, nil
}

// DiskUsage lists cache records that match one of filters, or all.
func (c *Client) DiskUsage(ctx context.Context, filters ...string) ([]*control.UsageRecord, error) {
	resp, err := c.control.DiskUsage(ctx, &control.DiskUsageRequest{Filter: filters})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its disk usage: %w", c.addr, err)
	}
	return resp.Record, nil
}

// PruneOptions say what may be removed; sizes are bytes.
type PruneOptions struct {
	Filters       []string
	All           bool
	KeepDuration  time.Duration
	ReservedSpace int64
	MaxUsedSpace  int64
	MinFreeSpace  int64
}

// Prune removes unused cache records and calls removed for each.
func (c *Client) Prune(ctx context.Context, opts PruneOptions, removed func(*control.UsageRecord) error) error {
	stream, err := c.control.Prune(ctx, &control.PruneRequest{
		Filter: opts.Filters, All: opts.All, KeepDuration: int64(opts.KeepDuration),
		ReservedSpace: opts.ReservedSpace, MaxUsedSpace: opts.MaxUsedSpace, MinFreeSpace: opts.MinFreeSpace,
	})
	if err != nil {
		return fmt.Errorf("prune %s: %w", c.addr, err)
	}
	for {
		rec, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("prune %s: %w", c.addr, err)
		}
		if err := removed(rec); err != nil {
			return err
		}
	}
}
