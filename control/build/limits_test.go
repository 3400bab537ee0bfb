package build

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// With a clock that is the test's own: the last limit that was set holds, from
// the start of the build.
func TestBuildTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(context.Background())
		b := &Build{ctx: ctx, cancel: cancel, started: time.Now()}
		b.endAfter(time.Minute)
		time.Sleep(30 * time.Second) // of the test's clock
		b.endAfter(2 * time.Minute)
		time.Sleep(89 * time.Second)
		synctest.Wait()
		if ctx.Err() != nil {
			t.Fatalf("ended after %s: %v", time.Since(b.started), context.Cause(ctx))
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		err := context.Cause(ctx)
		if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "2m0s") || !strings.Contains(err.Error(), "kiln.build-timeout") {
			t.Errorf("cause %v", err)
		}
		b.endAfter(0)
	})
}
