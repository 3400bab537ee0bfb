package control

import (
	"context"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// sessionIDKey names the session in the request metadata (SES-002).
const sessionIDKey = "x-docker-expose-session-uuid"

// Session carries the reverse connection on which the client serves files,
// secrets, SSH and credentials (SES-001).
func (s *Server) Session(stream control.Control_SessionServer) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); len(md.Get(sessionIDKey)) == 0 {
		return status.Errorf(codes.InvalidArgument, "the request metadata lacks %s", sessionIDKey)
	}
	conn, closed, opts := grpchijack.Hijack(stream)
	defer conn.Close()

	ctx, cancel := context.WithCancelCause(stream.Context())
	go func() {
		select {
		case <-closed:
			cancel(errSessionClosed)
		case <-ctx.Done():
		}
	}()
	defer cancel(errSessionClosed)
	return s.cfg.Sessions.HandleConn(ctx, conn, opts)
}

var errSessionClosed = status.Error(codes.Canceled, "the session's connection is closed")
