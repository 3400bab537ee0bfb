package build

import (
	"errors"
	"syscall"

	"github.com/kilnbuild/kiln/cache"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
)

// WithCode is err with the gRPC code that it has for clients and in counts, if
// that isn't the one that grpcerrors finds: what a full disk, or a quota, is to
// blame for is ResourceExhausted (CTL-093), whatever it made fail.
func WithCode(err error) error {
	var full *cache.FullError
	if errors.As(err, &full) || errors.Is(err, syscall.EDQUOT) {
		return grpcerrors.WrapCode(err, codes.ResourceExhausted)
	}
	return err
}
