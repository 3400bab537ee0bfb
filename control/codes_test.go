package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// internal marks an error as upstream's errdefs.Internal does.
type internal struct{ error }

func (internal) System() {}

// compat: CTL-093
func TestCodes(t *testing.T) {
	ctx := t.Context()
	deadline, cancel := context.WithTimeout(ctx, 0)
	defer cancel()
	<-deadline.Done()
	write := func(errno syscall.Errno) error { return &os.PathError{Op: "write", Path: "/f", Err: errno} }
	exit := errors.New("exit code: 1")
	for _, tt := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"nothing known", errors.New("odd"), codes.Unknown},
		{"marked as internal", internal{errors.New("broken")}, codes.Internal},
		{"a full disk", write(syscall.ENOSPC), codes.ResourceExhausted},
		{"a full disk that was looked at", &cache.FullError{Err: write(syscall.ENOSPC), Root: "/var"}, codes.ResourceExhausted},
		{"a process that failed on a full disk", &cache.FullError{Err: exit, Root: "/var"}, codes.ResourceExhausted},
		{"a quota", write(syscall.EDQUOT), codes.ResourceExhausted},
		{"a quota that was looked at", &cache.FullError{Err: write(syscall.EDQUOT), Root: "/var"}, codes.ResourceExhausted},
		{"no memory", write(syscall.ENOMEM), codes.ResourceExhausted},
		{"a broken disk", write(syscall.EIO), codes.Internal},
		{"a bad address", write(syscall.EFAULT), codes.Internal},
		{"a missing file", write(syscall.ENOENT), codes.Unknown},
		{"cancelled", context.Canceled, codes.Canceled},
		{"too late", deadline.Err(), codes.DeadlineExceeded},
		{"a code of its own", status.Error(codes.NotFound, "no such job a"), codes.NotFound},
		{"one of several", errors.Join(errors.New("odd"), status.Error(codes.InvalidArgument, "bad")), codes.InvalidArgument},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := fmt.Errorf("build: %w", tt.err)
			st, ok := status.FromError(toGRPC(ctx, err))
			if !ok || st.Code() != tt.want {
				t.Errorf("code %s, want %s", st.Code(), tt.want)
			}
			// The longest message wins: what was added on the way isn't lost.
			if got := grpcerrors.FromGRPC(st.Err()).Error(); !strings.Contains(got, err.Error()) {
				t.Errorf("message %q, want %q", got, err)
			}
		})
	}
}
