package build

import (
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// endAfter has the build end when limit has passed since its start, instead of
// what was said before; 0 is never.
func (b *Build) endAfter(limit time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.deadline != nil {
		b.deadline.Stop()
		b.deadline = nil
	}
	if limit > 0 {
		b.deadline = time.AfterFunc(time.Until(b.started.Add(limit)), func() {
			b.cancel(status.Errorf(codes.DeadlineExceeded, "timeout: the build has run for %s, its limit (kiln.build-timeout); raise the limit, or see which step took that long", limit))
		})
	}
}
