package control

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// While the daemon opens its state it says what it is; all else waits, until the
// state is open, the client leaves, or the daemon can't start.
func TestCallsBeforeOpen(t *testing.T) {
	front := Front{
		Workers: func() []*apitypes.WorkerRecord { return []*apitypes.WorkerRecord{{ID: "w"}} }, Log: slog.New(slog.DiscardHandler),
	}
	call := func(ctx context.Context, s *Server, method string) (any, error) {
		return s.unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
			switch method {
			case control.Control_ListWorkers_FullMethodName:
				return s.ListWorkers(ctx, &control.ListWorkersRequest{})
			case control.Control_Info_FullMethodName:
				return s.Info(ctx, &control.InfoRequest{})
			}
			return s.cfg.GCRules, nil
		})
	}
	s := New(front)
	if got, err := call(t.Context(), s, control.Control_ListWorkers_FullMethodName); err != nil || got.(*control.ListWorkersResponse).Record[0].ID != "w" {
		t.Errorf("the workers are %v, %v", got, err)
	}
	if got, err := call(t.Context(), s, control.Control_Info_FullMethodName); err != nil || got.(*control.InfoResponse).BuildkitVersion == nil {
		t.Errorf("the daemon is %v, %v", got, err)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := call(gone, s, control.Control_DiskUsage_FullMethodName); status.Code(err) != codes.Canceled {
		t.Errorf("a client that left gets %v", err)
	}
	answered := make(chan error)
	go func() {
		_, err := call(t.Context(), s, control.Control_DiskUsage_FullMethodName)
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("a call was answered before the state was open: %v", err)
	default:
	}
	s.Open(Config{})
	if err := <-answered; err != nil {
		t.Errorf("a call that waited: %v", err)
	}

	s = New(front)
	s.Fail(errors.New("the disk is broken"))
	if _, err := call(t.Context(), s, control.Control_DiskUsage_FullMethodName); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the disk is broken") {
		t.Errorf("a call of a daemon that can't start: %v", err)
	}
}
